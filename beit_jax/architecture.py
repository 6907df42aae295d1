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
from beit_jax.models.dvae import DVAE, Decoder
from beit_jax.models.layers import FINETUNE_INIT, MIM_INIT, Init
from beit_jax.models.teachers import Tower
from beit_jax.models.upernet import Segmenter
from beit_jax.models.vit import ViT
from beit_jax.models.vqkd import VQKD


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


def make_segmenter(config: Mapping, classes: int) -> Segmenter:
    """The encoder under UPerNet's heads over `classes` (0: none); `init` takes images."""
    segment = config["segment"]
    return Segmenter(
        make_encoder(config, FINETUNE_INIT),
        classes,
        taps=segment["taps"],
        pools=segment["pools"],
        auxiliary_width=segment["auxiliary_width"],
        dropout=segment["dropout"],
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


def make_pixel_decoder(config: Mapping, vocabulary: int) -> Decoder:
    """A decoder of pixels like that of `config.dvae`; `init` takes one-hot tokens."""
    dvae = config["dvae"]
    return Decoder(
        vocabulary=vocabulary,
        width=dvae["width"],
        groups=dvae["groups"],
        blocks_per_group=dvae["blocks_per_group"],
        channels=config["data"]["channels"],
        decoder_input=dvae["decoder_input"],
        dtype=jnp.dtype(dvae["dtype"]),
    )


def make_vqkd(config: Mapping) -> VQKD:
    """The tokenizer of `config.vqkd` on the encoder of `config.model`; `init` takes mapped pixels.

    The decoder is like the encoder, but for its depth.
    """
    vqkd = config["vqkd"]
    encoder = make_encoder(config, FINETUNE_INIT)
    return VQKD(
        encoder,
        decoder=encoder.clone(patch_size=1, depth=vqkd["decoder_depth"]),
        codes=vqkd["codes"],
        code_width=vqkd["code_width"],
        teacher_width=vqkd["teacher_width"],
    )


def make_tower(config: Mapping, projection: int) -> Tower:
    """A teacher: the encoder under a projection of that width (0: none); `init` takes images."""
    return Tower(make_encoder(config, FINETUNE_INIT), projection)


def make_network(config: Mapping, outputs: int) -> tuple[nn.Module, tuple]:
    """The network of `config.task`, and the shapes of what its `init` takes.

    Args:
      config: a resolved config.
      outputs: codes, classes or the width of a projection, which no config says; 0: no head.
    """
    images = images_of(config)
    masked = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    makers = {
        "mim": lambda: (make_masked_image_model(config, outputs), (images, masked)),
        "classify": lambda: (make_classifier(config, outputs), (images,)),
        "encoder": lambda: (make_classifier(config, 0), (images,)),
        "teacher": lambda: (make_tower(config, outputs), (images,)),
        "segment": lambda: (make_segmenter(config, outputs), (images,)),
        "dvae": lambda: (make_dvae(config), (images,)),
        "vqkd": lambda: (make_vqkd(config), (images,)),
    }
    return makers[config["task"]]()


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
