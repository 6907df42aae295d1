"""Where an encoder looks: attention maps of its last block, as pictures beside the images."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from beit_jax.architecture import make_encoder
from beit_jax.augment import normalize, to_unit
from beit_jax.errors import UserError
from beit_jax.pictures import picture_rows

# Of what flax can record, all that attention weights are made of.
RECORDED = ("qkv", "relative_position_bias")


def make_evaluator(config: Mapping) -> Callable:
    """A task's evaluator of `config.eval.attention`: the images, and a row for each of the heads.

    Raises:
      UserError: for a head that the encoder does not have.
    """
    heads, known = config["eval"]["attention"], config["model"]["heads"]
    if not all(0 <= head < known for head in heads):
        raise UserError(
            f"config.eval.attention={tuple(heads)} names heads that the encoder does not have; it "
            f"has {known}: 0 is the first and {known - 1} the last."
        )
    draw = jax.jit(make_maps(config))

    def evaluator(weights, batches):
        batch = next(batches(config["data"]["eval_split"]))
        maps = draw(weights.params["encoder"], batch["image"])[:, jnp.array(heads)]
        brightest = maps.max((2, 3), keepdims=True)
        size = batch["image"].shape[1:3]
        shown = jax.image.resize(maps / brightest, (*maps.shape[:2], *size), "nearest")[..., None]
        rows = (shown[:, i] for i in range(len(heads)))
        return {}, {"attention": picture_rows(to_unit(batch["image"]), *rows)}

    return evaluator


def make_maps(config: Mapping) -> Callable[[dict, jax.Array], jax.Array]:
    """Returns `(encoder params, uint8 images [B, H, W, ch]) -> float32 [B, heads, h, w]`.

    For each head of the last block, the share of the patches' attention that a patch gets, on
    average over all patches that look. What goes to CLS is left out.
    """
    encoder, last = make_encoder(config), f"block_{config['model']['depth'] - 1}"
    pixels, size = (config["model"]["mean"], config["model"]["std"]), config["model"]["patch_size"]

    def maps(params, images):
        _, recorded = encoder.apply(
            {"params": params},
            normalize(images, *pixels),
            capture_intermediates=lambda module, _: module.name in RECORDED,
        )
        found = recorded["intermediates"]
        grid = (images.shape[1] // size, images.shape[2] // size)
        heads, length = config["model"]["heads"], 1 + grid[0] * grid[1]
        weights = _weights(params[last]["attn"], found, last, heads, length)
        return weights[:, :, 1:, 1:].mean(2).reshape(*weights.shape[:2], *grid)

    return maps


def _weights(params, found, last: str, heads: int, length: int) -> jax.Array:
    """Attention float32 [B, heads, L, L] of the last block, query first, as `models.layers` does.

    Args:
      params: the block's attention's.
      found: what flax recorded of the encoder.
      last: the block's name.
      heads: their number.
      length: tokens, behind which there may be padding.
    """
    inside = found[last]["attn"]
    (qkv,) = inside["qkv"]["__call__"]
    q, k, _ = jnp.split(qkv[:, :length], 3, axis=-1)
    if "q_bias" in params:
        q = q + params["q_bias"].astype(q.dtype)[None, None]
    q, k = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    for place in (found, inside):  # the bias that blocks share, and the block's own
        if "relative_position_bias" in place:
            (bias,) = place["relative_position_bias"]["__call__"]
            logits = logits + bias[None]
    return jax.nn.softmax(logits, axis=-1)
