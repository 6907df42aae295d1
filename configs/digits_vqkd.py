"""BEiT v2's tokenizer for the digits, with our own encoder of the quick start as its teacher.

Command:
    python -m beit_jax.main --config=configs/digits_vqkd.py
Then BEiT on its tokens:
    python -m beit_jax.main --config=configs/digits_mim.py --workdir=runs/digits_mim_v2 \
        --config.tokenizer.path=runs/digits_vqkd

Cost: 401 s on two CPU cores that other work kept busy.
Expected (seed 0, validation split): all 64 codes in use, perplexity 53, `imitation` 0.072; without
restarts (--config.vqkd.restart_dead=False) an alarm, then 72 % of them, perplexity 39 and 0.076.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.task = "vqkd"
    config.teacher.path = "runs/digits_mim"
    config.vqkd.codes = 64
    config.vqkd.code_width = 16
    config.vqkd.decoder_depth = 1
    config.vqkd.teacher_width = 64
    # So fast a training outruns its codebook: in 60 updates five sixths of the codes fall silent.
    config.vqkd.dead_after = 50
    config.vqkd.restart_dead = True
    config.train.steps = 1000
    config.train.checkpoint_every = 500
    config.train.log_every = 100
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0
    return config
