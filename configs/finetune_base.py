"""BEiT base and BEiT v2 base, fine-tuned to classify: the recipes that their authors published.

Each is a preset, given behind a colon; without one it is v1:

    v1            from BEiT's pre-training on ImageNet-22k           to ImageNet-1k
    v1_22k        from the same                                      to ImageNet-22k
    v1_from_22k   from the result of v1_22k                          to ImageNet-1k
    v2            from 1600 epochs of BEiT v2's on ImageNet-1k       to ImageNet-1k
    v2_300        from 300 epochs of the same                        to ImageNet-1k
    v2_21k        as v2                                              to ImageNet-22k
    v2_from_21k   from the result of v2_21k                          to ImageNet-1k

Command, with the authors' weights:
    python -m beit_jax.convert import beit_base_patch16_224_pt22k.pth runs/beit_base
    python -m beit_jax.main --config=configs/finetune_base.py:v1
With your own, pre-trained on ImageNet-1k with its mean and deviation as `mim_base` does:
    python -m beit_jax.main --config=configs/finetune_base.py:v1 --config.init.path=runs/mim_base \
        '--config.model.mean=(0.485, 0.456, 0.406)' '--config.model.std=(0.229, 0.224, 0.225)'
On your own folder, a sub-folder for each class:
    python -m beit_jax.main --config=configs/finetune_base.py:v2 --config.data.source=folder:PHOTOS
At 384 or 512 pixels, from weights of any size (position tables are resized):
    python -m beit_jax.main --config=configs/finetune_base.py:v1_from_22k \
        '--config.data.image_size=(384, 384)' --config.data.eval_crop=1.0
By the CLS token in place of the patches' mean: --config.model.pooling=cls. With averaged weights,
which are evaluated beside the raw ones (raw_accuracy): --config.train.ema_decay=0.9999.
ImageNet-22k (21,841 classes) is read as written by
    python -m beit_jax.prepare folder IMAGENET_22K --name=imagenet22k

Cost: 86,530,984 trained parameters at 224 pixels (102,557,713 with 21,841 classes); 125,114 updates
of 1,024 images (v1, v2, v2_300), 37,535 of 1,024 (v2_from_21k), 75,069 of 512 (v1_from_22k), about
312,000 of 4,096 (v1_22k, v2_21k). Not run by us.
Expected (reported by the authors, ImageNet top-1 / top-5): v1 83.7 / 96.6, v1_from_22k 85.2 / 97.6
and 86.8 / 98.1 at 384 pixels, v2 85.5 / 97.5, v2_300 85.0, v2_from_21k 86.5 / 98.0.
"""

from configs import common

MIXED = {"classify.mixup": 0.8, "classify.cutmix": 1.0}
V1 = {"init.path": "runs/beit_base", "model.mean": (0.5,) * 3, "model.std": (0.5,) * 3}
TO_22K = {"data.source": "tfds:imagenet22k", "train.batch_size": 4096, "train.epochs": 90.0}
PRESETS = {
    "v1": V1 | MIXED | {
        "optimizer.learning_rate": 4e-3,
        "optimizer.layer_decay": 0.65,
        "model.drop_path": 0.1,
    },
    "v1_22k": V1 | TO_22K | {
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_epochs": 5.0,
        "optimizer.layer_decay": 0.65,
        "optimizer.clip": 3.0,
        "model.drop_path": 0.2,
    },
    "v1_from_22k": V1 | {
        "init.path": "runs/finetune_base_v1_22k",
        "train.batch_size": 512,
        "train.epochs": 30.0,
        "optimizer.learning_rate": 2e-5,
        "optimizer.warmup_epochs": 5.0,
        "optimizer.weight_decay": 1e-8,
        "optimizer.layer_decay": 0.85,
        "model.drop_path": 0.1,
    },
    "v2": MIXED | {
        "optimizer.learning_rate": 5e-4,
        "optimizer.layer_decay": 0.6,
        "model.drop_path": 0.2,
    },
    "v2_300": MIXED | {
        "optimizer.learning_rate": 5e-4,
        "optimizer.layer_decay": 0.65,
        "model.drop_path": 0.1,
    },
    "v2_21k": MIXED | TO_22K | {
        "optimizer.learning_rate": 6e-4,
        "optimizer.layer_decay": 0.75,
        "model.drop_path": 0.1,
    },
    "v2_from_21k": {
        "init.path": "runs/finetune_base_v2_21k",
        "train.epochs": 30.0,
        "optimizer.learning_rate": 5e-5,
        "optimizer.layer_decay": 0.75,
        "model.drop_path": 0.1,
    },
}  # fmt: skip


def get_config(preset: str = "v1"):
    config = shared()
    config.init.path = "runs/mim_v2_base"
    config.train.epochs = 100.0
    config.optimizer.warmup_epochs = 20.0
    return common.with_preset(config, PRESETS, preset)


def shared():
    """What all recipes have in common, of either size."""
    config = common.get_config()
    config.task = "classify"
    config.model.positions = "relative"
    config.model.layer_scale = 0.1
    config.data.color_jitter = 0.0
    config.data.rand_augment = 9.0
    config.classify.erase = 0.25
    config.classify.label_smoothing = 0.1
    config.classify.head_scale = 0.001
    config.train.batch_size = 1024
    config.train.eval_every = 12_500
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 0.0
    config.eval.best = "accuracy"
    config.eval.maximize = True
    config.eval.raw = True
    return config
