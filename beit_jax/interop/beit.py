"""Names of Microsoft's BEiT checkpoints (unilm/beit): pre-training and fine-tuning.

Both share one table; which parts are wanted follows from the model. `patch_embed.proj`, `lm_head`
and so on are the official names, `encoder/...` those of `models.beit`.
"""

import re

import numpy as np

from beit_jax.architecture import patch_grid
from beit_jax.data.geometry import INTERPOLATIONS
from beit_jax.errors import UserError
from beit_jax.interop.family import (
    IMAGENET,
    Description,
    Family,
    Hints,
    Shapes,
    count,
    half,
    heads_of,
    square_grid,
    stated_size,
)
from beit_jax.interop.table import Buffer, Table, dense, norm, prefixed
from beit_jax.interop.vit import BLOCK, VIT
from beit_jax.models.positions import relative_position_index, relative_position_rows

_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
_SHARED_BIAS = "encoder/relative_position_bias/table"
_BLOCK_BIAS = "encoder/block_{i}/attn/relative_position_bias/table"
_CLS_BLOCK_BIAS = "cls_block_{j}/attn/relative_position_bias/table"

RULES = (
    *prefixed(VIT, flax="encoder/"),
    *norm("norm", "norm"),  # pre-training, and classifiers that read CLS
    *dense("lm_head", "lm_head"),
    *prefixed(BLOCK, "cls_pt_layers.{j}.", "cls_block_{j}/"),  # BEiT v2's CLS branch
    *norm("cls_pt_norm", "cls_norm"),
    *dense("cls_pt_lm_head", "cls_lm_head"),
    *norm("fc_norm", "fc_norm"),  # classifiers that read the mean of the patches
    *dense("head", "head"),
)


def official(grid: tuple[int, int]) -> Table:
    """The table for a model of `grid` (h, w) patches, which its index buffers depend on."""

    def index() -> np.ndarray:
        return np.asarray(relative_position_index(grid), np.int64)

    buffers = (
        Buffer(f"rel_pos_bias.{_INDEX}", _SHARED_BIAS, index),
        Buffer(f"blocks.{{i}}.attn.{_INDEX}", _BLOCK_BIAS, index),
        Buffer(f"cls_pt_layers.{{j}}.attn.{_INDEX}", _CLS_BLOCK_BIAS, index),
    )
    return Table("official BEiT", RULES, buffers)


def _fits(shapes: Shapes) -> bool:
    needed = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    # Other vision transformers have a bias on the keys too; a pyramid is for segmentation.
    foreign = {"blocks.0.attn.qkv.bias", "fpn1.0.weight"}
    return needed <= set(shapes) and not foreign & set(shapes)


def encoder_config(shapes: Shapes, hints: Hints) -> dict:
    """What the encoder's arrays, under their official names, say of a run's config."""
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    depth = count(shapes, "blocks.{}.attn.qkv.weight")
    # Of any block, so that one that lacks it is a shortfall and not another architecture.
    layer_scale, qv_bias = (
        any(re.fullmatch(rf"blocks\.[0-9]+\.{name}", other) for other in shapes)
        for name in ("gamma_1", r"attn\.q_bias")
    )
    config = {
        "data.channels": channels,
        "model.patch_size": patch,
        "model.width": width,
        "model.depth": depth,
        "model.mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "model.layer_scale": (0.1 if depth < 24 else 1e-5) if layer_scale else 0.0,
        "model.qkv_bias": "qv" if qv_bias else "none",
        "model.pooling": "mean" if "fc_norm.weight" in shapes else "cls",
    }
    return config | _positions(shapes, hints, width, patch)


def size_of(config: dict) -> str:
    """A word or two for people."""
    width, depth = config["model.width"], config["model.depth"]
    return SIZES.get((width, depth), f"of width {width} and {depth} blocks")


def _describe(shapes: Shapes, hints: Hints) -> Description:
    config = encoder_config(shapes, hints)
    config |= _branch(shapes, hints, config["model.depth"])
    preprocessing, notes = _preprocessing(shapes, hints, config)
    task, head = next(
        ((task, head) for task, head in HEADS.items() if f"{head}.weight" in shapes),
        ("encoder", None),
    )
    outputs = shapes[f"{head}.weight"][0] if head else 0
    what = {"mim": "masked image modelling", "classify": "classifier", "encoder": "bare encoder"}
    label = f"BEiT {size_of(config)}, {what[task]}"
    return Description(label, task, outputs, config | preprocessing, notes)


