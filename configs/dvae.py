"""DALL-E's discrete VAE: 8,192 codes, 8x down, 97,616,006 parameters with the decoder.

Command:
    python -m beit_jax.main --config=configs/dvae.py
On your own folder of images:
    python -m beit_jax.main --config=configs/dvae.py --config.data.source=folder:PHOTOS

Cost: 3,000,000 updates of 512 images of 256x256 pixels. Not run by us at full length; shorter
runs want temperature, KL and learning-rate schedules shortened alike.
Expected: watch `usage` and `perplexity`. A usage that falls towards 0 is a collapsed codebook:
lower the learning rate or the KL weight, or take a smaller vocabulary.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "dvae"
    config.data.image_size = (256, 256)
    config.data.color_jitter = 0.0
    config.train.batch_size = 512
    config.train.steps = 3_000_000
    config.train.ema_decay = 0.999
    config.train.eval_every = 25_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.final_learning_rate = 1.25e-6
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0
    return config
