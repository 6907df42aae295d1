"""Comparing a network with numbers that another implementation gave for the same inputs.

The file is a safetensors of inputs and outputs by name, laid out as PyTorch does (images
[B, ch, H, W]). Inputs: `image` (normalised), `image01` (in [0, 1], for tokenizers), `mask` (bool
[B, N], true where masked, for masked image modelling). Every other name that a function below
returns is compared; names that it does not know are listed and left alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.architecture import make_encoder, make_network, patch_grid
from beit_jax.errors import UserError
from beit_jax.models import dvae, vqkd
from beit_jax.models.layers import LayerNorm

INPUTS = ("image", "image01", "mask")
Arrays = Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """One output beside its expected values."""

    name: str
    difference: float  # the largest absolute one; of tokens: of their numbers
    equal: float | None  # share of equal tokens; None where the output is no token

    def agrees(self, atol: float) -> bool:
        """Whether floats are within `atol`, or all tokens equal; NaN never agrees."""
        return self.difference <= atol if self.equal is None else self.equal == 1.0


def compare(
    config: Mapping, outputs: int, variables: Mapping, expected: Arrays
) -> tuple[list[Comparison], list[str]]:
    """Runs the network of `config` on the inputs in `expected` and compares every known output.

    Args:
      config: a resolved config.
      outputs: see `architecture.make_network`.
      variables: all collections of the network.
      expected: inputs and outputs by name.

    Returns:
      the comparisons, and the names that were left alone.

    Raises:
      UserError: if an input or every output is missing, or a shape is not the network's.
    """
    found = run(config, outputs, variables, expected)
    names = [name for name in expected if name in found]
    if not names:
        raise UserError(
            "the expected file holds no output of this network; it would compare "
            f"{', '.join(sorted(found))}"
        )
    comparisons = []
    for name in names:
        ours, theirs = found[name], np.asarray(expected[name])
        if ours.shape != theirs.shape:
            raise UserError(
                f"{name} in the expected file has the shape {theirs.shape}, the network gives "
                f"{ours.shape}: make the file with this network's inputs"
            )
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)
        tokens = np.issubdtype(theirs.dtype, np.integer)
        equal = float((ours == theirs).mean()) if tokens else None
        comparisons.append(Comparison(name, float(difference), equal))
    return comparisons, [name for name in expected if name not in {*names, *INPUTS}]


def run(config: Mapping, outputs: int, variables: Mapping, inputs: Arrays) -> dict[str, np.ndarray]:
    """All outputs of the network by name, in PyTorch's layouts."""
    runner: dict[str, Callable] = {
        "mim": _masked_image_model,
        "classify": _classifier,
        "encoder": _classifier,
        "teacher": _tower,
        "segment": _segmenter,
        "dvae": _dvae,
        "vqkd": _vqkd,
    }
    with jax.default_matmul_precision("highest"):
        found = runner[config["task"]](config, outputs, variables, inputs)
    return {name: np.asarray(value) for name, value in found.items()}


