"""Names of BEiT v2's tokenizers (unilm/beit2, VQ-KD), for `models.vqkd`.

Paths are those of all the network's variables: `params/...` and `codebook/...`.
"""

from collections.abc import Mapping

import numpy as np

from beit_jax.interop.family import Description, Family, Hints, Shapes, count, half
from beit_jax.interop.table import Buffer, Dropped, Rule, Table, dense, norm, prefixed, within
from beit_jax.interop.vit import VIT, plain_config

_CODES = "quantize.embedding.weight"
PARAMS = (
    *prefixed(VIT, "encoder.", "encoder/"),
    *norm("encoder.fc_norm", "encoder_norm"),
    *dense("encode_task_layer.0", "to_code_1"),
    *dense("encode_task_layer.2", "to_code_2"),
    *prefixed(VIT, "decoder.", "decoder/"),
    *norm("decoder.fc_norm", "decoder_norm"),
    *dense("decode_task_layer.0", "to_teacher_1"),
    *dense("decode_task_layer.2", "to_teacher_2"),
)
CODEBOOK = (Rule(_CODES, "vectors"), Rule("quantize.cluster_size", "usage"))
RULES = (*within("params", PARAMS), *within("codebook", CODEBOOK))
DROPPED = (
    Dropped("teacher_model.{*}", "the teacher, which only the tokenizer's training needs"),
    Dropped("scaling_layer.{*}", "the teacher's preprocessing"),
    Dropped("loss{*}", "of the tokenizer's training"),
)


def official(codes: int, code_width: int) -> Table:
    """The table for a codebook of `codes` vectors of `code_width`.

    The official module holds three arrays more, which it demands but never updates after its
    start: two averages that it does not read, and whether the codebook has been initialised.
    """
    embedding, path = "quantize.embedding", "codebook/vectors"
    buffers = (
        Buffer(f"{embedding}.embed_avg", path, lambda: np.zeros((codes, code_width), np.float32)),
        Buffer(f"{embedding}.cluster_size", path, lambda: np.zeros(codes, np.float32)),
        Buffer(f"{embedding}.initted", path, lambda: np.ones(1, np.float32)),
    )
    return Table("official VQ-KD", RULES, buffers, DROPPED)


def _fits(shapes: Shapes) -> bool:
    return {_CODES, "encode_task_layer.0.weight"} <= set(shapes)


def _describe(shapes: Shapes, hints: Hints) -> Description:
    codes, code_width = shapes[_CODES]
    depth = count(shapes, "decoder.blocks.{}.attn.qkv.weight")
    teacher_width = shapes["decode_task_layer.2.weight"][0]
    mean, std = half(shapes["encoder.patch_embed.proj.weight"][1])
    config = plain_config(
        shapes,
        hints,
        patch="encoder.patch_embed.proj.weight",
        positions="encoder.pos_embed",
        hidden="encoder.blocks.{}.mlp.fc1.weight",
    ) | {
        "data.eval_crop": 0.875,
        "model.qkv_bias": "qv" if "encoder.blocks.0.attn.q_bias" in shapes else "none",
        "model.mean": mean,
        "model.std": std,
        "vqkd.codes": codes,
        "vqkd.code_width": code_width,
        "vqkd.decoder_depth": depth,
        "vqkd.teacher_width": teacher_width,
    }
    label = (
        f"BEiT v2 tokenizer (VQ-KD) of {codes} codes, decoder of depth {depth}, teacher's "
        f"features {teacher_width} wide"
    )
    return Description(label, "vqkd", codes, config)


def _table(config: Mapping) -> Table:
    return official(config["vqkd"]["codes"], config["vqkd"]["code_width"])


VQKD = Family("VQ-KD", _fits, _describe, _table)