HEADS = {"mim": "lm_head", "classify": "head"}
SIZES = {(768, 12): "base", (1024, 24): "large", (1280, 32): "huge", (1408, 40): "giant"}


def _positions(shapes: Shapes, hints: Hints, width: int, patch: int) -> dict:
    """How the weights know where patches stand, on which grid, and with how many heads."""
    shared = shapes.get(f"rel_pos_bias.{_TABLE}")
    own = shapes.get(f"blocks.0.attn.{_TABLE}")
    kinds = [
        kind
        for kind, there in (
            ("absolute", "pos_embed" in shapes),
            ("relative", own),
            ("shared_relative", shared),
        )
        if there
    ]
    if not kinds:
        raise UserError(
            "the weights hold neither pos_embed nor relative position tables, without which BEiT "
            "does not know where a patch stands: take the checkpoint before they were stripped"
        )
    table = shared or own
    size = stated_size(hints)
    if size and all(pixels % patch == 0 for pixels in size):
        grid = (size[0] // patch, size[1] // patch)
    else:
        grid = None
    fits = grid and (
        relative_position_rows(grid) == table[0]
        if table
        else grid[0] * grid[1] + 1 == shapes["pos_embed"][1]
    )
    if not fits:
        if table:
            side = (square_grid(table[0] - 3, "the relative position table") + 1) // 2
        else:
            side = square_grid(shapes["pos_embed"][1] - 1, "pos_embed")
        grid = (side, side)
    return {
        "model.positions": "+".join(kinds),
        "model.heads": table[1] if table else heads_of(width, hints),
        "data.image_size": (grid[0] * patch, grid[1] * patch),
    }


def _branch(shapes: Shapes, hints: Hints, depth: int) -> dict:
    """BEiT v2's CLS branch, whose start no tensor shows."""
    blocks = count(shapes, "cls_pt_layers.{}.attn.qkv.weight")
    if not blocks:
        return {}
    early = hints.early_layers or hints.arguments.get("early_layers") or EARLY_LAYERS.get(depth)
    if early is None:
        raise UserError(
            f"the weights have a CLS branch of {blocks} blocks, but do not say after which of the "
            f"{depth} blocks it takes its patches, and {depth} is no published depth: give "
            "--early-layers"
        )
    return {
        "model.early_layers": early,
        "model.head_layers": blocks,
        "model.shared_head": "cls_pt_lm_head.weight" not in shapes,
    }


EARLY_LAYERS = {12: 9, 24: 21}  # beit2/run_beitv2_pretraining.py and its README


def _preprocessing(shapes: Shapes, hints: Hints, encoder: dict) -> tuple[dict, tuple]:
    """Pixel statistics and crop, from what lies beside the weights or from the released recipes."""
    timm = hints.about.get("pretrained_cfg", {})
    usual = 0.875 if encoder["data.image_size"][0] < 384 else 1.0
    interpolation = timm.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"config.json beside the weights says interpolation={interpolation}, but images are "
            f"resized only with {', '.join(INTERPOLATIONS)}: change it there"
        )
    config = {
        "data.eval_crop": float(timm.get("crop_pct") or usual),
        "data.interpolation": interpolation,
    }
    if "mean" in timm and "std" in timm:
        return config | {"model.mean": tuple(timm["mean"]), "model.std": tuple(timm["std"])}, ()
    channels = encoder["data.channels"]
    imagenet = hints.arguments.get("imagenet_default_mean_and_std")
    if imagenet is not None:
        mean, std = IMAGENET if imagenet else half(channels)
        return config | {"model.mean": mean, "model.std": std}, ()
    v2 = str(hints.about.get("architecture", "")).startswith("beitv2")
    v2 = v2 or "cls_pt_layers.0.attn.qkv.weight" in shapes
    mean, std = IMAGENET if v2 else half(channels)
    whose = (
        "BEiT v2's released weights have them"
        if v2
        else (
            "BEiT's first released weights have them, which nothing tells from BEiT v2's and from "
            f"recipes with ImageNet's {IMAGENET[0]} and {IMAGENET[1]}"
        )
    )
    note = (
        f"mean {mean} and std {std} are assumed, as {whose}; for others change model.mean and "
        "model.std in config.json"
    )
    return config | {"model.mean": mean, "model.std": std}, (note,)


BEIT = Family(
    "BEiT (official or timm)",
    _fits,
    _describe,
    lambda config: official(patch_grid(config)),
)
