"""Segmentation of ADE20K by UPerNet on BEiT base, from pre-training (official recipes).

The data is ADEChallengeData2016 (SceneParse150) as it is unpacked, with objectInfo150.txt in it.

Each start is a preset, given behind a colon; without one it is v1:

    v1          from BEiT's pre-training on ImageNet-22k
    v1_ft       from its fine-tuning on ImageNet-22k, and v1_ft_640 in windows of 640 pixels
    v2          from BEiT v2's pre-training on ImageNet-1k
    v2_ft       from its fine-tuning on ImageNet-22k

Command, with the authors' weights, or with your own by --config.init.path:
    python -m beit_jax.convert import beit_base_patch16_224_pt22k.pth runs/beit_base
    python -m beit_jax.main --config=configs/segment_ade20k_base.py:v1
    python -m beit_jax.main --config=configs/segment_ade20k_base.py:v1_ft_640
    python -m beit_jax.main --config=configs/segment_ade20k_base.py:v2
Multi-scale and mirrored evaluation; scales below the window's 512 pixels are the window's:
    python -m beit_jax.main --mode=eval --workdir=runs/segment_ade20k_base_v1 \
        '--config.segment.scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)' --config.segment.mirror=True

Coloured label maps of your own images, below the run's folder in predictions/:
    python -m beit_jax.main --mode=predict --workdir=runs/segment_ade20k_base_v1 \
        --config.data.source=folder:PHOTOS

Cost: 163 million trained parameters, 160,000 updates of 16 windows. Not run by us.
Expected (reported by the authors, mIoU on the validation split): 53.6 % of v1_ft_640, multi-scale
54.2 %; 53.1 % of v2; 53.5 % of v2_ft.
Otherwise than there, the loss is the mean over labelled pixels, images are resized by Pillow, and
colours are distorted without rounding to bytes between the steps.
"""

from configs import common

LARGE_WINDOWS = {
    "data.image_size": (640, 640),
    "segment.short_side": 640,
    "segment.stride": 426,
}
V1_FT = {
    "init.path": "runs/finetune_base_v1_22k",
    "optimizer.learning_rate": 3e-5,
    "optimizer.layer_decay": 0.9,
}
V2 = {
    "init.path": "runs/mim_v2_base",
    "model.drop_path": 0.15,
    "optimizer.learning_rate": 5e-5,
    "optimizer.layer_decay": 0.75,
}
STARTS = {
    "v1": {},
    "v1_ft": V1_FT,
    "v1_ft_640": V1_FT | LARGE_WINDOWS,
    "v2": V2,
    "v2_ft": V2 | {"init.path": "runs/finetune_base_v2_21k", "optimizer.layer_decay": 0.85},
}


def get_config(start="v1"):
    config = common.get_config()
    config.task = "segment"
    config.init.path = "runs/beit_base"
    config.data.source = "folder:ADEChallengeData2016"
    config.data.image_size = (512, 512)
    config.data.interpolation = "bilinear"
    config.data.flip = 0.5
    config.data.color_jitter = 0.0
    config.model.positions = "relative"
    config.model.layer_scale = 0.1
    config.model.drop_path = 0.1
    config.segment.classes = 150
    config.segment.reduce_zero_label = True
    config.segment.taps = (4, 6, 8, 12)
    config.segment.short_side = 512
    config.segment.stride = 341
    config.train.batch_size = 16
    config.train.steps = 160_000
    config.train.eval_every = 16_000
    config.train.checkpoint_every = 4_000
    config.eval.batch_size = 8
    config.eval.best = "mIoU"
    config.eval.maximize = True
    config.optimizer.schedule = "linear"
    config.optimizer.learning_rate = 7e-4
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_steps = 1500
    config.optimizer.layer_decay = 0.65
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 0.0
    return common.with_preset(config, STARTS, start)
