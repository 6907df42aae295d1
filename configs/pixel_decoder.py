"""Pictures of a tokenizer's tokens: a small decoder of pixels on a frozen VQ-KD.

Command:
    python -m beit_jax.main --config=configs/pixel_decoder.py --config.tokenizer.path=runs/vqkd
Its run's folder is a tokenizer with the same tokens, and pictures besides:
    python -m beit_jax.main --config=configs/mim_v2_base.py \
        --config.tokenizer.path=runs/pixel_decoder
Tokens of 8x8 pixels (a dVAE's encoder alone) take four groups and images of 112x112:
    --config.dvae.groups=4 '--config.data.image_size=(112, 112)'

Cost: 3,797,174 trained parameters, 50,000 updates of 256 images; 5.1 GFLOP an image forward, beside
the tokenizer's.
Expected: not run by us at full length.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "pixel_decoder"
    config.tokenizer.path = "runs/vqkd"
    config.data.color_jitter = 0.0
    config.data.crop_scale = (0.2, 1.0)
    config.dvae.groups = 5
    config.dvae.width = 32
    config.dvae.blocks_per_group = 2
    config.train.batch_size = 256
    config.train.steps = 50_000
    config.train.ema_decay = 0.999
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.warmup_steps = 1_000
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 1.0
    return config
