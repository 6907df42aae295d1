"""Names of Hugging Face's BEiT classes, and the way back into one of their folders.

The names are those that `save_pretrained` writes, which are older than the modules of today's
transformers. Sources: transformers/models/beit/modeling_beit.py and conversion_mapping.py, 5.23.
"""

from beit_jax.errors import UserError
from beit_jax.interop import beit, hugging_face_config, segmentation
from beit_jax.interop.family import Description, Family, Hints, Shapes
from beit_jax.interop.table import (
    LINEAR,
    Dropped,
    Rule,
    Table,
    conv,
    dense,
    norm,
    prefixed,
    renamed,
    within,
)

_LAYER, _FLAX_BLOCK = "encoder.layer.{i}", "encoder/block_{i}"
_ATTENTION, _FLAX_ATTENTION = f"{_LAYER}.attention.attention", f"{_FLAX_BLOCK}/attn"
_SHARED, _OWN = "encoder.relative_position_bias", f"{_ATTENTION}.relative_position_bias"
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"


def _projection(number: int, name: str) -> Rule:
    """Queries, keys or values, which we keep in one array."""
    flax = f"{_FLAX_ATTENTION}/qkv/kernel"
    return Rule(f"{_ATTENTION}.{name}.weight", flax, LINEAR, part=(number, 3))


ENCODER = (
    Rule("embeddings.cls_token", "encoder/cls_token"),
    Rule("embeddings.mask_token", "encoder/mask_token"),
    Rule("embeddings.position_embeddings", "encoder/pos_embed"),
    *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
    Rule(f"{_SHARED}.{_TABLE}", "encoder/relative_position_bias/table"),
    *norm(f"{_LAYER}.layernorm_before", f"{_FLAX_BLOCK}/norm1"),
    *(_projection(number, name) for number, name in enumerate(("query", "key", "value"))),
    Rule(f"{_ATTENTION}.query.bias", f"{_FLAX_ATTENTION}/q_bias"),
    Rule(f"{_ATTENTION}.value.bias", f"{_FLAX_ATTENTION}/v_bias"),
    Rule(f"{_OWN}.{_TABLE}", f"{_FLAX_ATTENTION}/relative_position_bias/table"),
    *dense(f"{_LAYER}.attention.output.dense", f"{_FLAX_ATTENTION}/proj"),
    *norm(f"{_LAYER}.layernorm_after", f"{_FLAX_BLOCK}/norm2"),
    *dense(f"{_LAYER}.intermediate.dense", f"{_FLAX_BLOCK}/mlp/fc1"),
    *dense(f"{_LAYER}.output.dense", f"{_FLAX_BLOCK}/mlp/fc2"),
    Rule(f"{_LAYER}.lambda_1", f"{_FLAX_BLOCK}/gamma_1"),
    Rule(f"{_LAYER}.lambda_2", f"{_FLAX_BLOCK}/gamma_2"),
)
DROPPED = (
    Dropped(f"{_SHARED}.{_INDEX}", "worked out again"),
    Dropped(f"{_OWN}.{_INDEX}", "worked out again"),
    Dropped("embeddings.mask_token", "only masked image modelling masks"),
)
POOLED = (*norm("pooler.layernorm", "fc_norm"), *norm("layernorm", "norm"))  # mean, cls
_PREFIX = "beit."
_DROPPED = prefixed(DROPPED, _PREFIX)

TABLES = {
    "mim": Table(
        "Hugging Face BeitForMaskedImageModeling",
        (*prefixed(ENCODER, _PREFIX), *norm("layernorm", "norm"), *dense("lm_head", "lm_head")),
        dropped=_DROPPED,
    ),
    "classify": Table(
        "Hugging Face BeitForImageClassification",
        (*prefixed(ENCODER + POOLED, _PREFIX), *dense("classifier", "head")),
        dropped=_DROPPED,
    ),
    "encoder": Table("Hugging Face BeitModel", ENCODER + POOLED, dropped=DROPPED),
    "segment": segmentation.table(
        "Hugging Face BeitForSemanticSegmentation",
        (
            *within("params", prefixed(ENCODER, _PREFIX)),
            *segmentation.pyramid_rows(""),
            *segmentation.head_rows("classifier"),
        ),
        (*_DROPPED, Dropped(f"{_PREFIX}layernorm.{{*}}", "segmentation reads states before it")),
    ),
}


def describe(task: str, head: str | None, shapes: Shapes, hints: Hints) -> Description:
    """What weights of the table of `task` are; `head` is the name of the last layer."""
    if task == "mim" and f"{_PREFIX}layernorm.weight" in shapes:
        raise UserError(
            f"the weights have {_PREFIX}layernorm beside layernorm, two norms in a row before "
            "lm_head (use_mean_pooling is false), for which the model has no place: take weights "
            "with use_mean_pooling"
        )
    table = TABLES[task]
    rules = within("params", beit.RULES) if task == "segment" else beit.RULES
    names = renamed(shapes, table.rules, rules)
    official = {new: shapes[old] for old, new in names.items()}
    config = beit.encoder_config(official, hints)
    stated, notes = hugging_face_config.read(hints, config)
    config |= stated
    outputs = shapes[f"{head}.weight"][0] if head else 0
    if task == "segment":
        taps, more = hugging_face_config.read_taps(hints, config["model.depth"])
        pools = tuple(hints.about.get("pool_scales", segmentation.POOLS))
        config |= segmentation.head_config(shapes, "classifier", pools) | {"segment.taps": taps}
        size, reduced = config["data.image_size"], hugging_face_config.reduces_labels(hints)
        config |= segmentation.evaluation_config(min(size), outputs, reduced)
        notes = (*notes, *more)
    kind = table.family.removeprefix("Hugging Face ")
    label = f"Hugging Face BEiT {beit.size_of(config)}, {kind}"
    return Description(label, task, outputs, config, notes)


def is_beit(shapes: Shapes, prefix: str) -> bool:
    """Whether the encoder's names start with `prefix`; other transformers' keys have a bias."""
    attention = f"{prefix}encoder.layer.0.attention.attention"
    needed = {f"{prefix}embeddings.cls_token", f"{attention}.query.weight"}
    return needed <= set(shapes) and f"{attention}.key.bias" not in shapes


def _family(task: str, prefix: str, head: str | None) -> Family:
    return Family(
        TABLES[task].family,
        lambda shapes: is_beit(shapes, prefix) and (not head or f"{head}.weight" in shapes),
        lambda shapes, hints: describe(task, head, shapes, hints),
        lambda config: TABLES[task],
    )


MASKED_IMAGE_MODELING = _family("mim", _PREFIX, "lm_head")
IMAGE_CLASSIFICATION = _family("classify", _PREFIX, "classifier")
SEMANTIC_SEGMENTATION = _family("segment", _PREFIX, "decode_head.classifier")
MODEL = _family("encoder", "", None)
