"""UPerNet on BEiT: semantic segmentation from four levels of the encoder.

Sources: beit/semantic_segmentation/backbone/beit.py, lines 336-350 and 429-444; Xiao et al. 2018,
Unified Perceptual Parsing; mmsegmentation 0.11's UPerHead and FCNHead.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.nn import initializers

from beit_jax.errors import UserError
from beit_jax.models.layers import TORCH_INIT
from beit_jax.models.vit import ViT, block_keys

_RELU_KERNEL = initializers.variance_scaling(2.0, "fan_out", "normal")


class Segmented(NamedTuple):
    """What the network gives; h, w is the grid of patches."""

    levels: tuple[jax.Array, ...]  # [B, *, *, D] of 4, 2, 1 and 1/2 times the grid
    logits: jax.Array | None  # float32 [B, 4h, 4w, C]; None without classes
    auxiliary: jax.Array | None  # float32 [B, h, w, C]; None without that head


class Segmenter(nn.Module):
    """The encoder under a pyramid, UPerNet's head and a small auxiliary head.

    Without classes there is only encoder and pyramid. Collections are "params" and "batch_stats",
    the running statistics of BatchNorm; training can also give "moments", see `follow`.
    """

    encoder: ViT
    classes: int
    taps: tuple[int, ...] = (4, 6, 8, 12)  # blocks below each level; 0 is the embedded image
    pools: tuple[int, ...] = (1, 2, 3, 6)
    auxiliary_width: int = 256  # 0: no auxiliary head
    dropout: float = 0.1  # share of the channels that a head's classes do not see in training

    @nn.compact
    def __call__(
        self, images: jax.Array, keys: jax.Array | None = None, train: bool = False
    ) -> Segmented:
        """Segments images.

        Args:
          images: [B, H, W, ch], normalised.
          keys: [B] random keys for stochastic depth and dropout in training, None otherwise.
          train: whether BatchNorm uses the batch's statistics, not the running ones.

        Raises:
          UserError: for taps that are not four depths of the encoder.
        """
        vit, shared = self.encoder, {"train": train, "dtype": self.encoder.dtype}
        if len(self.taps) != 4 or not all(0 <= tap <= vit.depth for tap in self.taps):
            raise UserError(
                f"config.segment.taps is {self.taps}: give four numbers of blocks, none above "
                f"config.model.depth of {vit.depth}"
            )
        encoded = vit(images, keys=keys)
        states = (encoded.embedded, *encoded.states)
        batch, height, width, _ = images.shape
        grid = (batch, height // vit.patch_size, width // vit.patch_size, vit.width)
        maps = [states[tap][:, 1:].reshape(grid) for tap in self.taps]
        levels = Pyramid(**shared, name="pyramid")(maps)
        if not self.classes:
            return Segmented(levels, None, None)

        def scores(features, head: str, number: int):
            if keys is not None and self.dropout:
                features = drop_channels(features, block_keys(keys, number), self.dropout)
            # Like all logits these stay float32.
            classes = nn.Conv(
                self.classes, (1, 1), kernel_init=initializers.normal(0.01), name=head
            )
            return classes(features.astype(jnp.float32))

        features = UPerHead(vit.width, self.pools, **shared, name="decode_head")(levels)
        logits, auxiliary = scores(features, "decode_classes", vit.depth), None
        if self.auxiliary_width:
            conv = ConvNorm(self.auxiliary_width, 3, **shared, name="auxiliary_conv")
            auxiliary = scores(conv(levels[2]), "auxiliary_classes", vit.depth + 1)
        return Segmented(levels, logits, auxiliary)


class Pyramid(nn.Module):
    """Four equal maps [B, h, w, D] -> maps of 4, 2, 1 and (rounded down) 1/2 times that size."""

    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: list[jax.Array]) -> tuple[jax.Array, ...]:
        double = partial(UpConv, dtype=self.dtype)
        x = double(name="up_0_first")(maps[0])
        x = BatchNorm(self.train, self.dtype, name="up_0_norm")(x)
        x = double(name="up_0_second")(nn.gelu(x, approximate=False))
        half = nn.max_pool(maps[3], (2, 2), strides=(2, 2))
        return x, double(name="up_1")(maps[1]), maps[2], half


class UPerHead(nn.Module):
    """Levels [B, *, *, D], largest first -> features [B, h, w, width] of the largest one's size.

    The smallest is joined with its averages over `pools` x `pools` cells; from there each level is
    added, enlarged, to the next larger one; all together make the features.
    """

    width: int
    pools: tuple[int, ...]
    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...]) -> jax.Array:
        def conv(size: int, name: str) -> ConvNorm:
            return ConvNorm(self.width, size, self.train, self.dtype, name=name)

        *finer, top = levels
        context = [
            resize(conv(1, f"pool_{i}")(average_pool(top, pool)), top.shape)
            for i, pool in enumerate(self.pools)
        ]
        sums = [conv(3, "bottleneck")(jnp.concatenate([top, *context], axis=-1))]
        for i, level in reversed(list(enumerate(finer))):
            lateral = conv(1, f"lateral_{i}")(level)
            sums.insert(0, lateral + resize(sums[0], lateral.shape))
        outputs = [conv(3, f"fpn_{i}")(x) for i, x in enumerate(sums[:-1])] + sums[-1:]
        outputs = [resize(x, outputs[0].shape) for x in outputs]
        return conv(3, "fpn_bottleneck")(jnp.concatenate(outputs, axis=-1))


class ConvNorm(nn.Module):
    """A convolution without a bias, BatchNorm and ReLU: [B, h, w, *] -> [B, h, w, width]."""

    width: int
    size: int  # of the kernel
    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, dtype = (self.size, self.size), self.dtype
        conv = nn.Conv(
            self.width, kernel, use_bias=False, kernel_init=_RELU_KERNEL, dtype=dtype, name="conv"
        )
        return nn.relu(BatchNorm(self.train, dtype, name="norm")(conv(x)))


class BatchNorm(nn.Module):
    """Normalises the channels of [B, h, w, D] by the batch's statistics, or by the running ones.

    Statistics are float32; over a sharded batch they are those of the whole batch (PyTorch's
    SyncBatchNorm). Training leaves the running ones alone and gives, in collection "moments", sums
    that add up over microbatches, from which `follow` moves them.
    """

    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        mean = running = self.variable("batch_stats", "mean", jnp.zeros, shape).value
        var = self.variable("batch_stats", "var", jnp.ones, shape).value
        scale = self.param("scale", initializers.ones, shape)
        bias = self.param("bias", initializers.zeros, shape)
        x = x.astype(jnp.float32)
        if self.train:
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - _row(mean)).mean((0, 1, 2))
            # About the running mean, which is near: squares of large means would swallow the rest.
            count, away = jnp.full(shape, x.size // x.shape[-1], jnp.float32), mean - running
            sums = jnp.stack([count, count * away, count * (var + jnp.square(away))])
            self.sow("moments", "sums", sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        gain = scale * jax.lax.rsqrt(var + 1e-5)
        return ((x - _row(mean)) * _row(gain) + _row(bias)).astype(self.dtype)


def follow(
    batch_stats: Mapping[str, Any], moments: Mapping[str, Any], momentum: float = 0.1
) -> dict[str, Any]:
    """The running statistics after an update, from the "moments" of all of its images.

    As PyTorch's BatchNorm: a share `momentum` of the way to the batch's mean and to its variance of
    n - 1 degrees of freedom.
    """
    running = flatten_dict(batch_stats)
    for (*norm, _), (count, away, square) in flatten_dict(moments).items():
        mean, var = (*norm, "mean"), (*norm, "var")
        away = away / count
        variance = (square / count - jnp.square(away)) * count / jnp.maximum(count - 1, 1)
        running[mean] = running[mean] + momentum * away
        running[var] = running[var] + momentum * (variance - running[var])
    return unflatten_dict(running)


def _row(values: jax.Array) -> jax.Array:
    """[D] as [1, 1, 1, D]."""
    return values[None, None, None]


class UpConv(nn.Module):
    """A transposed convolution of 2x2 with stride 2: [B, h, w, D] -> [B, 2h, 2w, D]."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        kernel = self.param("kernel", TORCH_INIT.weight, (2, 2, channels, channels))
        bias = self.param("bias", TORCH_INIT.bias(4 * channels), (channels,))
        # Nothing overlaps, so it is one matrix product and a change of order.
        x = jnp.einsum("bhwi,klio->bhkwlo", x.astype(self.dtype), kernel.astype(self.dtype))
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        return x + bias.astype(self.dtype)[None, None, None]


