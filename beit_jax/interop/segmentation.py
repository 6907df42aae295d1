"""Names of UPerNet on BEiT: rows that all share, and the official ADE20K checkpoints' own.

Those are mmsegmentation 0.11's: `backbone.*` is the encoder with its pyramid, `decode_head.*` and
`auxiliary_head.*` are the heads. A backbone alone, with its names as they are or without
`backbone.`, fills a network without heads.
"""

import numpy as np

from beit_jax.architecture import patch_grid
from beit_jax.errors import UserError
from beit_jax.interop import beit
from beit_jax.interop.family import IMAGENET, Description, Family, Hints, Shapes, count
from beit_jax.interop.table import (
    CONV,
    CONV_TRANSPOSED,
    Buffer,
    Rule,
    Table,
    conv,
    norm,
    prefixed,
    within,
)
from beit_jax.interop.vit import VIT

POOLS = (1, 2, 3, 6)  # of all published checkpoints
_UP = {"fpn1.0": "up_0_first", "fpn1.3": "up_0_second", "fpn2.0": "up_1"}
_PYRAMID_NORM = {"fpn1.1": "pyramid/up_0_norm"}
_CONVS = {  # convolution with BatchNorm, there and here
    "decode_head.psp_modules.{i}.1": "decode_head/pool_{i}",
    "decode_head.bottleneck": "decode_head/bottleneck",
    "decode_head.lateral_convs.{i}": "decode_head/lateral_{i}",
    "decode_head.fpn_convs.{i}": "decode_head/fpn_{i}",
    "decode_head.fpn_bottleneck": "decode_head/fpn_bottleneck",
    "auxiliary_head.convs.0": "auxiliary_conv",
}
_HEAD_NORMS = {f"{torch}.bn": f"{flax}/norm" for torch, flax in _CONVS.items()}


def pyramid_rows(prefix: str) -> tuple[Rule | Buffer, ...]:
    """Rows and buffers of the pyramid, whose foreign names start with `prefix`."""
    rows = [norm(torch, flax) for torch, flax in _PYRAMID_NORM.items()]
    for torch, flax in _UP.items():
        kernel = Rule(f"{torch}.weight", f"pyramid/{flax}/kernel", CONV_TRANSPOSED)
        rows.append((kernel, Rule(f"{torch}.bias", f"pyramid/{flax}/bias")))
    rules = within("params", (rule for row in rows for rule in row))
    return prefixed((*rules, *_statistics(_PYRAMID_NORM)), torch=prefix)


def head_rows(classes: str) -> tuple[Rule | Buffer, ...]:
    """Rows and buffers of both heads, whose last convolution is called `classes`."""
    rows = [norm(torch, flax) for torch, flax in _HEAD_NORMS.items()]
    for torch, flax in _CONVS.items():
        rows.append((Rule(f"{torch}.conv.weight", f"{flax}/conv/kernel", CONV),))
    for head in ("decode", "auxiliary"):
        rows.append(conv(f"{head}_head.{classes}", f"{head}_classes"))
    rules = within("params", (rule for row in rows for rule in row))
    return (*rules, *_statistics(_HEAD_NORMS))


def _statistics(norms: dict[str, str]) -> tuple[Rule | Buffer, ...]:
    """BatchNorm's running statistics, and PyTorch's count of batches, which ours do not need."""
    rows: list[Rule | Buffer] = []
    for torch, flax in norms.items():
        rows.append(Rule(f"{torch}.running_mean", f"{flax}/mean"))
        rows.append(Rule(f"{torch}.running_var", f"{flax}/var"))
        batches = f"{torch}.num_batches_tracked"
        rows.append(Buffer(batches, f"{flax}/mean", lambda: np.zeros((), np.int64)))
    return within("batch_stats", rows)


def head_config(shapes: Shapes, classes: str, pools: tuple[int, ...] = POOLS) -> dict:
    """What the heads' arrays say of a run's config, with the `pools` that they do not show."""
    number = count(shapes, "decode_head.psp_modules.{}.1.conv.weight")
    if number not in (0, len(pools)):
        raise UserError(
            f"the weights average over {number} kinds of cells, but {pools} are {len(pools)}: put "
            "a config.json with pool_scales beside the weights"
        )
    auxiliary = shapes.get(f"auxiliary_head.{classes}.weight", (0, 0))
    return {"segment.pools": pools, "segment.auxiliary_width": auxiliary[1]}


def evaluation_config(size: int, classes: int, reduce_zero_label: bool) -> dict:
    """How evaluation shows a network whole scenes: by windows, two thirds of one apart."""
    return {
        "segment.classes": classes,
        "segment.reduce_zero_label": reduce_zero_label,
        "segment.short_side": size,
        "segment.stride": size * 2 // 3,  # 341 of 512 and 426 of 640, as published
        "eval.batch_size": 8,
    }


_TAPS = {12: (4, 6, 8, 12), 24: (8, 12, 16, 24)}  # base and large
_CLASSES = "conv_seg"


def _table(config, prefix: str) -> Table:
    buffers = beit.official(patch_grid(config)).buffers
    rows = (
        *prefixed(within("params", (*prefixed(VIT, flax="encoder/"), *buffers)), torch=prefix),
        *pyramid_rows(prefix),
        *head_rows(_CLASSES),
    )
    return table("official BEiT segmentation", rows)


def table(family: str, rows: tuple[Rule | Buffer, ...], dropped=()) -> Table:
    """A table of rules and buffers that come mixed."""
    rules = tuple(row for row in rows if isinstance(row, Rule))
    buffers = tuple(row for row in rows if isinstance(row, Buffer))
    return Table(family, rules, buffers, dropped)


def _describe(shapes: Shapes, hints: Hints, prefix: str) -> Description:
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    config = beit.encoder_config(own, hints)
    depth = config["model.depth"]
    if depth not in _TAPS:
        raise UserError(
            f"the weights do not say which of their {depth} blocks the segmentation reads, and "
            f"{depth} is no published depth: only {' and '.join(map(str, _TAPS))} blocks are known"
        )
    mean, std = IMAGENET
    config |= head_config(shapes, _CLASSES) | {
        "segment.taps": _TAPS[depth],
        "model.mean": mean,
        "model.std": std,
        "data.interpolation": "bilinear",
        "data.eval_crop": 1.0,
    }
    note = (
        f"mean {mean}, std {std}, bilinear resizing, label maps with 0 for no class and levels "
        f"after {_TAPS[depth]} blocks are assumed, as in the official ADE20K configs"
    )
    outputs = shapes.get(f"decode_head.{_CLASSES}.weight", (0,))[0]
    config |= evaluation_config(min(config["data.image_size"]), outputs, reduce_zero_label=True)
    what = "segmentation (UPerNet)" if outputs else "segmentation backbone"
    return Description(f"BEiT {beit.size_of(config)}, {what}", "segment", outputs, config, (note,))


def _family(name: str, prefix: str) -> Family:
    needed = {f"{prefix}fpn1.0.weight", f"{prefix}blocks.0.attn.qkv.weight"}
    return Family(
        name,
        lambda shapes: needed <= set(shapes),
        lambda shapes, hints: _describe(shapes, hints, prefix),
        lambda config: _table(config, prefix),
    )


SEGMENTATION = _family("BEiT segmentation (official)", "backbone.")
BACKBONE = _family("BEiT segmentation backbone (official)", "")
