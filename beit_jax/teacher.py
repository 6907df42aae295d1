"""A frozen teacher: images to features of their patches, for a tokenizer to imitate.

One face for every network that can teach: an imported CLIP or DINO tower, and the encoder of any
run, trained here or imported.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beit_jax import checkpoint
from beit_jax.architecture import make_encoder, make_tower, patch_grid
from beit_jax.augment import normalize
from beit_jax.data.geometry import View
from beit_jax.errors import UserError

Variables = Any  # a network's collections


class Teacher(NamedTuple):
    """Pure functions of frozen weights, which are their first argument and never closed over.

    Attributes:
      variables: the weights that its features need.
      width: T, of a feature.
      grid: patches down and across, h and w.
      channels: of its images.
      view: size and interpolation of its images.
      features: `(variables, images [B, H, W, ch] in [0, 1]) -> float32 [B, h * w, T]`; it
        normalises the pixels itself, by its own mean and deviation.
    """

    variables: Variables
    width: int
    grid: tuple[int, int]
    channels: int
    view: View
    features: Callable[[Variables, jax.Array], jax.Array]


def from_weights(weights: checkpoint.Weights, named: str, dtype: str) -> Teacher:
    """The teacher of a run's folder.

    A tower gives its patch tokens as the official VQ-KD reads them: CLIP's projected, DINO's after
    the final norm. Any other encoder gives the patch tokens of its last block under a LayerNorm
    without parameters. A run's own norm is not used, as it belongs to its head: a classifier's is
    trained on the mean of the patches, not on patches.

    Args:
      weights: read by `checkpoint.load_weights` or `frozen.load`.
      named: who named them, such as "config.teacher.path", for the error sentence.
      dtype: what the network computes in; features are float32.
    """
    config = {**weights.config, "model": {**weights.config["model"], "dtype": dtype}}
    if config["task"] == "teacher":
        variables, width, read = _tower(weights.params, config)
    elif "patch_embed" in weights.params.get("encoder", {}):
        variables, width, read = _encoder(weights.params, config)
    else:
        raise UserError(
            f"{named}: {weights.source} is of task {config['task']!r} and holds no encoder; name "
            "the folder of an imported CLIP or DINO, or of a run of task mim or classify."
        )
    mean, std = config["model"]["mean"], config["model"]["std"]

    def features(variables, images):
        return read(variables, normalize(images, mean, std))

    data = config["data"]
    return Teacher(
        variables=variables,
        width=width,
        grid=patch_grid(config),
        channels=data["channels"],
        view=View(tuple(data["image_size"]), data["interpolation"]),
        features=features,
    )


def _tower(params, config):
    projection = params["projection"]["kernel"].shape[-1] if "projection" in params else 0
    tower = make_tower(config, projection)

    def read(variables, images):
        found = tower.apply(variables, images)
        return (found.projected if projection else found.tokens)[:, 1:]

    return {"params": params}, projection or config["model"]["width"], read


def _encoder(params, config):
    encoder = make_encoder(config)

    def read(variables, images):
        patches = encoder.apply(variables, images).states[-1][:, 1:].astype(jnp.float32)
        return jax.nn.standardize(patches, epsilon=encoder.norm_epsilon)

    return {"params": params["encoder"]}, encoder.width, read
