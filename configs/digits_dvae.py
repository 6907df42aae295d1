"""Quick start, stage 1: a visual tokenizer for the digits.

Command:
    python -m beit_jax.main --config=configs/digits_dvae.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "dvae"
    config.train.epochs = 60.0
    config.train.checkpoint_every = 500
    config.train.ema_decay = 0.99
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 1.0
    config.dvae.temperature_steps = 400
    config.dvae.kl_weight = 0.1
    config.dvae.kl_steps = 100
    return config
