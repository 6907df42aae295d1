"""Hugging Face's config.json and preprocessor_config.json of BEiT, read and written.

Sources: transformers/models/beit/configuration_beit.py and image_processing_beit.py, 5.23.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from beit_jax.data.geometry import INTERPOLATIONS
from beit_jax.errors import UserError
from beit_jax.interop.family import Hints, half

_INTERPOLATION = {int(method): name for name, method in INTERPOLATIONS.items()}  # Pillow's numbers
_RESAMPLE = {name: number for number, name in _INTERPOLATION.items()}
_EPSILON = 1e-12  # BeitConfig's default, which the published weights have too
_ACTIVATIONS = ("gelu", "quick_gelu")  # called alike on both sides
_CLASSES = {
    "mim": "BeitForMaskedImageModeling",
    "classify": "BeitForImageClassification",
    "encoder": "BeitModel",
    "segment": "BeitForSemanticSegmentation",
}
# Where base and large were published to read the levels of segmentation.
_OUT_INDICES = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}


def read(hints: Hints, encoder: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the two files say beyond the tensors: dotted keys, and what was assumed.

    Args:
      hints: with the files' contents, empty where there is no file.
      encoder: dotted keys that the tensors have told.
    """
    about, notes = hints.about, []
    activation = about.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"config.json says hidden_act={activation!r}, but the model knows only "
            f"{' and '.join(_ACTIVATIONS)}: there is no way to import these weights"
        )
    if "layer_norm_eps" not in about:
        notes.append(
            f"norm_epsilon is assumed to be {_EPSILON}, as in Hugging Face's published weights, "
            "since no config.json lies beside the weights"
        )
    config = {
        "model.activation": activation,
        "model.norm_epsilon": about.get("layer_norm_eps", _EPSILON),
    }
    if encoder["model.layer_scale"]:
        initial = about.get("layer_scale_init_value", encoder["model.layer_scale"])
        config["model.layer_scale"] = initial
    height, width = encoder["data.image_size"]
    if height != width:
        notes.append(
            f"positions are read row by row for images of {height}x{width} pixels, where "
            "transformers itself resizes them as if rows and columns were the other way round"
        )
    channels = encoder["data.channels"]
    pixels, more = _read_preprocessing(hints.preprocessing, (height, width), channels)
    return config | pixels, (*notes, *more)


