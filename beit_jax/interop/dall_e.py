"""Names of OpenAI's DALL-E tokenizer (openai/DALL-E): encoder and decoder, for `models.dvae`.

OpenAI publishes two files, encoder.pkl and decoder.pkl. Read together, their names start with
`encoder.` and `decoder.`; read alone, they have no such beginning.
"""

from beit_jax.interop.family import Description, Family, Hints, Shapes, count, half
from beit_jax.interop.table import CONV, Rule, Table, prefixed


def _conv(torch: str, flax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.w", f"{flax}/kernel", CONV), Rule(f"{torch}.b", f"{flax}/bias")


_BLOCK, _FLAX_BLOCK = "blocks.group_{g}.block_{b}", "group_{g}_block_{b}"

# The encoder and the decoder are named alike.
RULES = (
    *_conv("blocks.input", "input"),
    *_conv(f"{_BLOCK}.id_path", f"{_FLAX_BLOCK}/id_path"),
    *_conv(f"{_BLOCK}.res_path.conv_{{c}}", f"{_FLAX_BLOCK}/conv_{{c}}"),
    *_conv("blocks.output.conv", "output"),
)
_INPUT, _OUTPUT = "blocks.input.w", "blocks.output.conv.w"


def _sizes(shapes: Shapes, prefix: str) -> dict:
    """What both halves tell alike."""
    conv = ".res_path.conv_1.w"
    return {
        "dvae.groups": count(shapes, f"{prefix}blocks.group_{{}}.block_1{conv}", first=1),
        "dvae.blocks_per_group": count(shapes, f"{prefix}blocks.group_1.block_{{}}{conv}", first=1),
        # The view that BEiT's official recipe gives it (beit/run_beit_pretraining.py).
        "data.image_size": (112, 112),
        "data.interpolation": "lanczos",
    }


def _encoder_sizes(shapes: Shapes, prefix: str) -> dict:
    width, channels, _, _ = shapes[prefix + _INPUT]
    vocabulary = shapes[prefix + _OUTPUT][0]
    return _sizes(shapes, prefix) | {
        "dvae.vocabulary": vocabulary,
        "dvae.width": width,
        "data.channels": channels,
    }


def _decoder_sizes(shapes: Shapes, prefix: str) -> dict:
    decoder_input, vocabulary, _, _ = shapes[prefix + _INPUT]
    statistics, width, _, _ = shapes[prefix + _OUTPUT]
    return _sizes(shapes, prefix) | {
        "dvae.vocabulary": vocabulary,
        "dvae.width": width,
        "dvae.decoder_input": decoder_input,
        "data.channels": statistics // 2,  # a location and a scale each
    }


def _family(*halves: str, named: bool) -> Family:
    """The family of files that hold these halves, named by their half or not."""
    prefixes = {part: f"{part}." if named else "" for part in halves}
    sizes = {"encoder": _encoder_sizes, "decoder": _decoder_sizes}
    kernel = {"encoder": 7, "decoder": 1}  # of the first convolution

    def fits(shapes: Shapes) -> bool:
        inputs = {part: shapes.get(prefix + _INPUT) for part, prefix in prefixes.items()}
        return all(shape and shape[-1] == kernel[part] for part, shape in inputs.items())

    def describe(shapes: Shapes, hints: Hints) -> Description:
        config = {}
        for part, prefix in prefixes.items():
            config |= sizes[part](shapes, prefix)
        mean, std = half(config["data.channels"])
        config |= {"model.mean": mean, "model.std": std}  # of no use to it, but of right length
        label = f"DALL-E tokenizer, {' and '.join(halves)}"
        if len(halves) == 1:
            label += " alone"
        return Description(label, "dvae", 0, config, parts=halves)

    rules = sum((prefixed(RULES, prefix, f"{part}/") for part, prefix in prefixes.items()), ())
    return Family("DALL-E tokenizer", fits, describe, lambda config: Table("DALL-E", rules))


DALL_E = _family("encoder", "decoder", named=True)
FAMILIES = (
    DALL_E,
    _family("encoder", named=True),
    _family("decoder", named=True),
    _family("encoder", named=False),
    _family("decoder", named=False),
)
