"""What the families built on plain vision transformers share: names, sizes and pixel statistics.

The names are timm's, from which BEiT, VQ-KD and DINO took theirs.
"""

from beit_jax.interop.family import Hints, Shapes, count, heads_of, square_grid, stated_size
from beit_jax.interop.table import Rule, conv, dense, norm, prefixed

_NAMES = ("cls_token", "mask_token", "pos_embed")
_BIASES, _GAINS = ("attn.q_bias", "attn.v_bias"), ("gamma_1", "gamma_2")
_TABLE = "relative_position_bias"

# Rows of a `models.layers.Block`.
BLOCK = (
    *norm("norm1", "norm1"),
    *(Rule(name, name.replace(".", "/")) for name in _BIASES + _GAINS),
    Rule(f"attn.{_TABLE}_table", f"attn/{_TABLE}/table"),
    *dense("attn.qkv", "attn/qkv"),
    *dense("attn.proj", "attn/proj"),
    *norm("norm2", "norm2"),
    *dense("mlp.fc1", "mlp/fc1"),
    *dense("mlp.fc2", "mlp/fc2"),
)
# Rows of a `models.vit.ViT`.
VIT = (
    *(Rule(name, name) for name in _NAMES),
    *conv("patch_embed.proj", "patch_embed"),
    Rule(f"rel_pos_bias.{_TABLE}_table", f"{_TABLE}/table"),
    *prefixed(BLOCK, "blocks.{i}.", "block_{i}/"),
)


def qkv_parts(torch: str, names: tuple[str, str, str], flax: str) -> tuple[Rule, ...]:
    """Rows of queries', keys' and values' layers `names` in `torch`, which are one layer at `flax`.

    All three have biases.
    """
    return tuple(
        row._replace(part=(i, 3))
        for i, name in enumerate(names)
        for row in dense(f"{torch}.{name}", flax)
    )


def plain_config(shapes: Shapes, hints: Hints, *, patch: str, positions: str, hidden: str) -> dict:
    """Config of a transformer with absolute positions and no LayerScale, from its shapes.

    Args:
      patch: name of the patch embedding's weight.
      positions: name of the position embedding.
      hidden: name of the first weight of block `{}`'s MLP.
    """
    width, channels, size, _ = shapes[patch]
    patches = shapes[positions][-2] - 1
    stated = stated_size(hints)
    if not stated or (stated[0] // size) * (stated[1] // size) != patches:
        stated = (square_grid(patches, positions) * size,) * 2
    return {
        "data.image_size": stated,
        "data.channels": channels,
        "data.interpolation": "bicubic",
        "model.patch_size": size,
        "model.width": width,
        "model.depth": count(shapes, hidden),
        "model.heads": heads_of(width, hints),
        "model.mlp_ratio": shapes[hidden.format(0)][0] / width,
        "model.positions": "absolute",
        "model.layer_scale": 0.0,
    }


def pixel_statistics(hints: Hints, published: tuple, whose: str) -> tuple[dict, tuple[str, ...]]:
    """Config of mean and deviation, and the note that they were assumed where they were."""
    stated = hints.preprocessing
    if "image_mean" in stated and "image_std" in stated:
        mean, std, notes = tuple(stated["image_mean"]), tuple(stated["image_std"]), ()
    else:
        mean, std = published
        notes = (f"mean {mean} and std {std} are assumed, as {whose} released weights have them",)
    return {"model.mean": mean, "model.std": std}, notes
