"""Quick start with --v2, stage 3: BEiT v2's tokenizer, taught by the quick start's own encoder.

Command:
    python -m beit_jax.main --config=configs/digits_vqkd.py

Expected (seed 0, validation split): all 64 codes in use, perplexity 52, `imitation` 0.075. Without
restarts (--config.vqkd.restart_dead=False; measured with batches of 128) an alarm, then 72 % of the
codes and perplexity 39 instead of 53.
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
    config.train.batch_size = 64
    config.train.steps = 1000
    config.train.checkpoint_every = 500
    config.train.log_every = 100
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0
    return config
