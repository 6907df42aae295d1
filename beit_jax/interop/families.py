"""All families of foreign weights, and which of them a checkpoint is of."""

from beit_jax.errors import UserError
from beit_jax.interop import beit, clip, dall_e, dino, hugging_face, segmentation, vqkd
from beit_jax.interop.family import Description, Family, Hints, Shapes
from beit_jax.interop.files import Archive
from beit_jax.interop.table import listed

FAMILIES: tuple[Family, ...] = (
    segmentation.SEGMENTATION,
    segmentation.BACKBONE,
    beit.BEIT,  # after the segmentation backbone, which holds the same encoder
    vqkd.VQKD,
    *dall_e.FAMILIES,
    hugging_face.MASKED_IMAGE_MODELING,
    hugging_face.IMAGE_CLASSIFICATION,
    hugging_face.SEMANTIC_SEGMENTATION,
    hugging_face.MODEL,
    clip.CLIP,
    clip.CLIP_TOWER,
    clip.HF_CLIP,
    clip.HF_CLIP_TOWER,
    dino.DINO,
    dino.DINO_BACKBONE,
    dino.DINO_MODULE,
    dino.DINO_MODULE_BACKBONE,
    dino.HF_DINO,
)


class _Lookup(dict):
    """Shapes by name, where a missing name is the file's fault."""

    def __init__(self, shapes: Shapes, family: str):
        super().__init__(shapes)
        self._family = family

    def __missing__(self, name: str):
        raise UserError(
            f"the weights are of the family {self._family} but lack {name}; "
            "take the whole checkpoint"
        )


def recognise(
    archive: Archive, *, num_heads: int | None = None, early_layers: int | None = None
) -> tuple[Family, Description]:
    """The family whose names a checkpoint has, and what it says of these weights.

    Args:
      archive: read by `files.read`.
      num_heads: attention heads, where neither tensors nor files beside them tell.
      early_layers: blocks below BEiT v2's CLS branch, likewise.

    Raises:
      UserError: if no family fits, or one does and something that it needs is missing.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in archive.tensors.items()}
    family = next((family for family in FAMILIES if family.fits(shapes)), None)
    if family is None:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
        raise UserError(
            f"{archive.paths[0]} holds weights of no known family (its tensors are "
            f"{listed(list(shapes), 4)}); known are {known}"
        )
    arguments = archive.extras.get("args")
    hints = Hints(
        about=_said(archive.about),
        preprocessing=_said(archive.preprocessing),
        arguments=_said(arguments) if isinstance(arguments, dict) else {},
        num_heads=num_heads,
        early_layers=early_layers,
    )
    try:
        description = family.describe(_Lookup(shapes, family.name), hints)
        _check_heads(description.config, hints)
        _check_branch(description.config, hints)
        _check_stated(description.config, hints.about)
        notes = (*description.notes, *_origins(description, hints))
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{archive.paths[0]} looks like {family.name}, but its tensors, or config.json and "
            f"preprocessor_config.json beside it, hold what that family never has ({error}); take "
            "another checkpoint or correct those files"
        ) from error
    return family, description._replace(notes=notes)


def _said(values: dict) -> dict:
    """What a file says; null says nothing."""
    return {name: value for name, value in values.items() if value is not None}


def _check_heads(told: dict, hints: Hints) -> None:
    heads = told.get("model.heads")
    if hints.num_heads is not None and hints.num_heads != heads:
        found = f"{heads} heads" if heads else "no heads"
        raise UserError(
            f"--num-heads={hints.num_heads}, but the weights have {found}: leave it out"
        )


def _check_branch(told: dict, hints: Hints) -> None:
    early, depth = told.get("model.early_layers"), told.get("model.depth")
    if hints.early_layers is not None and early is None:
        raise UserError(
            f"--early-layers={hints.early_layers}, but the weights have no CLS branch: leave it out"
        )
    if early is not None and not 0 < early < depth:
        raise UserError(
            f"--early-layers={early} is not between 0 and the weights' {depth} blocks: give the "
            "number of blocks below the CLS branch"
        )


# What Hugging Face's config.json calls what tensors tell.
_STATED = {
    "hidden_size": "model.width",
    "num_hidden_layers": "model.depth",
    "num_attention_heads": "model.heads",
    "patch_size": "model.patch_size",
    "num_channels": "data.channels",
}


def _check_stated(told: dict, about: dict) -> None:
    """Refuses a config.json that describes other weights."""
    about = about.get("vision_config", about)  # of a whole CLIP
    known = {name: about[name] for name in _STATED if name in about and _STATED[name] in told}
    pairs = [(name, value, told[_STATED[name]]) for name, value in known.items()]
    size = about.get("image_size")
    if size is not None and "model.patch_size" in told:
        stated = (size, size) if isinstance(size, int) else tuple(size)
        pairs.append(("image_size", stated, tuple(told["data.image_size"])))
    for name, stated, found in pairs:
        if stated != found:
            raise UserError(
                f"config.json beside the weights says {name}={stated}, but the weights have "
                f"{found}: put them beside their own config.json, or alone"
            )


def _origins(description: Description, hints: Hints) -> list[str]:
    """Where that comes from which no tensor shows, one sentence each."""
    told, notes = description.config, []
    if told.get("model.positions") == "absolute" and hints.num_heads is None:
        about = hints.about.get("vision_config", hints.about)
        said = "as config.json says" if "num_attention_heads" in about else "as published"
        notes.append(f"{told['model.heads']} attention heads, {said}")
    if "model.early_layers" in told and hints.early_layers is None:
        stated = "early_layers" in hints.arguments
        said = "as its training's arguments say" if stated else "as published"
        notes.append(f"a CLS branch after {told['model.early_layers']} blocks, {said}")
    return notes
