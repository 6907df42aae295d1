"""Starting from another run's weights: pre-training to fine-tuning, one image size to another.

Follows beit/run_class_finetuning.py, lines 315-436, on NumPy arrays on the host.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from beit_jax import resize
from beit_jax.architecture import patch_grid
from beit_jax.checkpoint import PyTree, Weights
from beit_jax.errors import UserError

TABLE = "relative_position_bias/table"
SHARED_TABLE, EMBEDDING = f"encoder/{TABLE}", "encoder/pos_embed"
MASK_TOKEN = "encoder/mask_token"
# What an encoder's weights are made for, whether or not their shapes tell.
FIXED = (
    "data.channels", "model.patch_size", "model.width", "model.depth", "model.heads",
    "model.mlp_ratio", "model.qkv_bias", "model.activation", "model.norm_pre",
    "model.patch_bias",
)  # fmt: skip


def warm_start(params: PyTree, weights: Weights, config: Mapping) -> tuple[PyTree, str]:
    """Takes another run's encoder, and of the rest (norm, head) what has the same names and shapes.

    A relative position table that all blocks share is copied to each block where the new encoder
    has one per block; tables and absolute positions are resized where the grid of patches differs.
    From pre-training a classifier's `fc_norm` and `head` are fresh, as there are none; from a
    classifier they are kept, the head only for the same number of classes.

    Args:
      params: the new run's `variables` with an `encoder`; arrays or shapes.
      weights: of a run that trained an encoder.
      config: the new run's resolved config.

    Returns:
      what is taken, in its places in `params`, as NumPy arrays; and lines that say what was taken,
      copied, resized, left fresh and left unused.

    Raises:
      UserError: if `weights` hold no encoder, or none that fits the new run's.
    """
    if not all("patch_embed" in tree.get("encoder", {}) for tree in (params, weights.params)):
        raise UserError(
            f"config.init.path={weights.source} holds no encoder for this task; name a run of task "
            "mim or classify, or leave config.init.path empty."
        )
    _check_architecture(weights, config)
    trees = variables(weights.params, weights.model_state), params
    found, wanted = (flatten_dict(tree, sep="/") for tree in trees)
    origins = {name: _origin(name, found) for name in wanted}
    source, target = patch_grid(weights.config), patch_grid(config)
    resized = []
    if source != target:
        resized = [n for n in found if n in origins.values() and _is_position(n)]
        found |= {name: _resized(name, found[name], source, target, weights) for name in resized}
    taken, fresh = _take(wanted, found, origins)
    unused = [n for n in found if n not in origins.values() and _module(n) not in fresh]
    _check_encoder(fresh, unused, weights)
    copied = [name for name in taken if origins[name] != name]
    report = _report(weights.source, taken, copied, fresh, unused)
    if resized:
        report.append(f"resized from {_by(source)} to {_by(target)} patches: {_listed(resized)}")
    for key in ("mean", "std"):
        here, there = tuple(config["model"][key]), tuple(weights.config["model"][key])
        channels = config["data"]["channels"]  # one number serves them all
        if not np.array_equal(*(np.broadcast_to(x, channels) for x in (here, there))):
            report.append(
                f"WARNING: it saw pixels normalised with {key} {there}, here they are with {here}; "
                f"--config.model.{key} changes that"
            )
    return unflatten_dict(taken, sep="/"), "\n  ".join(report)


def variables(params: PyTree, model_state: Mapping) -> PyTree:
    """Parameters and BatchNorm's running statistics as one tree; no two have one name."""
    statistics = model_state.get("batch_stats", {})
    return unflatten_dict(flatten_dict(params) | flatten_dict(statistics))


def put(tree: PyTree, taken: PyTree) -> PyTree:
    """A tree with those arrays of `taken` that have a place in it."""
    found = flatten_dict(taken)
    return unflatten_dict({path: found.get(path, x) for path, x in flatten_dict(tree).items()})


