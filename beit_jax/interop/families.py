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
        about=archive.about,
        preprocessing=archive.preprocessing,
        arguments=arguments if isinstance(arguments, dict) else {},
        num_heads=num_heads,
        early_layers=early_layers,
    )
    try:
        return family, family.describe(_Lookup(shapes, family.name), hints)
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # names, shapes and values of the file
        raise UserError(
            f"{archive.paths[0]} looks like {family.name}, but its tensors or the config beside "
            f"them have no shapes of that family ({error}); take another checkpoint"
        ) from error