def _images(config: Mapping, inputs: Arrays, name: str) -> jax.Array:
    """An input of images as [B, H, W, ch], checked against what the weights were made for."""
    if name not in inputs:
        raise UserError(
            f"the expected file has no {name}, which this network needs: put the images that the "
            f"outputs are for into it as {name} [B, ch, H, W]"
        )
    images = np.asarray(inputs[name], np.float32)
    data = config["data"]
    shape = (data["channels"], *data["image_size"])
    # The dVAE is convolutional and takes any size.
    if (
        images.ndim != 4
        or not len(images)
        or (config["task"] != "dvae" and images.shape[1:] != shape)
    ):
        raise UserError(
            f"{name} in the expected file has the shape {images.shape}, the network takes "
            f"{('B', *shape)}: make the file with images of that size"
        )
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def _nchw(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


def _masked_image_model(config, outputs: int, variables, inputs: Arrays) -> dict[str, Any]:
    images = _images(config, inputs, "image")
    (height, width), rows = patch_grid(config), len(images)
    mask = np.asarray(inputs.get("mask", np.zeros((rows, height * width))), bool)
    if mask.reshape(rows, -1).shape != (rows, height * width):
        raise UserError(
            f"mask in the expected file has the shape {mask.shape}, the network takes "
            f"{(rows, height * width)}: true where a patch is masked, row by row"
        )
    mask = mask.reshape(rows, -1)
    indices = np.full((rows, max(int(mask.sum(1).max()), 1)), -1)  # rows may differ in number
    for row, masked in enumerate(mask):
        indices[row, : masked.sum()] = np.flatnonzero(masked)
    module, _ = make_network(config, outputs)
    patches = jnp.broadcast_to(jnp.arange(height * width), mask.shape)
    logits = jax.jit(module.apply)(variables, images, jnp.asarray(indices), None, patches)
    encoder = make_encoder(config)
    params = variables["params"]
    encoded = jax.jit(encoder.apply)({"params": params["encoder"]}, images, jnp.asarray(mask))
    norm = LayerNorm(epsilon=encoder.norm_epsilon)
    found = {
        "logits": logits[0],
        "masked_logits": np.asarray(logits[0])[mask],
        "encoder_output": norm.apply({"params": params["norm"]}, encoded.states[-1]),
    }
    if len(logits) > 1:
        found["cls_logits"] = logits[1]
    return found


def _classifier(config, outputs: int, variables, inputs: Arrays) -> dict[str, Any]:
    images = _images(config, inputs, "image")
    module, _ = make_network(config, outputs)
    found = {"features": jax.jit(module.clone(classes=0).apply)(variables, images)}
    if module.classes:
        found["logits"] = jax.jit(module.apply)(variables, images)
    return found


def _tower(config, outputs: int, variables, inputs: Arrays) -> dict[str, Any]:
    module, _ = make_network(config, outputs)
    features = jax.jit(module.apply)(variables, _images(config, inputs, "image"))
    patches = features.tokens[:, 1:]
    found = {"tokens": patches, "patch_tokens": patches, "cls_token": features.tokens[:, 0]}
    if features.projected is not None:
        found["projected"] = features.projected[:, 1:]
        found["projected_cls"] = features.projected[:, 0]
    return found


def _segmenter(config, outputs: int, variables, inputs: Arrays) -> dict[str, Any]:
    module, _ = make_network(config, outputs)
    found = jax.jit(module.apply)(variables, _images(config, inputs, "image"))
    return {"logits": _nchw(found.logits)}


def _dvae(config, outputs: int, variables, inputs: Arrays) -> dict[str, Any]:
    module, _ = make_network(config, outputs)
    found, tokens = {}, inputs.get("tokens")
    if "encoder" in variables["params"]:
        pixels = dvae.map_pixels(_images(config, inputs, "image01"))
        logits = jax.jit(lambda v, x: module.apply(v, x, method="encode"))(variables, pixels)
        tokens = logits.argmax(-1)
        found = {"mapped": _nchw(pixels), "z_logits": _nchw(logits), "tokens": tokens}
    elif tokens is None:
        raise UserError(
            "the expected file has no tokens, which a decoder alone needs: put the codes [B, h, w] "
            "that the outputs are for into it"
        )
    if "decoder" in variables["params"]:
        tokens = np.asarray(tokens)
        if tokens.ndim != 3 or not (0 <= tokens).all() or not (tokens < module.vocabulary).all():
            raise UserError(
                f"tokens in the expected file have the shape {tokens.shape}, from "
                f"{tokens.min(initial=0)} to {tokens.max(initial=0)}; the decoder takes [B, h, w] "
                f"from 0 to {module.vocabulary - 1}"
            )
        codes = jax.nn.one_hot(jnp.asarray(tokens), module.vocabulary)
        statistics = jax.jit(lambda v, x: module.apply(v, x, method="decode"))(variables, codes)
        means = jax.nn.sigmoid(statistics[..., : module.channels])
        found["decoder_stats"] = _nchw(statistics)
        found["reconstruction01"] = _nchw(dvae.unmap_pixels(means))
    return found


def _vqkd(config, outputs: int, variables, inputs: Arrays) -> dict[str, Any]:
    module, _ = make_network(config, outputs)
    pixels = vqkd.map_pixels(_images(config, inputs, "image01"))
    found = jax.jit(module.apply)(variables, pixels)
    rows, codes = len(pixels), found.quantized.codes
    return {
        "preprocessed": _nchw(pixels),
        "z": found.z.reshape(rows, -1, found.z.shape[-1]),
        "tokens": found.quantized.tokens.reshape(rows, -1),
        "quantized": _nchw(codes),
        "reconstruction": found.features,
    }
