"""BEiT base, pre-trained by masked image modelling on ImageNet-1k (official 800-epoch recipe).

Command:
    python -m beit_jax.main --config=configs/mim_base.py --config.tokenizer.path=runs/dvae
On your own folder of images, no labels needed:
    python -m beit_jax.main --config=configs/mim_base.py --config.tokenizer.path=runs/dvae \
        --config.data.source=folder:PHOTOS

Cost: 91,965,776 trained parameters, 500,456 updates of 2,048 images. Not run by us at full length.
Expected (reported by the authors for 300 epochs): masked-token accuracy 4.96 %, loss 6.30; 83.2 %
ImageNet top-1 after fine-tuning in the paper, whose plain form without relative positions is
    --config.model.positions=absolute --config.model.layer_scale=0
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "mim"
    config.train.batch_size = 2048
    config.train.epochs = 800.0
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 3.0
    config.model.layer_scale = 0.1
    config.model.drop_path = 0.1
    config.tokenizer.path = "runs/dvae"
    config.train.eval_every = 12_500
    config.eval.attention = (0, 3, 6)
    return config
