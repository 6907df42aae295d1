"""BEiT large, pre-trained by masked image modelling on ImageNet-1k.

Command:
    python -m beit_jax.main --config=configs/mim_large.py --config.tokenizer.path=runs/dvae \
        --config.mesh.fsdp=8

Cost: 311,534,016 trained parameters, 500,456 updates of 2,048 images. Not run by us at full length.
Expected (paper): 85.2 % ImageNet top-1 at 224 pixels after fine-tuning. The authors published no
command for this size; batch, rates and clipping are the paper's.
"""

from configs import mim_base


def get_config():
    config = mim_base.get_config()
    config.model.width = 1024
    config.model.depth = 24
    config.model.heads = 16
    config.model.layer_scale = 1e-5
    config.optimizer.clip = 1.0
    return config
