"""BEiT v2 large: as `mim_v2_base`, 24 blocks, the branch after the 21st.

Command:
    python -m beit_jax.main --config=configs/mim_v2_large.py --config.tokenizer.path=runs/vqkd

Cost: 336,728,512 trained parameters, 1,000,912 updates of 2,048 images. Not run by us.
Expected (reported by the authors, after fine-tuning): 87.3 % ImageNet top-1.
"""

from configs import mim_v2_base


def get_config():
    config = mim_v2_base.get_config()
    config.model.width = 1024
    config.model.depth = 24
    config.model.heads = 16
    config.model.layer_scale = 1e-5
    config.model.early_layers = 21
    return config
