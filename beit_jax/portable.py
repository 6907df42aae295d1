"""A run as one file that needs no code of this house: StableHLO with its weights inside.

from jax import export
network = export.deserialize(open("beit.stablehlo", "rb").read())
vectors = network.call(images)  # uint8 [any number, H, W, channels]
"""

import jax
import jax.numpy as jnp
from jax import export

from beit_jax import checkpoint
from beit_jax.architecture import make_classifier
from beit_jax.augment import normalize
from beit_jax.errors import UserError
from beit_jax.features import make_extractor

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo(weights: checkpoint.Weights) -> tuple[bytes, str]:
    """A classifier's logits [B, C], or an encoder's features [B, D] (mean of the last patches).

    The function takes uint8 images [B, H, W, channels] of the run's size and any B, and runs on
    PLATFORMS.

    Returns:
      the serialised function, and its signature for people.
    """
    config, params = weights.config, jax.tree.map(jnp.asarray, weights.params)
    if "patch_embed" not in params.get("encoder", {}):
        raise UserError(
            f"{weights.source} holds no encoder of images, so there are no features to export; "
            "name a run of task mim or classify"
        )
    if config["task"] == "classify":
        model = make_classifier(config, params["head"]["kernel"].shape[-1])
        mean, std = config["model"]["mean"], config["model"]["std"]

        def network(images):
            return model.apply({"params": params}, normalize(images, mean, std))

    else:
        extract = make_extractor(config)

        def network(images):
            return extract(params["encoder"], images)["mean"][:, -1]

    size = (*config["data"]["image_size"], config["data"]["channels"])
    rows = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((*rows, *size), jnp.uint8)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "StableHLO for every platform is made on a CPU, which JAX_PLATFORMS hides: unset it."
        ) from None
    with jax.default_device(cpu):  # else it would hold kernels of the GPU that is here
        exported = export.export(jax.jit(network), platforms=PLATFORMS)(images)
    (result,) = exported.out_avals
    signature = f"uint8 {images.shape} -> {result.dtype} {result.shape}".replace("'", "")
    return bytes(exported.serialize()), signature
