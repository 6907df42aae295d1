"""Every published network has, from its config, exactly the published number of parameters."""

import jax
import pytest

from beit_jax.architecture import make_network, variables_of
from configs import common, dvae, mim_base, mim_large

LARGE = {"model.width": 1024, "model.depth": 24, "model.heads": 16}
PLAIN = {"model.positions": "absolute", "model.layer_scale": 0.0}
VQKD = {"task": "vqkd", **PLAIN}


def classifier(side):
    return {"task": "classify", "model.positions": "relative", "data.image_size": (side, side)}


# Recipe, changes to it, outputs, parameters.
PUBLISHED = {
    "BEiT base": (mim_base, {}, 8192, 91_965_776),
    "BEiT base, plain": (mim_base, PLAIN, 8192, 92_089_856),
    "BEiT large": (mim_large, {}, 8192, 311_534_016),
    "BEiT v2 base": (mim_base, {"model.early_layers": 9}, 8192, 106_143_056),
    "BEiT v2 large": (mim_large, {"model.early_layers": 21}, 8192, 336_728_512),
    "classifier base 224": (common, classifier(224), 1000, 86_530_984),
    "classifier base 384": (common, classifier(384), 1000, 86_744_104),
    "classifier base 512": (common, classifier(512), 1000, 86_997_544),
    "classifier large 224": (common, classifier(224) | LARGE, 1000, 304_430_568),
    "classifier large 384": (common, classifier(384) | LARGE, 1000, 304_998_888),
    "classifier large 512": (common, classifier(512) | LARGE, 1000, 305_674_728),
    "classifier base 22k": (common, classifier(224), 21_841, 102_557_713),
    "classifier large 22k": (common, classifier(224) | LARGE, 21_841, 325_792_593),
    "VQ-KD, CLIP": (common, VQKD, 0, 94_655_008),
    "VQ-KD, CLIP, deep decoder": (common, VQKD | {"vqkd.decoder_depth": 3}, 0, 108_829_216),
    "VQ-KD, DINO": (common, VQKD | {"vqkd.teacher_width": 768}, 0, 94_851_872),
}


def parameters(recipe, changes, outputs):
    """The number of each part of the network, by shapes alone."""
    config = recipe.get_config()
    config.update_from_flattened_dict(changes)
    network, inputs = make_network(config, outputs)
    params = variables_of(network, *inputs)["params"]
    return {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_networks(name):
    *network, expected = PUBLISHED[name]
    assert sum(parameters(*network).values()) == expected


def test_parameters_of_the_two_halves_of_dall_e():
    assert parameters(dvae, {}, 0) == {"encoder": 53_786_240, "decoder": 43_829_766}