def _take(wanted: Mapping, found: Mapping, origins: Mapping) -> tuple[dict, dict[str, str]]:
    """Arrays of the modules that `found` fits as a whole, and why the other modules are fresh."""
    taken, fresh, modules = {}, {}, {}
    for name in wanted:
        modules.setdefault(_module(name), []).append(name)
    for module, names in modules.items():
        misfits = (_misfit(name, wanted[name], found.get(origins[name])) for name in names)
        misfit = next(filter(None, misfits), None)
        if misfit and not any(origins[name] in found for name in names):
            misfit = "it has none"
        if misfit:
            fresh[module] = misfit
        else:
            taken |= {name: found[origins[name]] for name in names}
    return taken, fresh


def _module(name: str) -> str:
    """What is taken as a whole or not at all; the mask token is no part of a classifier."""
    return name if name == MASK_TOKEN else name.split("/")[0]


def _is_position(name: str) -> bool:
    return name == EMBEDDING or name.endswith(TABLE)


def _origin(name: str, found: Mapping) -> str:
    """The name under which `found` would hold a wanted array."""
    own_table = name.endswith(f"attn/{TABLE}") and name not in found
    return SHARED_TABLE if own_table and SHARED_TABLE in found else name


def _misfit(name: str, leaf, array) -> str | None:
    """Why an array cannot be taken, "it" being the other run."""
    if array is None:
        return f"it has no {name}"
    if array.shape != leaf.shape:
        return f"its {name} is {array.shape}, here {leaf.shape}"
    return None


def _resized(name: str, array, source: resize.Grid, target: resize.Grid, weights: Weights):
    change = resize.position_embedding if name == EMBEDDING else resize.relative_position_table
    try:
        return change(array, source, target)
    except ValueError as error:
        raise UserError(
            f"config.init.path={weights.source}: {name} of shape {array.shape} is not for the "
            f"{_by(source)} patches of its config.json; correct data.image_size or "
            "model.patch_size there."
        ) from error


def _check_architecture(weights: Weights, config: Mapping) -> None:
    """Compares what the two configs say, so that the error names keys and not arrays."""
    here, there = {}, {}
    for key in FIXED:
        section, name = key.split(".")
        values = weights.config[section]
        if values[name] != config[section][name]:
            here[key], there[key] = config[section][name], values[name]
    if here:
        raise UserError(
            f"config.init.path={weights.source} holds an encoder of {_settings(there)}, which "
            f"cannot be taken with {_settings(here)}; set {_settings(there, '--config.')} or name "
            "another run."
        )


def _settings(values: Mapping, prefix: str = "") -> str:
    return (" " if prefix else ", ").join(f"{prefix}{key}={value}" for key, value in values.items())


def _check_encoder(fresh: Mapping[str, str], unused: Iterable[str], weights: Weights) -> None:
    """Refuses an encoder that is not whole, or has more than positions to leave out."""
    misfit = fresh.get("encoder")
    for name in unused:
        if _module(name) == "encoder" and not _is_position(name):
            misfit = f"it has {name}, for which this run's encoder has no place"
    if misfit:
        model = weights.config["model"]
        raise UserError(
            f"config.init.path={weights.source} does not fit, as {misfit}; config.model must "
            f"describe the encoder that it holds (positions={model['positions']}, "
            f"layer_scale={model['layer_scale']}; see its config.json)."
        )


def _report(
    source: str,
    taken: Iterable[str],
    copied: Collection[str],
    fresh: Mapping[str, str],
    unused: Collection[str],
) -> list[str]:
    """Lines that say what happened to the arrays of these names; the first is the title."""
    modules = list(map(_module, taken))
    lines = [f"{modules.count('encoder')} encoder arrays taken from {source}"]
    if kept := [module for module in dict.fromkeys(modules) if module != "encoder"]:
        lines.append(f"taken too: {', '.join(kept)}")
    lines += [f"fresh: {module}, as {misfit}" for module, misfit in fresh.items()]
    if unused:
        names = (name if _module(name) == "encoder" else _module(name) for name in unused)
        lines.append(f"not used, as this model has no such part: {_listed(names)}")
    if copied:
        lines.append(f"copied: {SHARED_TABLE} to each of {len(copied)} blocks")
    return lines


def _by(grid: resize.Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _listed(names: Iterable[str]) -> str:
    """Names with those of all blocks as one."""
    return ", ".join(dict.fromkeys(re.sub(r"block_[0-9]+", "block_*", name) for name in names))
