"""Segmentation of ADE20K by UPerNet on BEiT large (official recipes); otherwise as the base one.

Presets are v1_ft (without one it is that), v1_ft_640, v2 and v2_ft; there is no v1.

Command:
    python -m beit_jax.main --config=configs/segment_ade20k_large.py:v1_ft_640

Cost: 441 million trained parameters, 160,000 updates of 16 windows. Not run by us.
Expected (reported by the authors, mIoU on the validation split): 56.7 % of v1_ft_640, multi-scale
57.0 %; 56.7 % of v2; 57.5 % of v2_ft.
"""

from configs import common, segment_ade20k_base
from configs.segment_ade20k_base import LARGE_WINDOWS

V2 = {
    "init.path": "runs/mim_v2_large",
    "optimizer.learning_rate": 4e-5,
    "optimizer.layer_decay": 0.9,
}
STARTS = {
    "v1_ft": {},
    "v1_ft_640": LARGE_WINDOWS,
    "v2": V2,
    "v2_ft": V2 | {"init.path": "runs/finetune_large_v2_21k", "optimizer.learning_rate": 3e-5},
}


def get_config(start="v1_ft"):
    config = segment_ade20k_base.get_config()
    config.init.path = "runs/finetune_large_v1_22k"
    config.model.width = 1024
    config.model.depth = 24
    config.model.heads = 16
    config.model.layer_scale = 1e-6
    config.model.drop_path = 0.2
    config.segment.taps = (8, 12, 16, 24)
    config.optimizer.learning_rate = 2e-5
    config.optimizer.layer_decay = 0.95
    return common.with_preset(config, STARTS, start)