def resize(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bilinear, [B, h, w, D] -> height and width of `shape`, a [B, h, w, D] of any channels.

    PyTorch's `interpolate(align_corners=False)`: no antialiasing when shrinking.
    """
    shape = (*x.shape[:1], *shape[1:3], *x.shape[3:])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


def average_pool(x: jax.Array, cells: int) -> jax.Array:
    """Means over `cells` x `cells` boxes that cover the map: [B, h, w, D] -> [B, cells, cells, D].

    PyTorch's `adaptive_avg_pool2d`: where `cells` does not divide a side, neighbours overlap.
    """
    rows, columns = (jnp.asarray(_box_means(side, cells), x.dtype) for side in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwd->bijd", rows, columns, x)


def _box_means(side: int, cells: int) -> np.ndarray:
    """Weights [cells, side] of the mean of elements floor(i s/c) up to ceil((i + 1) s/c)."""
    number, at = np.arange(cells)[:, None], np.arange(side)[None]
    inside = (at >= number * side // cells) & (at < -(-(number + 1) * side // cells))
    return inside / inside.sum(axis=1, keepdims=True)


def drop_channels(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """x [B, h, w, D] with a share of each row's channels zeroed, drawn from keys [B] alone."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[-1:]))(keys)
    return x * (keep / (1 - rate)).astype(x.dtype)[:, None, None]
