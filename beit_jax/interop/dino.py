"""Names of DINO's vision transformers, for `models.teachers`: the official ones, Hugging Face's.

The official names begin with `backbone.`, `module.` or both, according to which file they are from.
"""

from functools import partial

from beit_jax.interop.family import IMAGENET, Description, Family, Hints, Shapes
from beit_jax.interop.table import Dropped, Rule, Table, conv, dense, norm, prefixed
from beit_jax.interop.vit import VIT, pixel_statistics, plain_config, qkv_parts

_BLOCK = "encoder/block_{i}"


def _official(start: str) -> Table:
    head = f"{start.removesuffix('backbone.')}head.{{*}}"
    return Table(
        "DINO",
        (*prefixed(VIT, start, "encoder/"), *norm(f"{start}norm", "norm")),
        dropped=(Dropped(head, "the head of DINO's own training"),),
    )


def _hugging_face() -> Table:
    block = "encoder.layer.{i}"
    attention = f"{block}.attention.attention"
    rows = (
        Rule("embeddings.cls_token", "encoder/cls_token"),
        Rule("embeddings.position_embeddings", "encoder/pos_embed"),
        *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
        *norm(f"{block}.layernorm_before", f"{_BLOCK}/norm1"),
        *qkv_parts(attention, ("query", "key", "value"), f"{_BLOCK}/attn/qkv"),
        *dense(f"{block}.attention.output.dense", f"{_BLOCK}/attn/proj"),
        *norm(f"{block}.layernorm_after", f"{_BLOCK}/norm2"),
        *dense(f"{block}.intermediate.dense", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{block}.output.dense", f"{_BLOCK}/mlp/fc2"),
        *norm("layernorm", "norm"),
    )
    dropped = (Dropped("pooler.{*}", "the pooler, which DINO does not train"),)
    return Table("Hugging Face ViT", rows, dropped=dropped)


def _describe(shapes: Shapes, hints: Hints, *, label: str, epsilon: float, **names) -> Description:
    statistics, notes = pixel_statistics(hints, IMAGENET, "DINO's")
    config = plain_config(shapes, hints, **names)
    config |= statistics | {
        "data.eval_crop": 0.875,
        "model.pooling": "cls",
        "model.qkv_bias": "qkv",
        "model.norm_epsilon": hints.about.get("layer_norm_eps", epsilon),
    }
    size = f"{config['model.width']} wide, patches of {config['model.patch_size']}"
    return Description(f"{label}, {size}", "teacher", 0, config, notes)


def _official_family(start: str) -> Family:
    needed = {f"{start}{name}" for name in ("pos_embed", "blocks.0.attn.qkv.bias", "norm.weight")}
    # Supervised transformers of timm have a head of classes, later ones LayerScale.
    others = {f"{start}{name}" for name in ("head.weight", "blocks.0.ls1.gamma")}
    describe = partial(
        _describe,
        label="DINO",
        epsilon=1e-6,
        patch=f"{start}patch_embed.proj.weight",
        positions=f"{start}pos_embed",
        hidden=f"{start}blocks.{{}}.mlp.fc1.weight",
    )
    return Family(
        f"DINO ({start}*)" if start else "DINO",
        lambda shapes: needed <= set(shapes) and not others & set(shapes),
        describe,
        lambda _: _official(start),
    )


DINO, DINO_BACKBONE, DINO_MODULE, DINO_MODULE_BACKBONE = (
    _official_family(start) for start in ("", "backbone.", "module.", "module.backbone.")
)
_POSITIONS = "embeddings.position_embeddings"
_KEY_BIAS = "encoder.layer.0.attention.attention.key.bias"  # which BEiT lacks
HF_DINO = Family(
    "DINO (Hugging Face's ViTModel)",
    lambda shapes: {_POSITIONS, _KEY_BIAS, "layernorm.weight"} <= set(shapes),
    partial(
        _describe,
        label="ViT (taken for DINO)",
        epsilon=1e-12,
        patch="embeddings.patch_embeddings.projection.weight",
        positions=_POSITIONS,
        hidden="encoder.layer.{}.intermediate.dense.weight",
    ),
    lambda _: _hugging_face(),
)
