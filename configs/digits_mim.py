"""Quick start, stage 2: masked image modelling on the digits' tokens, no labels used.

Command:
    python -m beit_jax.main --config=configs/digits_mim.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "mim"
    config.tokenizer.path = "runs/digits_dvae"
    config.mask.share = 0.6
    config.mask.min_block = 2
    config.train.epochs = 100.0
    config.train.batch_size = 64
    config.train.checkpoint_every = 500
    config.train.log_every = 100
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 10.0
    config.eval.knn = (10,)
    config.eval.probe = True
    config.eval.pixels = True
    config.eval.attention = (0, 1)
    return config
