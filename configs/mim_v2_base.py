"""BEiT v2 base: masked image modelling on a semantic tokenizer's codes, with the CLS branch.

Command, with the authors' tokenizer or one of your own (a VQ-KD run):
    python -m beit_jax.convert import vqkd_encoder_base_decoder_3x768x12_clip.pth runs/vqkd
    python -m beit_jax.main --config=configs/mim_v2_base.py --config.tokenizer.path=runs/vqkd
The authors' shorter schedule of 300 epochs:
    python -m beit_jax.main --config=configs/mim_v2_base.py --config.tokenizer.path=runs/vqkd \
        --config.train.epochs=300 --config.optimizer.b2=0.98 --config.model.drop_path=0.0
The papers' comparisons, each one line more:
    --config.model.early_layers=0                      no CLS branch
    --config.model.shared_head=False                   the branch has a norm and a head of its own
    --config.tokenizer.path=runs/dvae                  a dVAE's tokens
    --config.mim.target=pixels                         pixels, and no tokenizer
    --config.mim.predict=all                           every patch's token, not only the masked ones
    --config.mask.kind=random                          scattered patches instead of blocks
    --config.mask.share=0.6                            more of them

Cost: 106,143,056 trained parameters, 1,000,912 updates of 2,048 images. Not run by us.
Expected (reported by the authors, after fine-tuning): 85.5 % ImageNet top-1; 85.0 % of 300 epochs.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "mim"
    config.data.crop_scale = (0.2, 1.0)
    config.tokenizer.path = "runs/vqkd"
    config.model.layer_scale = 0.1
    config.model.drop_path = 0.1
    config.model.early_layers = 9
    config.model.head_layers = 2
    config.model.shared_head = True
    config.train.batch_size = 2048
    config.train.epochs = 1600.0
    config.train.eval_every = 12_500
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 3.0
    return config
