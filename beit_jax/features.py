"""Frozen features: one extractor behind k-NN, the linear probes and the Python API.

from beit_jax import features
encoder = features.load("runs/mim_base")
vectors = encoder(images)  # uint8 [B, H, W, channels] -> float32 [B, D]
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import checkpoint
from beit_jax.architecture import make_encoder
from beit_jax.augment import normalize
from beit_jax.data.geometry import View, center_box, resize
from beit_jax.errors import UserError

POOLINGS = ("cls", "mean")


def make_extractor(config: Mapping) -> Callable[[dict, jax.Array], dict[str, jax.Array]]:
    """Returns `(encoder params, uint8 images [B, H, W, ch]) -> {pooling: float32 [B, blocks, D]}`.

    Features are the states after every block, before any norm: the mean of the patches, and CLS
    (official: run_linear_eval.py).
    """
    encoder = make_encoder(config)
    pixels = config["model"]["mean"], config["model"]["std"]

    def extract(params, images):
        states = encoder.apply({"params": params}, normalize(images, *pixels)).states
        mean = [state[:, 1:].mean(1, dtype=jnp.float32) for state in states]
        cls = [state[:, 0].astype(jnp.float32) for state in states]
        return {"mean": jnp.stack(mean, axis=1), "cls": jnp.stack(cls, axis=1)}

    return extract


class Encoder:
    """A trained encoder as a function of NumPy images, with its own preprocessing."""

    def __init__(self, weights: checkpoint.Weights):
        if "patch_embed" not in weights.params.get("encoder", {}):
            raise UserError(
                f"{weights.source} holds no encoder; name a run of task mim or classify."
            )
        self.config = weights.config
        self._params = jax.device_put(weights.params["encoder"])
        self._extract = jax.jit(make_extractor(weights.config))

    def __call__(self, images: np.ndarray, *, block: int = -1, pooling: str = "mean") -> np.ndarray:
        """Features of images of any size.

        Args:
          images: uint8 [B, H, W, channels]; resized and centre-cropped as in evaluation.
          block: which block's output, 0 the first, -1 the last.
          pooling: "mean" of the patches, or "cls".

        Returns:
          float32 [B, D].
        """
        data, depth = self.config["data"], self.config["model"]["depth"]
        images = np.asarray(images)
        if pooling not in POOLINGS or not -depth <= block < depth:
            raise UserError(
                f"block={block} and pooling={pooling!r} are not all known; the encoder has "
                f"{depth} blocks, and pooling is one of {', '.join(POOLINGS)}."
            )
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != data["channels"]:
            raise UserError(
                f"images are {images.dtype} {images.shape}; the encoder reads uint8 "
                f"[B, H, W, {data['channels']}]."
            )
        view = View(tuple(data["image_size"]), data["interpolation"])
        box = center_box(*images.shape[1:3], view.size, data["eval_crop"])
        crop = [resize(image, view, box) for image in images]
        return np.asarray(self._extract(self._params, np.stack(crop))[pooling][:, block])


def load(path: str) -> Encoder:
    """Loads the encoder of a run's folder, or of one of its `checkpoints/<step>` folders."""
    return Encoder(checkpoint.load_weights(str(path), "features.load: path"))
