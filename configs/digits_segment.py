"""Segmentation of the digits: whose stroke is each pixel? From the quick start's pre-training.

A pixel's class is its digit where there is ink, else the background: eleven classes, told apart
only by the whole stroke.

Command:
    python -m beit_jax.main --config=configs/digits_segment.py
From scratch, same budget:
    python -m beit_jax.main --config=configs/digits_segment.py --config.init.path= \
        --config.optimizer.layer_decay=1 --workdir=runs/digits_segment_scratch

Cost: 270 s on two CPU cores that other work kept busy.
Expected (seed 0, mIoU of the test split; validation in brackets), with `digits_mim` from seed 0:

    labels a digit                from scratch     from pre-training
    5 (data.labels_per_class=5)   55.4 % (57.0)    61.5 % (60.8)
    all                           94.5 % (97.8)    96.8 % (96.3)

Calling every pixel background gives 6 %.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "segment"
    config.init.path = "runs/digits_mim"
    config.segment.classes = 11
    config.segment.taps = (1, 2, 3, 4)
    config.segment.pools = (1, 2)
    config.segment.auxiliary_width = 32
    config.segment.short_side = 8
    config.segment.resize = (1.0, 1.0)
    config.segment.max_category = 1.0
    config.segment.photometric = False
    config.segment.stride = 0
    config.train.batch_size = 32
    config.train.steps = 300
    config.train.checkpoint_every = 300
    config.train.log_every = 100
    config.optimizer.schedule = "linear"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.warmup_steps = 15
    config.optimizer.layer_decay = 0.75
    config.eval.best = "mIoU"
    config.eval.maximize = True
    return config
