"""Linear probe of the quick start's encoder: every block, both poolings, three learning rates.

Command:
    python -m beit_jax.main --config=configs/digits_probe.py
Then on the test split, the head chosen on the validation split:
    python -m beit_jax.main --mode=eval --workdir=runs/digits_probe --config.data.eval_split=test

Cost: 62 s on two CPU cores that other work kept busy.
Expected (the quick start's encoder of seed 0): test accuracy 85.1 %, from CLS and mean of block 2.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "probe"
    config.init.path = "runs/digits_mim"
    config.probe.learning_rates = (0.1, 1.0, 10.0)
    config.train.epochs = 100.0
    config.train.batch_size = 128
    config.train.checkpoint_every = 500
    config.train.log_every = 100
    config.optimizer.learning_rate = 0.1
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0
    return config
