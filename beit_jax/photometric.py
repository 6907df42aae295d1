"""mmsegmentation's photometric distortion, on the device."""

import jax
import jax.numpy as jnp

BRIGHTNESS = 32 / 255  # added, at most
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 1 / 10  # of the colour circle, turned at most: 18 of OpenCV's 180 steps
CHANCE = 0.5  # of each of the four


def distort(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue, each by chance and by a random amount.

    As PhotoMetricDistortion of mmsegmentation 0.11: contrast is a factor on the pixels themselves
    and comes before saturation and hue or after them, values are cut to [0, 1] after each. Images
    of other than 3 channels have no saturation and no hue.

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, ch], float in [0, 1].

    Returns:
      float32 in [0, 1].
    """
    return jax.vmap(_distort)(keys, images)


def _distort(key: jax.Array, image: jax.Array) -> jax.Array:
    chances, amounts = jax.random.split(key)
    applied = jax.random.bernoulli(chances, CHANCE, (5,))
    brightness, contrast, saturation, hue = jax.random.uniform(amounts, (4,))
    factor = jnp.where(applied[1], _between(CONTRAST, contrast), 1.0)
    first = applied[4]  # whether contrast comes before colour
    image = _cut(image + jnp.where(applied[0], (2 * brightness - 1) * BRIGHTNESS, 0.0))
    image = _cut(image * jnp.where(first, factor, 1.0))
    if image.shape[-1] == 3:
        image = saturate(image, jnp.where(applied[2], _between(SATURATION, saturation), 1.0))
        image = turn_hue(image, jnp.where(applied[3], (2 * hue - 1) * HUE, 0.0))
    return _cut(image * jnp.where(first, 1.0, factor))


def saturate(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies HSV's saturation, up to 1, of [..., 3] in [0, 1]."""
    value, least = image.max(-1, keepdims=True), image.min(-1, keepdims=True)
    most = value / jnp.maximum(value - least, 1e-6)  # the factor that makes the least channel 0
    return value - (value - image) * jnp.minimum(factor, most)


def turn_hue(image: jax.Array, share: jax.Array) -> jax.Array:
    """Turns HSV's hue by a share of the circle, of [..., 3] in [0, 1]."""
    red, green, blue = jnp.moveaxis(image, -1, 0)
    value, spread = image.max(-1), jnp.ptp(image, axis=-1)
    over = jnp.where(spread > 0, spread, 1.0)
    sector = jnp.where(value == green, 2 + (blue - red) / over, 4 + (red - green) / over)
    sector = jnp.where(value == red, (green - blue) / over, sector) + 6 * share

    def channel(offset: int):
        place = (offset + sector) % 6
        return value - spread * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

    return jnp.stack([channel(offset) for offset in (5, 3, 1)], axis=-1)


def _between(bounds: tuple[float, float], share: jax.Array) -> jax.Array:
    return bounds[0] + share * (bounds[1] - bounds[0])


def _cut(image: jax.Array) -> jax.Array:
    return jnp.clip(image, 0.0, 1.0)
