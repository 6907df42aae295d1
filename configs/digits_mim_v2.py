"""Quick start with --v2, stage 5: masked image modelling on VQ-KD's tokens, with the CLS branch.

Command:
    python -m beit_jax.main --config=configs/digits_mim_v2.py
Without the branch:
    python -m beit_jax.main --config=configs/digits_mim_v2.py --config.model.early_layers=0
"""

from configs import digits_mim


def get_config():
    config = digits_mim.get_config()
    config.tokenizer.path = "runs/digits_pixel_decoder"
    config.model.early_layers = 3
    config.model.head_layers = 2
    config.model.shared_head = True
    return config
