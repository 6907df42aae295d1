"""Linear probe of BEiT base on ImageNet-1k: frozen features of every block (official recipe).

Command:
    python -m beit_jax.main --config=configs/linear_probe_base.py --config.init.path=runs/mim_base
BEiT v2, and imported weights of any encoder, alike:
    python -m beit_jax.main --config=configs/linear_probe_base.py --config.init.path=runs/beit_base

Heads on CLS and the mean of the patches together (`heads/both_*`) at factor 1 of the learning rate
are the official ones, but that 1 % of the training images is held out to choose the head by:
100 epochs of 1,024 images, AdamW at 4e-3 to 0 by a cosine without warm-up, weight decay 1e-4. The
official code lowers the rate once an epoch, here it falls with every update. Without the others:
    --config.probe.learning_rates=1
Pixels are normalised as the encoder's run did.

Cost: 123,864 updates, of the encoder only forwards; 144 heads of 147,600,000 weights together. Not
run by us. Expected (reported by the authors): 56.7 % with BEiT base, at block 9.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "probe"
    config.init.path = "runs/mim_base"
    config.data.train_split = "train[:99%]"
    config.eval.select_split = "train[99%:]"
    config.data.eval_split = "validation"
    config.data.color_jitter = 0.0
    config.probe.learning_rates = (0.1, 0.3, 1.0, 3.0)
    config.train.batch_size = 1024
    config.train.epochs = 100.0
    config.optimizer.learning_rate = 4e-3
    config.optimizer.reference_batch = 1024
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0  # the norm of all heads together would tie them to each other
    return config
