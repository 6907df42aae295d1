"""What happens to pixels on the device, between the uint8 batch of the host and a network."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from beit_jax.errors import UserError

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma of red, green and blue, as in PIL's mode "L"
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_TRIES = 10  # boxes of which random erasing takes the first that fits


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]; floating images are taken to lie there already.

    Only the dtype decides, never the values: a dark image is not mistaken for a scaled one.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32)
    raise TypeError(f"Images are uint8, or floats in [0, 1], not {images.dtype}.")


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """`(x - mean) / std` of pixels x in [0, 1]: the input of a network.

    Args:
      images: uint8, or float in [0, 1], [..., channels].
      mean, std: of pixels in [0, 1], one number for all channels or one for each.

    Returns:
      float32 [..., channels].

    Raises:
      UserError: another number of means or deviations than channels, or a deviation not above 0.
    """
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(
                f"The {name} to normalise with has {len(values)} numbers but the images have "
                f"{channels} channels: give config.model.{name} one number or {channels}."
            )
    if min(std) <= 0:
        raise UserError(f"config.model.std is {tuple(std)}: set numbers above 0.")
    axes = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.array(values, jnp.float32).reshape(axes) for values in (mean, std))
    return (to_unit(images) - mean) / std


def color_jitter(
    keys: jax.Array, views: Sequence[jax.Array], strength: float
) -> tuple[jax.Array, ...]:
    """Brightness, contrast and saturation by random factors, in random order, for each example.

    As torchvision's `ColorJitter(strength, strength, strength)`: each factor is drawn from
    U(max(0, 1 - strength), 1 + strength) and blends the image with black (brightness), with its
    mean grey (contrast) or with its own grey version (saturation); values are cut to [0, 1] after
    each. All views of an example get the same factors in the same order, and the mean grey of the
    first view, so that a colour has the same fate in each: the official code jitters the image
    before it makes the views. Images of other than 3 channels have no saturation to change; their
    grey is the mean of the channels.

    Args:
      keys: [B] PRNG keys, one for each example.
      views: one or more [B, H, W, channels] (H and W may differ), uint8 or float in [0, 1].
      strength: 0 changes nothing.

    Returns:
      the views, float32 in [0, 1].
    """
    if not strength >= 0:
        raise UserError(f"config.data.color_jitter is {strength}: set 0 or more.")
    views = tuple(to_unit(view) for view in views)
    if strength == 0:
        return views
    factors, order = jitter_draws(keys, strength)
    for turn in range(3):
        views = _jitter_once(views, order[:, turn], factors[:, turn])
    return views


def jitter_draws(keys: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """What chance decides about a colour jitter.

    Returns:
      factors float32 [B, 3] and the operation that each of them belongs to, int32 [B, 3]:
      0 brightness, 1 contrast, 2 saturation, in the order of application.
    """

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_factors, key_order = jax.random.split(key)
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        factors = jax.random.uniform(key_factors, (3,), jnp.float32, low, high)
        return factors, jax.random.permutation(key_order, 3)

    return jax.vmap(draw)(keys)


def _jitter_once(
    views: tuple[jax.Array, ...], operation: jax.Array, factor: jax.Array
) -> tuple[jax.Array, ...]:
    """Applies one operation [B] by its factor [B] to each example.

    All three operations are a blend with another image, so examples differ in that image only: no
    branch, and one pass over the pixels instead of one for each of the six orders.
    """
    operation, factor = (x[:, None, None, None] for x in (operation, factor))
    mean_grey = jnp.mean(_grey(views[0]), axis=(1, 2, 3), keepdims=True)

    def blend(view: jax.Array) -> jax.Array:
        colourless = _grey(view) if view.shape[-1] == 3 else view
        other = jnp.where(operation == _SATURATION, colourless, mean_grey)
        other = jnp.where(operation == _BRIGHTNESS, 0.0, other)
        return jnp.clip(other + factor * (view - other), 0.0, 1.0)

    return tuple(blend(view) for view in views)


def _grey(view: jax.Array) -> jax.Array:
    """[B, H, W, channels] -> [B, H, W, 1]."""
    if view.shape[-1] != 3:
        return jnp.mean(view, axis=-1, keepdims=True)
    # Summed by hand: a product of matrices would round to bfloat16 on some devices.
    return sum(weight * view[..., i : i + 1] for i, weight in enumerate(_GREY))


def erase(
    keys: jax.Array,
    images: jax.Array,
    probability: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """Random erasing: a random box of some images becomes noise, which is N(0, 1) normalised.

    As timm's `RandomErasing` in mode "pixel" with one box: area uniform in 2 % to a third of the
    image, height over width log-uniform in 0.3 to 1/0.3, place uniform; of ten tries the first that
    is smaller than the image on both sides (none: nothing is erased).

    Args:
      keys: [B] PRNG keys, one for each image.
      images: uint8, or float in [0, 1], [B, H, W, channels].
      probability: that an image loses a box.
      mean, std: with which the pixels will be normalised, as in `normalize`.

    Returns:
      float32 [B, H, W, channels], in [0, 1] but for the noise.
    """
    mean, std = (jnp.array(values, jnp.float32).reshape(1, 1, -1) for values in (mean, std))

    def erased(key, image):
        key_noise, key_box = jax.random.split(key)
        noise = mean + std * jax.random.normal(key_noise, image.shape)
        box = _erased_box(key_box, image.shape[:2], probability)
        return jnp.where(_inside(box, image.shape[:2])[..., None], noise, image)

    return jax.vmap(erased)(keys, to_unit(images))


def _erased_box(key: jax.Array, size: tuple[int, int], probability: float) -> jax.Array:
    """The box of random erasing: int32 [top, left, bottom, right]; an empty one for nothing."""
    height, width = size
    # One call for all numbers: each call takes the compiler seconds on a CPU.
    draws = jax.random.uniform(key, (2 * _TRIES + 3,))
    areas, ratios, chance, place = jnp.split(draws, (_TRIES, 2 * _TRIES, 2 * _TRIES + 1))
    area = height * width * (0.02 + areas * (1 / 3 - 0.02))
    ratio = jnp.exp((2.0 * ratios - 1.0) * math.log(0.3))
    h, w = jnp.rint(jnp.sqrt(area * ratio)), jnp.rint(jnp.sqrt(area / ratio))
    fits = (h < height) & (w < width)
    erases = fits.any() & (chance < probability)
    sides = jnp.where(erases, jnp.stack([h, w])[:, jnp.argmax(fits)], 0)
    corner = jnp.floor(place * (jnp.array(size) - sides + 1))
    return jnp.concatenate([corner, corner + sides]).astype(jnp.int32)


def mix(
    keys: jax.Array, images: jax.Array, *, mixup: float, cutmix: float, switch: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with a partner, row i with row B - 1 - i, by mixup or by cutmix.

    Mixup blends by a share drawn from Beta(mixup, mixup); cutmix puts in the partner's pixels in a
    box that covers one minus a share drawn from Beta(cutmix, cutmix), as far as it lies within the
    image. As timm's `Mixup`, but that each row draws its own share and way, where timm draws once
    for a batch: so no draw depends on the batch's size.

    Args:
      keys: [B] PRNG keys, one for each image.
      images: uint8, or float in [0, 1], [B, H, W, channels].
      mixup, cutmix: of the two distributions; 0 leaves that way out, at least one is above 0.
      switch: probability of cutmix where there are both.

    Returns:
      images float32 [B, H, W, channels], and the share [B] that each has of its own row's pixels,
      and so of its target.
    """
    size = images.shape[1:3]
    if not (mixup and cutmix):
        switch = float(cutmix > 0)

    def own_pixels(key):
        """The share [H, W] that an image keeps of each of its pixels."""
        key_kept, key = jax.random.split(key)
        way, *centre = jax.random.uniform(key, (3,))
        cuts = way < switch
        alpha = jnp.where(cuts, cutmix, mixup)
        kept = jax.random.beta(key_kept, alpha, alpha)
        box = _cut_box(size, kept, jnp.stack(centre))
        return jnp.where(cuts, 1.0 - _inside(box, size), kept)

    images, own = to_unit(images), jax.vmap(own_pixels)(keys)[..., None]
    return own * images + (1.0 - own) * images[::-1], own.mean(axis=(1, 2, 3))


def _cut_box(size: tuple[int, int], kept: jax.Array, place: jax.Array) -> jax.Array:
    """Cutmix's box, int32 [top, left, bottom, right], around a `place` [2] in [0, 1)."""
    size = jnp.array(size)
    half = (size * jnp.sqrt(1.0 - kept)).astype(jnp.int32) // 2
    centre = jnp.floor(place * size).astype(jnp.int32)
    return jnp.clip(jnp.concatenate([centre - half, centre + half]), 0, jnp.tile(size, 2))


def _inside(box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Whether each pixel lies in a box (top, left, bottom, right): int32 [4] -> bool [H, W]."""
    top, left, bottom, right = box
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
