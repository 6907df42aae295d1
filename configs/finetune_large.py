"""BEiT large and BEiT v2 large, fine-tuned to classify: presets named as in `finetune_base`.

Command, with the authors' weights, and with more devices than one:
    python -m beit_jax.convert import beit_large_patch16_224_pt22k.pth runs/beit_large
    python -m beit_jax.main --config=configs/finetune_large.py:v1 --config.mesh.fsdp=8
At 384 or 512 pixels, from weights of any size (position tables are resized):
    python -m beit_jax.main --config=configs/finetune_large.py:v1_from_22k \
        '--config.data.image_size=(512, 512)' --config.data.eval_crop=1.0

Cost: 304,430,568 trained parameters at 224 pixels (325,792,593 with 21,841 classes); 62,557 updates
of 1,024 images (v1, v2, v2_300), 25,023 of 1,024 (v2_from_21k), 75,069 of 512 (v1_from_22k), about
624,000 of 2,048 (v1_22k), 312,000 of 4,096 (v2_21k). Not run by us.
Expected (reported by the authors, ImageNet top-1 / top-5): v1 86.0 / 97.6, v1_from_22k 87.4 / 98.3,
88.4 / 98.6 at 384 and 88.60 / 98.66 at 512 pixels, v2 87.3 / 98.2, v2_300 86.6, v2_from_21k
88.4 / 98.6.
"""

from configs import common, finetune_base
from configs.finetune_base import MIXED, TO_22K

V1 = finetune_base.V1 | {"init.path": "runs/beit_large"}
PRESETS = {
    "v1": V1 | MIXED | {
        "optimizer.learning_rate": 1e-3,
        "optimizer.layer_decay": 0.75,
        "model.drop_path": 0.2,
    },
    "v1_22k": V1 | TO_22K | {
        "train.batch_size": 2048,
        "optimizer.learning_rate": 2e-3,
        "optimizer.layer_decay": 0.75,
        "optimizer.clip": 1.0,
        "model.drop_path": 0.2,
    },
    "v1_from_22k": V1 | {
        "init.path": "runs/finetune_large_v1_22k",
        "train.batch_size": 512,
        "train.epochs": 30.0,
        "optimizer.learning_rate": 2e-5,
        "optimizer.weight_decay": 1e-8,
        "optimizer.layer_decay": 0.9,
        "model.drop_path": 0.4,
    },
    "v2": MIXED | {
        "optimizer.learning_rate": 2e-4,
        "optimizer.layer_decay": 0.8,
        "model.drop_path": 0.2,
    },
    "v2_300": MIXED | {
        "optimizer.learning_rate": 5e-4,
        "optimizer.layer_decay": 0.8,
        "model.drop_path": 0.2,
    },
    "v2_21k": MIXED | TO_22K | {
        "optimizer.learning_rate": 6e-4,
        "optimizer.warmup_epochs": 20.0,
        "optimizer.layer_decay": 0.75,
        "model.drop_path": 0.2,
    },
    "v2_from_21k": {
        "init.path": "runs/finetune_large_v2_21k",
        "train.epochs": 20.0,
        "optimizer.learning_rate": 7e-5,
        "optimizer.layer_decay": 0.8,
        "model.drop_path": 0.25,
    },
}  # fmt: skip


def get_config(preset: str = "v1"):
    config = finetune_base.shared()
    config.model.width = 1024
    config.model.depth = 24
    config.model.heads = 16
    config.model.layer_scale = 1e-5
    config.init.path = "runs/mim_v2_large"
    config.train.epochs = 50.0
    config.optimizer.warmup_epochs = 5.0
    return common.with_preset(config, PRESETS, preset)
