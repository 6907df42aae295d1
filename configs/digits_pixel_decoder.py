"""Quick start with --v2, stage 4: pictures of the tokens that a VQ-KD gives the digits.

Command:
    python -m beit_jax.main --config=configs/digits_pixel_decoder.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "pixel_decoder"
    config.tokenizer.path = "runs/digits_vqkd"
    config.train.steps = 600
    config.train.checkpoint_every = 600
    config.train.log_every = 100
    config.train.ema_decay = 0.99
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_epochs = 12.0  # a short one leaves it blurred for hundreds of updates
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 1.0
    return config
