"""A foreign checkpoint becomes the weights and the config of a run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from beit_jax.architecture import make_network, variables_of
from beit_jax.errors import UserError
from beit_jax.interop.families import recognise
from beit_jax.interop.family import Description
from beit_jax.interop.files import Archive
from beit_jax.interop.hugging_face_config import class_names
from beit_jax.interop.table import Match, listed, match_params
from beit_jax.interop.tensors import NOT_READ

# Layers that give a network's outputs: alone they may be missing, and start afresh.
HEADS = ("head", "lm_head", "cls_lm_head", "decode_classes", "auxiliary_classes")


class Imported(NamedTuple):
    """A foreign checkpoint in this house's terms."""

    config: ConfigDict  # resolved
    outputs: int  # see `Description`
    variables: dict[str, Any]  # collection -> tree of NumPy arrays
    report: list[tuple[str, str]]  # what, and what of it
    class_names: tuple[str, ...]  # of the head, where the files know them


def import_archive(
    archive: Archive,
    config: ConfigDict,
    *,
    num_heads: int | None = None,
    early_layers: int | None = None,
    allow_partial: bool = False,
) -> Imported:
    """Recognises a checkpoint and lays its tensors in their places.

    Args:
      archive: read by `files.read`; its tensors are read one at a time.
      config: every key with its default; filled in and kept in the result.
      num_heads, early_layers: see `recognise`.
      allow_partial: initialise what the file lacks, and leave what has no place, with a report.

    Raises:
      UserError: for an unknown family, a misfit, or a shortfall that is not allowed.
    """
    family, description = recognise(archive, num_heads=num_heads, early_layers=early_layers)
    _fill(config, description)
    module, inputs = make_network(config, description.outputs)
    wanted = dict(variables_of(module, *inputs))
    if description.parts:
        wanted["params"] = {part: wanted["params"][part] for part in description.parts}
    # Tables speak of parameters alone, or of all collections where there are others.
    alone = set(wanted) == {"params"}
    target = wanted["params"] if alone else wanted
    match = match_params(family.table(config), archive.tensors, target)
    if not allow_partial:
        _refuse_shortfall(match, archive)
    tree = unflatten_dict(match.found | _fresh(module, inputs, match.missing, alone), sep="/")
    variables = {"params": tree} if alone else tree
    report = _report(archive, family.name, description, config, match, target)
    names = ()
    if description.task in ("classify", "segment"):
        names = class_names(archive.about, description.outputs)
        report.append(("classes", f"by {'name' if names else 'number, as no names are known'}"))
    return Imported(config, description.outputs, variables, report, names)


def _fill(config: ConfigDict, description: Description) -> None:
    config.task = description.task
    # Float32, so that the numbers are those of the original; a run that starts here has its own.
    config.model.dtype = config.dvae.dtype = "float32"
    config.tokenizer.path = ""
    try:
        config.update_from_flattened_dict(description.config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the config beside the weights cannot be used ({error}); correct or remove it"
        ) from error


def _refuse_shortfall(match: Match, archive: Archive) -> None:
    needed = [name for name in match.missing if name.split("/")[-2] not in HEADS]
    for names, what, remedy in (
        (needed, "lacks", "or --allow-partial to initialise them"),
        (match.unexpected, "holds, without a place in that network,", "or --allow-partial"),
    ):
        if names:
            raise UserError(
                f"{archive.paths[0]} {what} {listed(names)}: give a whole checkpoint, {remedy}"
            )


def _fresh(module, inputs, missing: list[str], alone: bool) -> dict[str, np.ndarray]:
    """Initial values of what is missing, by path."""
    if not missing:
        return {}

    @jax.jit
    def initial(key):
        values = module.init(key, *(jnp.zeros(x.shape, x.dtype) for x in inputs))
        flat = flatten_dict(values["params"] if alone else dict(values), sep="/")
        return {name: flat[name] for name in missing}

    return jax.tree.map(np.asarray, initial(jax.random.key(0)))


def _report(
    archive: Archive,
    family: str,
    description: Description,
    config: ConfigDict,
    match: Match,
    target: Mapping,
) -> list[tuple[str, str]]:
    wanted = flatten_dict(target, sep="/")
    parameters = sum(leaf.size for leaf in wanted.values())
    lines = [
        ("read", f"{archive.kind}, {len(archive.tensors)} tensors: {', '.join(archive.paths)}"),
        ("recognised", f"{description.label} ({family})"),
        ("size", f"{parameters:,} values; {_size(config)}"),
        ("pixels", _pixels(config)),
        ("matched", f"{len(match.found)} of {len(wanted)}, re-laid from PyTorch's order to Flax's"),
        ("missing", _counted(match.missing, "initialised afresh")),
        ("unexpected", _counted(match.unexpected, "left out, as the network has no such part")),
        ("resized", "none: the grid is the file's; --config.init.path resizes to another"),
    ]
    lines += [("dropped", _counted(names, reason)) for reason, names in match.dropped.items()]
    lines += [
        ("converted", f"{number} tensors from {kind} to float32")
        for kind, number in match.widths.items()
    ]
    lines += [("assumed", note) for note in description.notes]
    beside = [name for name, value in archive.extras.items() if str(value).endswith(NOT_READ)]
    if beside:
        lines.append(("not read", f"tensors beside the weights, in {listed(beside)}"))
    bad = [name for name, array in match.found.items() if not np.isfinite(array).all()]
    if bad:
        lines.append(("WARNING", f"not finite (NaN or infinite) values in {listed(bad)}"))
    return lines


def _counted(names: list[str], reason: str) -> str:
    return f"{len(names)} ({reason}): {listed(names)}" if names else "none"


def _size(config: ConfigDict) -> str:
    if config.task == "dvae":
        dvae = config.dvae
        return (
            f"{dvae.vocabulary} codes, width {dvae.width}, {dvae.groups} groups of "
            f"{dvae.blocks_per_group} blocks"
        )
    model, (height, width) = config.model, config.data.image_size
    branch = f", CLS branch after {model.early_layers}" if model.early_layers else ""
    return (
        f"width {model.width}, {model.depth} blocks{branch}, {model.heads} heads, patches of "
        f"{model.patch_size}, images of {height}x{width}, {model.positions} positions"
    )


def _pixels(config: ConfigDict) -> str:
    height, width = config.data.image_size
    range_ = f"mean {tuple(config.model.mean)}, std {tuple(config.model.std)}"
    if config.task == "dvae":
        range_ = "[0, 1] mapped to [0.1, 0.9]"
    return (
        f"{range_}; {config.data.interpolation} to {height}x{width}, centre share "
        f"{config.data.eval_crop}"
    )
