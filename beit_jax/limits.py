"""Values that no part of the package could work with, whatever the task."""

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from beit_jax.errors import UserError

ABOVE_ZERO = (
    "data.channels", "data.max_value", "data.eval_crop", "dvae.groups", "dvae.blocks_per_group",
    "dvae.width", "dvae.decoder_input", "model.patch_size", "model.width", "model.depth",
    "model.heads", "model.mlp_ratio", "eval.batch_size", "train.batch_size", "train.accumulate",
    "train.log_every", "train.checkpoint_every", "train.keep", "train.max_skipped",
    "train.max_failed_saves",
    "vqkd.codes", "vqkd.code_width", "vqkd.decoder_depth", "vqkd.kmeans_vectors", "vqkd.dead_after",
    "model.norm_epsilon", "segment.short_side",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "data.labels_per_class", "data.color_jitter", "dvae.kl_weight",
    "dvae.kl_steps", "dvae.temperature_steps", "model.layer_scale", "train.eval_every",
    "optimizer.warmup_epochs", "vqkd.kmeans", "classify.mixup", "classify.cutmix",
    "segment.classes", "segment.auxiliary_weight", "segment.auxiliary_width", "segment.stride",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
SHARES = (
    "data.flip", "data.holdout", "data.max_bad_share", "model.drop_path", "train.ema_decay",
    "vqkd.decay", "vqkd.alarm_usage", "classify.label_smoothing", "classify.mix_switch",
    "classify.erase", "segment.max_category", "segment.dropout",
)  # fmt: skip
KEYS = ABOVE_ZERO + NOT_NEGATIVE + SHARES


def check(config: ConfigDict) -> None:
    """Refuses values that no part could work with, by their key."""
    values = dict(flatten_dict(config.to_dict(), sep="."))

    def refuse(key: str, rule: str):
        raise UserError(f"config.{key}={values[key]} must be {rule}; set it so.")

    for key in ABOVE_ZERO:
        if not values[key] > 0:
            refuse(key, "above 0")
    if values["seed"] >= 2**32:
        refuse("seed", "below 2**32")
    for key in NOT_NEGATIVE:
        if not values[key] >= 0:
            refuse(key, "0 or more")
    if not values["data.workers"] >= -1:
        refuse("data.workers", "-1 (one thread a core) or more")
    for key in SHARES:
        if not 0 <= values[key] <= 1:
            refuse(key, "from 0 to 1")
    if values["model.early_layers"] and not values["model.head_layers"] > 0:
        refuse("model.head_layers", "above 0 where model.early_layers is")
    size = values["data.image_size"]
    if len(size) != 2 or min(size) < 1 or any(int(x) != x for x in size):
        refuse("data.image_size", "(height, width) in whole pixels")
    for key in ("model.mean", "model.std"):
        if len(values[key]) not in (1, values["data.channels"]):
            refuse(key, f"one number, or one for each of data.channels={values['data.channels']}")
    if not all(value > 0 for value in values["model.std"]):
        refuse("model.std", "above 0")
    for key in ("data.crop_scale", "data.crop_ratio", "segment.resize"):
        if len(values[key]) != 2 or not 0 < values[key][0] <= values[key][1]:
            refuse(key, "two rising numbers above 0")
    if values["data.crop_scale"][1] > 1:
        refuse("data.crop_scale", "two shares of at most 1")
    if not 0 <= values["data.rand_augment"] <= 10:
        refuse("data.rand_augment", "from 0 to 10")
    if values["data.rand_augment"] and values["data.channels"] not in (1, 3):
        refuse("data.rand_augment", "0 where data.channels is neither 1 nor 3")
    for key in ("eval.knn", "segment.pools"):
        if any(number < 1 or number != int(number) for number in values[key]):
            refuse(key, "whole numbers above 0")
    rates = values["probe.learning_rates"]
    if not rates or not all(rate > 0 for rate in rates):
        refuse("probe.learning_rates", "one or more numbers above 0")
    for key in ("model.dtype", "dvae.dtype"):
        if values[key] not in DTYPES:
            refuse(key, f"one of {', '.join(DTYPES)}")
