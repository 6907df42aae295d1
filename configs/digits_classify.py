"""Quick start, stage 3: fine-tuning on a few labelled digits, from pre-training or from scratch.

Command:
    python -m beit_jax.main --config=configs/digits_classify.py --config.data.labels_per_class=10
From scratch, same budget:
    python -m beit_jax.main --config=configs/digits_classify.py --config.data.labels_per_class=10 \
        --config.init.path= --config.optimizer.layer_decay=1 --workdir=runs/digits_scratch
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "classify"
    config.init.path = "runs/digits_mim"
    config.train.batch_size = 32
    config.train.steps = 600
    config.train.checkpoint_every = 1000
    config.train.log_every = 100
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.warmup_steps = 30
    config.optimizer.layer_decay = 0.75
    config.classify.head_scale = 1.0
    config.eval.best = "accuracy"
    config.eval.maximize = True
    return config
