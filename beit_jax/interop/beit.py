"""Names of Microsoft's BEiT checkpoints (unilm/beit): pre-training and fine-tuning.

Both share one table; which parts are wanted follows from the model. `patch_embed.proj`, `lm_head`
and so on are the official names, `encoder/...` those of `models.beit`.
"""

import numpy as np

from beit_jax.interop.table import CONV, LINEAR, Buffer, Rule, Table
from beit_jax.models.layers import relative_position_index


def _dense(torch: str, flax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{flax}/kernel", LINEAR), Rule(f"{torch}.bias", f"{flax}/bias")


def _norm(torch: str, flax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{flax}/scale"), Rule(f"{torch}.bias", f"{flax}/bias")


def _same(torch: str, flax: str, *names: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{torch}{name}", f"{flax}/{name}") for name in names)


_BLOCK, _FLAX_BLOCK = "blocks.{i}", "encoder/block_{i}"
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
_SHARED_BIAS = "encoder/relative_position_bias/table"
_BLOCK_BIAS = f"{_FLAX_BLOCK}/attn/relative_position_bias/table"

RULES = (
    *_same("", "encoder", "cls_token", "mask_token", "pos_embed"),
    Rule("patch_embed.proj.weight", "encoder/patch_embed/kernel", CONV),
    Rule("patch_embed.proj.bias", "encoder/patch_embed/bias"),
    Rule(f"rel_pos_bias.{_TABLE}", _SHARED_BIAS),
    *_norm(f"{_BLOCK}.norm1", f"{_FLAX_BLOCK}/norm1"),
    *_same(f"{_BLOCK}.attn.", f"{_FLAX_BLOCK}/attn", "q_bias", "v_bias"),
    Rule(f"{_BLOCK}.attn.{_TABLE}", _BLOCK_BIAS),
    Rule(f"{_BLOCK}.attn.qkv.weight", f"{_FLAX_BLOCK}/attn/qkv/kernel", LINEAR),
    *_dense(f"{_BLOCK}.attn.proj", f"{_FLAX_BLOCK}/attn/proj"),
    *_norm(f"{_BLOCK}.norm2", f"{_FLAX_BLOCK}/norm2"),
    *_dense(f"{_BLOCK}.mlp.fc1", f"{_FLAX_BLOCK}/mlp/fc1"),
    *_dense(f"{_BLOCK}.mlp.fc2", f"{_FLAX_BLOCK}/mlp/fc2"),
    *_same(f"{_BLOCK}.", _FLAX_BLOCK, "gamma_1", "gamma_2"),
    *_norm("norm", "norm"),  # pre-training, and classifiers that read CLS
    *_dense("lm_head", "lm_head"),
    *_norm("fc_norm", "fc_norm"),  # classifiers that read the mean of the patches
    *_dense("head", "head"),
)


def official(grid: tuple[int, int]) -> Table:
    """The table for a model of `grid` (h, w) patches, which its index buffers depend on."""

    def index() -> np.ndarray:
        return np.asarray(relative_position_index(grid), np.int64)

    buffers = (
        Buffer(f"rel_pos_bias.{_INDEX}", _SHARED_BIAS, index),
        Buffer(f"{_BLOCK}.attn.{_INDEX}", _BLOCK_BIAS, index),
    )
    return Table("official BEiT", RULES, buffers)
