"""Names of OpenAI's DALL-E tokenizer (openai/DALL-E): encoder and decoder, for `models.dvae`."""

from beit_jax.interop.table import CONV, Rule, Table


def _conv(torch: str, flax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.w", f"{flax}/kernel", CONV), Rule(f"{torch}.b", f"{flax}/bias")


_BLOCK, _FLAX_BLOCK = "blocks.group_{g}.block_{b}", "group_{g}_block_{b}"

RULES = (
    *_conv("blocks.input", "input"),
    *_conv(f"{_BLOCK}.id_path", f"{_FLAX_BLOCK}/id_path"),
    *_conv(f"{_BLOCK}.res_path.conv_{{c}}", f"{_FLAX_BLOCK}/conv_{{c}}"),
    *_conv("blocks.output.conv", "output"),
)

ENCODER = Table("DALL-E encoder", RULES)
DECODER = Table("DALL-E decoder", RULES)
