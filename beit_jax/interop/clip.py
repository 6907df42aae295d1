"""Names of CLIP's vision tower, for `models.teachers`: OpenAI's and Hugging Face's.

Either has a beginning of its own in the whole CLIP, and lacks it in a tower that was cut out.
"""

from functools import partial
from typing import NamedTuple

from beit_jax.interop.family import Description, Family, Hints, Shapes
from beit_jax.interop.table import CONV, LINEAR, Dropped, Rule, Table, Transform, dense, norm
from beit_jax.interop.vit import pixel_statistics, plain_config, qkv_parts

MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_VECTOR = Transform(lambda array: array.reshape(1, 1, -1), lambda array: array.reshape(-1))
_ROWS = Transform(lambda array: array[None], lambda array: array[0])
_TEXT = "the text tower"
_BLOCK = "encoder/block_{i}"


def _openai(start: str) -> Table:
    """OpenAI's names, which begin with `start` in the vision tower."""
    block = f"{start}transformer.resblocks.{{i}}"
    rules = (
        Rule(f"{start}class_embedding", "encoder/cls_token", _VECTOR),
        Rule(f"{start}positional_embedding", "encoder/pos_embed", _ROWS),
        Rule(f"{start}conv1.weight", "encoder/patch_embed/kernel", CONV),
        *norm(f"{start}ln_pre", "encoder/norm_pre"),
        *norm(f"{block}.ln_1", f"{_BLOCK}/norm1"),
        Rule(f"{block}.attn.in_proj_weight", f"{_BLOCK}/attn/qkv/kernel", LINEAR),
        Rule(f"{block}.attn.in_proj_bias", f"{_BLOCK}/attn/qkv/bias"),
        *dense(f"{block}.attn.out_proj", f"{_BLOCK}/attn/proj"),
        *norm(f"{block}.ln_2", f"{_BLOCK}/norm2"),
        *dense(f"{block}.mlp.c_fc", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{block}.mlp.c_proj", f"{_BLOCK}/mlp/fc2"),
        *norm(f"{start}ln_post", "norm"),
        Rule(f"{start}proj", "projection/kernel"),
    )
    text = ("transformer.{*}", "token_embedding.weight", "positional_embedding", "ln_final.{*}")
    text += ("text_projection", "logit_scale", "context_length", "vocab_size", "input_resolution")
    dropped = tuple(Dropped(name, _TEXT) for name in text) if start else ()
    return Table("OpenAI CLIP", rules, dropped=dropped)


def _hugging_face(start: str) -> Table:
    """Hugging Face's names (CLIPModel, CLIPVisionModelWithProjection, CLIPVisionModel)."""
    block = f"{start}encoder.layers.{{i}}"
    rules = (
        Rule(f"{start}embeddings.class_embedding", "encoder/cls_token", _VECTOR),
        Rule(f"{start}embeddings.position_embedding.weight", "encoder/pos_embed", _ROWS),
        Rule(f"{start}embeddings.patch_embedding.weight", "encoder/patch_embed/kernel", CONV),
        *norm(f"{start}pre_layrnorm", "encoder/norm_pre"),  # their spelling
        *norm(f"{block}.layer_norm1", f"{_BLOCK}/norm1"),
        *qkv_parts(f"{block}.self_attn", ("q_proj", "k_proj", "v_proj"), f"{_BLOCK}/attn/qkv"),
        *dense(f"{block}.self_attn.out_proj", f"{_BLOCK}/attn/proj"),
        *norm(f"{block}.layer_norm2", f"{_BLOCK}/norm2"),
        *dense(f"{block}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{block}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
        *norm(f"{start}post_layernorm", "norm"),
        Rule("visual_projection.weight", "projection/kernel", LINEAR),
    )
    text = ("text_model.{*}", "text_projection.weight", "logit_scale")
    dropped = (
        *(Dropped(name, _TEXT) for name in text),
        Dropped(f"{start}embeddings.position_ids", "0, 1, 2, ..."),
    )
    return Table("Hugging Face CLIP", rules, dropped=dropped)


class _Names(NamedTuple):
    """Where a layout says its sizes."""

    token: str
    positions: str
    patch: str
    hidden: str  # the first layer of block `{}`'s MLP
    projection: str
    axis: int  # of the projection, its outputs'


def _describe(names: _Names, shapes: Shapes, hints: Hints) -> Description:
    about = hints.about.get("vision_config", hints.about)  # of a whole CLIP, or of the tower
    hints = hints._replace(about=about)
    statistics, notes = pixel_statistics(hints, MEAN_STD, "CLIP's")
    config = plain_config(
        shapes,
        hints,
        patch=names.patch,
        positions=names.positions,
        hidden=names.hidden,
    )
    config |= statistics | {
        "data.eval_crop": 1.0,
        "model.pooling": "cls",
        "model.qkv_bias": "qkv",
        "model.activation": about.get("hidden_act", "quick_gelu"),
        "model.norm_epsilon": about.get("layer_norm_eps", 1e-5),
        "model.norm_pre": True,
        "model.patch_bias": False,
    }
    outputs = shapes[names.projection][names.axis] if names.projection in shapes else 0
    size = f"{config['model.width']} wide, patches of {config['model.patch_size']}"
    return Description(f"CLIP vision tower, {size}", "teacher", outputs, config, notes)


def _family(name: str, names: _Names, table: Table) -> Family:
    needed = {names.token, names.positions, names.hidden.format(0)}
    return Family(
        name, lambda shapes: needed <= set(shapes), partial(_describe, names), lambda _: table
    )


def _openai_family(name: str, start: str) -> Family:
    names = _Names(
        token=f"{start}class_embedding",
        positions=f"{start}positional_embedding",
        patch=f"{start}conv1.weight",
        hidden=f"{start}transformer.resblocks.{{}}.mlp.c_fc.weight",
        projection=f"{start}proj",
        axis=1,
    )
    return _family(name, names, _openai(start))


def _hugging_face_family(name: str, start: str) -> Family:
    names = _Names(
        token=f"{start}embeddings.class_embedding",
        positions=f"{start}embeddings.position_embedding.weight",
        patch=f"{start}embeddings.patch_embedding.weight",
        hidden=f"{start}encoder.layers.{{}}.mlp.fc1.weight",
        projection="visual_projection.weight",
        axis=0,
    )
    return _family(name, names, _hugging_face(start))


CLIP = _openai_family("CLIP (OpenAI)", "visual.")
CLIP_TOWER = _openai_family("CLIP's vision tower (OpenAI)", "")
HF_CLIP = _hugging_face_family("CLIP (Hugging Face)", "vision_model.")
HF_CLIP_TOWER = _hugging_face_family("CLIP's vision tower (Hugging Face)", "")
