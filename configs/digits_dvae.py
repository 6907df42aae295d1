"""Quick start, stage 1: a visual tokenizer for the digits.

Command:
    python -m beit_jax.main --config=configs/digits_dvae.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "dvae"
    config.train.steps = 1500
    config.train.checkpoint_every = 500
    config.train.log_every = 100
    config.train.ema_decay = 0.99
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 1.0
    config.dvae.temperature_steps = 1200
    config.dvae.kl_weight = 1.0
    config.dvae.kl_steps = 100
    return config
