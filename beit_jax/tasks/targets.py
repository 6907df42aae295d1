"""What masked image modelling predicts: a tokenizer's codes, or the pixels themselves.

BEiT predicts codes. Pixels are the paper's comparison (Bao et al. 2021, table 4), which it finds
worse: the squared error of a masked patch's normalised pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from beit_jax import losses
from beit_jax.augment import normalize
from beit_jax.data.geometry import View
from beit_jax.models.layers import at_tokens
from beit_jax.task import Sums, mean_of_sums
from beit_jax.tokenizer import Tokenizer

Images = Mapping[str, jax.Array]  # a view's name -> [B, H, W, ch] in [0, 1]
# JAX's names of Pillow's kernels; both widen them where an image shrinks.
_RESIZES = {"bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


class Tokens(NamedTuple):
    """A frozen tokenizer's codes: labels int32 [B, N], or of the patches read int32 [B, M]."""

    tokenizer: Tokenizer
    grid: tuple[int, int]  # of the encoder's patches, one code each
    image_size: tuple[int, int]  # pixels of the encoder's view, down and across

    @property
    def outputs(self) -> int:
        """Logits of a patch."""
        return self.tokenizer.vocabulary

    @property
    def view(self) -> View:
        """What the tokenizer sees of the encoder's crop."""
        height, width = (side * self.tokenizer.factor for side in self.grid)
        return View((height, width), self.tokenizer.interpolation)

    @property
    def views(self) -> dict[str, View]:
        """`view`, where the host makes it: of more pixels than the encoder's, or by nearest or box.

        The others are made on the device, of the encoder's view. From 224 to 112 pixels that is
        0.05 GFLOP an image, and spares the host a resize and a quarter of the bytes to send.
        """
        size, interpolation = self.view
        within = all(ours <= theirs for ours, theirs in zip(size, self.image_size, strict=True))
        return {} if within and interpolation in _RESIZES else {"token_image": self.view}

    def look(self, images: Images) -> jax.Array:
        """The images of `view`: [B, H', W', ch] in [0, 1]."""
        if "token_image" in images:
            return images["token_image"]
        x = images["image"]
        shape = (len(x), *self.view.size, x.shape[-1])
        return jnp.clip(jax.image.resize(x, shape, _RESIZES[self.view.interpolation]), 0, 1)

    @property
    def variables(self) -> Any:
        return self.tokenizer.variables

    @jax.named_scope("tokenizer")
    def labels(self, frozen, images: Images, read: jax.Array | None = None) -> jax.Array:
        codes = self.tokenizer.tokens(frozen, self.look(images), read)
        chex.assert_shape(codes, (None, *self.grid) if read is None else read.shape)
        return codes.reshape(len(codes), -1)

    def guess(self, logits: jax.Array) -> jax.Array:
        """Labels [B, M] that logits [B, M, K] prefer."""
        return logits.argmax(-1)

    def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """[B, M] of logits [B, M, K] for labels [B, M]."""
        return losses.cross_entropy(logits, labels)

    def scores(self, heads: tuple[jax.Array, ...], labels: jax.Array, weights: jax.Array) -> Sums:
        """Sums beside the loss, over labels [B, M] that weigh [B, M]."""
        count = weights.sum()
        histogram = jnp.zeros(self.outputs).at[labels].add(weights)
        hits = [((self.guess(head) == labels) * weights).sum() for head in heads]
        sums = {"accuracy": (hits[0], count), "guess_accuracy": (histogram, count)}
        if len(heads) > 1:
            sums["cls_accuracy"] = (hits[1], count)
        return sums

    def bound(self, frozen, images: Images, labels, token_nats, weight) -> Sums:
        """The two-stage evidence bound of the paper's section 2.5, in nats an image.

        Args:
          frozen: the tokenizer's weights.
          images: the views.
          labels: all tokens [B, N].
          token_nats: [B], -log p of the masked tokens.
          weight: [B], of images.
        """
        sums = {"masked_token_nats": ((token_nats * weight).sum(), weight.sum())}
        if self.tokenizer.nats is None:
            return sums
        tokens = labels.reshape(-1, *self.grid)
        nats = self.tokenizer.nats(frozen, tokens, self.look(images))
        return sums | {
            "reconstruction_nats": ((nats * weight).sum(), weight.sum()),
            "evidence_bound": (-((nats + token_nats) * weight).sum(), weight.sum()),
        }

    @property
    def pictures(self) -> Callable | None:
        """`(frozen, labels [B, N]) -> [B, H', W', ch] in [0, 1]`, if the tokenizer can decode."""
        if self.tokenizer.pictures is None:
            return None
        return lambda frozen, labels: self.tokenizer.pictures(
            frozen, labels.reshape(-1, *self.grid)
        )

    def finalize(self, sums: Sums) -> dict[str, jax.Array]:
        """Means; `guess_accuracy` is what always guessing the commonest token would have scored."""
        histogram, count = sums["guess_accuracy"]
        return mean_of_sums({**sums, "guess_accuracy": (histogram.max(), count)})


class Pixels(NamedTuple):
    """The encoder's own normalised pixels, patch by patch: labels float32 [B, N, P * P * ch].

    Of the patches read int32 [B, M] alone they are [B, M, P * P * ch].
    """

    patch: int  # P, pixels
    grid: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    views: Mapping[str, View] = {}
    variables: Any = {}

    @property
    def outputs(self) -> int:
        """Pixel values of a patch."""
        return self.patch**2 * self.channels

    def labels(self, frozen, images: Images, read: jax.Array | None = None) -> jax.Array:
        (height, width), size = self.grid, self.patch
        x = normalize(images["image"], self.mean, self.std)
        x = x.reshape(-1, height, size, width, size, self.channels).swapaxes(2, 3)
        return at_tokens(x.reshape(-1, height * width, self.outputs), read)

    def guess(self, values: jax.Array) -> jax.Array:
        return values

    def loss(self, values: jax.Array, labels: jax.Array) -> jax.Array:
        """[B, M], mean over the values of a patch."""
        return jnp.square(values - labels).mean(-1)

    def scores(self, heads: tuple[jax.Array, ...], labels: jax.Array, weights: jax.Array) -> Sums:
        return {}

    def bound(self, frozen, images: Images, labels, token_nats, weight) -> Sums:
        return {}

    def pictures(self, frozen, labels: jax.Array) -> jax.Array:
        """[B, H, W, ch] in [0, 1] of labels [B, N, P * P * ch]."""
        (height, width), size = self.grid, self.patch
        x = labels.reshape(-1, height, width, size, size, self.channels).swapaxes(2, 3)
        x = x.reshape(-1, height * size, width * size, self.channels)
        mean, std = (jnp.asarray(value).reshape(1, 1, 1, -1) for value in (self.mean, self.std))
        return jnp.clip(x * std + mean, 0, 1)

    def finalize(self, sums: Sums) -> dict[str, jax.Array]:
        return mean_of_sums(sums)
