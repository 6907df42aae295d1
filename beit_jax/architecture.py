"""The network that a resolved config describes.

Configs are read here and nowhere below: `models` takes plain fields. Whoever needs a network (a
task, the feature extractor, a frozen tokenizer, the converter) asks here, so that a config means
one thing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.models.beit import Classifier, MaskedImageModel
from beit_jax.models.dvae import DVAE
from beit_jax.models.layers import FINETUNE_INIT, MIM_INIT, Init
from beit_jax.models.vit import ViT


def make_encoder(config: Mapping, initial: Init = MIM_INIT) -> ViT:
    """The vision transformer of `config.model`."""
    model = config["model"]
    return ViT(
        patch_size=model["patch_size"],
        width=model["width"],
        depth=model["depth"],
        heads=model["heads"],
        mlp_ratio=model["mlp_ratio"],
        positions=model["positions"],
        layer_scale=model["layer_scale"],
        drop_path=model["drop_path"],
        qkv_bias=model["qkv_bias"],
        activation=model["activation"],
        norm_epsilon=model["norm_epsilon"],
        norm_pre=model["norm_pre"],
        patch_bias=model["patch_bias"],
        initial=initial,
        dtype=jnp.dtype(model["dtype"]),
        remat=model["remat"],
    )


def make_masked_image_model(config: Mapping, vocabulary: int) -> MaskedImageModel:
    """The encoder under heads over a tokenizer's `vocabulary`; `init` takes images, indices."""
    model = config["model"]
    return MaskedImageModel(
        make_encoder(config, MIM_INIT),
        vocabulary,
        early_layers=model["early_layers"],
        head_layers=model["head_layers"],
        shared_head=model["shared_head"],
    )


def make_classifier(config: Mapping, classes: int) -> Classifier:
    """The encoder under a head over `classes` (0: none); `init` takes images."""
    return Classifier(
        make_encoder(config, FINETUNE_INIT),
        classes,
        pooling=config["model"]["pooling"],
        head_scale=config["classify"]["head_scale"],
    )


def make_dvae(config: Mapping) -> DVAE:
    """The discrete VAE of `config.dvae`; `init` takes mapped pixels."""
    dvae = config["dvae"]
    return DVAE(
        vocabulary=dvae["vocabulary"],
        width=dvae["width"],
        groups=dvae["groups"],
        blocks_per_group=dvae["blocks_per_group"],
        decoder_input=dvae["decoder_input"],
        channels=config["data"]["channels"],
        dtype=jnp.dtype(dvae["dtype"]),
    )


def images_of(config: Mapping, rows: int = 1) -> jax.ShapeDtypeStruct:
    """Shape of `rows` float images [B, H, W, ch] as the networks of this config take them."""
    data = config["data"]
    return jax.ShapeDtypeStruct((rows, *data["image_size"], data["channels"]), jnp.float32)


def patch_grid(config: Mapping) -> tuple[int, int]:
    """Patches down and across, of sizes that divide (`PatchEmbed` refuses others)."""
    height, width = config["data"]["image_size"]
    size = config["model"]["patch_size"]
    return height // size, width // size


def variables_of(module: nn.Module, *inputs, **kwargs) -> dict:
    """Shapes of all collections of a network, such as "params", without computing anything."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs, **kwargs)