def read_taps(hints: Hints, depth: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The blocks below segmentation's levels, which no tensor shows, and what was assumed."""
    stated = hints.about.get("out_indices")
    if stated is None and depth not in _OUT_INDICES:
        raise UserError(
            f"the weights do not say which of their {depth} blocks the segmentation reads: put "
            "their config.json beside them"
        )
    # Its states are counted from 1, and the first is the embedded image.
    taps = tuple(index - 1 for index in stated or _OUT_INDICES[depth])
    if stated is not None:
        return taps, ()
    note = (
        f"levels after {', '.join(map(str, taps))} blocks are assumed, as in Hugging Face's "
        "published weights of this depth, since no config.json lies beside the weights"
    )
    return taps, (note,)


def reduces_labels(hints: Hints) -> bool:
    """Whether label maps hold 0 for no class; the flag had a shorter name once."""
    about = hints.preprocessing
    return bool(about.get("do_reduce_labels", about.get("reduce_labels", False)))


def _read_preprocessing(
    about: Mapping, size: tuple[int, int], channels: int
) -> tuple[dict, list[str]]:
    """How pixels become the network's input: dotted keys, and what was assumed."""
    usual = half(channels)
    mean, std = about.get("image_mean", usual[0]), about.get("image_std", usual[1])
    if not about.get("do_normalize", True):
        mean, std = 0.0, 1.0
    factor = about.get("rescale_factor", 1 / 255) if about.get("do_rescale", True) else 1.0
    scale = 255 * factor  # from pixels in [0, 1] to those that mean and std are for
    resample = about.get("resample", 3)
    if resample not in _INTERPOLATION:
        raise UserError(
            f"preprocessor_config.json says resample={resample}, but images are resized only with "
            f"{', '.join(f'{number} ({name})' for number, name in _INTERPOLATION.items())}: "
            "change that number there"
        )
    config = {
        "model.mean": tuple(value / scale for value in _several(mean)),
        "model.std": tuple(value / scale for value in _several(std)),
        "data.interpolation": _INTERPOLATION[resample],
        "data.eval_crop": 1.0,
    }
    if about:
        share, notes = _read_crop(about, size)
        return config | {"data.eval_crop": share}, notes
    return config, [
        f"mean {usual[0]}, std {usual[1]} and bicubic resizing of the whole image are assumed, "
        "BeitImageProcessor's defaults, since no preprocessor_config.json lies beside the weights"
    ]


def _read_crop(about: Mapping, size: tuple[int, int]) -> tuple[float, list[str]]:
    """The centre crop's share of the resized shorter side, and how far that is the same."""
    stated, cropped, notes = about.get("size", size), about.get("do_center_crop", False), []
    resized = _sides(stated)
    final = _sides(about.get("crop_size", size)) if cropped else resized
    if not (cropped and isinstance(stated, Mapping) and "shortest_edge" in stated):
        notes.append(
            "preprocessor_config.json squeezes whole images into one shape; here they keep their "
            "proportions and are cropped in the centre"
        )
    if final != size:
        notes.append(
            f"preprocessor_config.json makes images of {final[0]}x{final[1]} pixels, but the "
            f"weights are for {size[0]}x{size[1]}, which is taken"
        )
    return min(1.0, final[0] / resized[0]), notes


def _sides(size) -> tuple[int, int]:
    """Height and width of an image processor's size: a number, a pair or a dictionary."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size)


def _several(values) -> Sequence[float]:
    """One number for all channels, or one for each, as a sequence."""
    return values if isinstance(values, Sequence) else (values,)


def inexpressible(config: Mapping) -> dict[str, str]:
    """What Hugging Face's classes have no place for.

    Args:
      config: a run's resolved config, nested.

    Returns:
      Modules at the top of the parameters that an export leaves out -> why, one sentence.

    Raises:
      UserError: for what cannot be left out, because the rest would compute something else.
    """
    model, task, (height, width) = config["model"], config["task"], config["data"]["image_size"]
    taps = list(config["segment"]["taps"])
    refusals = {
        f"config.model.qkv_bias={model['qkv_bias']}": model["qkv_bias"] != "qv",
        "config.model.norm_pre": model["norm_pre"],
        "a patch embedding without a bias": not model["patch_bias"],
        # Its position tables are transposed, and its position embedding is read as a square.
        f"images of {height}x{width}": height != width,
        # It names the states before the last block's, in order and each once.
        f"segmentation from the states after {', '.join(map(str, taps))} blocks": task == "segment"
        and (taps != sorted(set(taps)) or taps[-1] >= model["depth"]),
        f"the task {task!r}": task not in _CLASSES,
    }
    if refused := [what for what, is_so in refusals.items() if is_so]:
        raise UserError(
            f"Hugging Face's BEiT classes cannot express {' and '.join(refused)}: there is no such "
            "folder; --format=unilm knows more"
        )
    if task != "mim" or not model["early_layers"]:
        return {}
    why = "BEiT v2's CLS branch is left out, as Hugging Face's BEiT has none."
    blocks = [f"cls_block_{j}" for j in range(model["head_layers"])]
    return dict.fromkeys([*blocks, "cls_norm", "cls_lm_head"], why)


def class_names(about: Mapping, outputs: int) -> tuple[str, ...]:
    """The names of a head's classes; empty where config.json has none, or only placeholders."""
    labels = about.get("id2label") or {}
    names = tuple(str(labels.get(str(number), "")) for number in range(outputs))
    placeholders = tuple(map(_placeholder, range(outputs)))
    return names if all(names) and names != placeholders else ()


def _placeholder(number: int) -> str:
    return f"LABEL_{number}"


def config_json(config: Mapping, outputs: int, names: Sequence[str] = ()) -> dict[str, Any]:
    """A config.json with which transformers builds the network of a run's resolved config.

    Args:
      config: nested.
      outputs: codes or classes of the head; 0: the encoder alone, which is BeitModel.
      names: of the classes, where they are known.

    Raises:
      UserError: for what Hugging Face cannot express; see `inexpressible`.
    """
    inexpressible(config)
    if config["task"] == "segment" and not outputs:
        raise UserError(
            "Hugging Face's BEiT has no segmentation without classes: export with --format=unilm"
        )
    model, data, task = config["model"], config["data"], config["task"]
    positions = model["positions"].split("+")
    about = {
        "architectures": [_CLASSES[task if outputs else "encoder"]],
        "model_type": "beit",
        "dtype": "float32",
        "image_size": data["image_size"][0],
        "num_channels": data["channels"],
        "patch_size": model["patch_size"],
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["heads"],
        "intermediate_size": round(model["width"] * model["mlp_ratio"]),
        "hidden_act": model["activation"],
        "layer_norm_eps": model["norm_epsilon"],
        "layer_scale_init_value": model["layer_scale"],
        "drop_path_rate": model["drop_path"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "use_mask_token": task == "mim",
        "use_absolute_position_embeddings": "absolute" in positions,
        "use_relative_position_bias": "relative" in positions,
        "use_shared_relative_position_bias": "shared_relative" in positions,
        # Without it there is a norm after the encoder, also where the class has none or its own.
        "use_mean_pooling": task in ("mim", "segment") or model["pooling"] == "mean",
    }
    if task == "mim":
        return about | {"vocab_size": outputs}
    if task == "segment":
        about |= _segment_json(config["segment"])
    labels = names or list(map(_placeholder, range(outputs)))
    if labels:
        about["id2label"] = {str(number): label for number, label in enumerate(labels)}
        about["label2id"] = {label: number for number, label in enumerate(labels)}
    return about


def _segment_json(segment: Mapping) -> dict[str, Any]:
    """What `config_json` says of the heads of segmentation."""
    about = {
        "out_indices": [tap + 1 for tap in segment["taps"]],
        "pool_scales": list(segment["pools"]),
        "use_auxiliary_head": segment["auxiliary_width"] > 0,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
    }
    if segment["auxiliary_width"]:
        about["auxiliary_channels"] = segment["auxiliary_width"]
    return about


def preprocessor_json(config: Mapping) -> dict[str, Any]:
    """A preprocessor_config.json for BeitImageProcessor that does what evaluation does here."""
    model, data = config["model"], config["data"]
    (height, width), channels = data["image_size"], data["channels"]

    def per_channel(values) -> list[float]:
        values = _several(values)
        return list(values) * (channels if len(values) == 1 else 1)

    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(height / data["eval_crop"])},
        "resample": _RESAMPLE[data["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_reduce_labels": config["segment"]["reduce_zero_label"],
        "image_mean": per_channel(model["mean"]),
        "image_std": per_channel(model["std"]),
    }
