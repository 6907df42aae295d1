"""BEiT v2's tokenizer, taught by CLIP ViT-B/16: 8,192 codes of width 32 (official recipe).

Command, with OpenAI's archive (or Hugging Face's folder) of CLIP ViT-B/16:
    python -m beit_jax.convert import ViT-B-16.pt runs/clip
    python -m beit_jax.main --config=configs/vqkd_base_clip.py
With the deeper decoder that was published too:
    python -m beit_jax.main --config=configs/vqkd_base_clip.py --config.vqkd.decoder_depth=3

Cost: 94,655,008 trained parameters (108,829,216 with the deeper decoder), 250,228 updates of 512
images, each of which the teacher's 86 million see too. Not run by us at full length.
Expected (reported by the authors, on the validation split): `usage` 100 %, 97 % with the deeper
decoder. A falling `recent_usage` or `perplexity` is a collapsing codebook: the run says so, and
what to do. A hundred thousand images or fewer rather take an eighth of the codes, and restart dead
ones:
    python -m beit_jax.main --config=configs/vqkd_base_clip.py:small \
        --config.data.source=folder:PHOTOS
"""

from configs import common

CODEBOOKS = {
    "full": {},
    "small": {"vqkd.codes": 1024, "vqkd.restart_dead": True},
}


def get_config(codebook="full"):
    config = common.get_config()
    config.task = "vqkd"
    config.teacher.path = "runs/clip"
    config.data.color_jitter = 0.0
    config.model.positions = "absolute"
    config.model.layer_scale = 0.0
    config.model.drop_path = 0.0
    config.model.mean = (0.5, 0.5, 0.5)
    config.model.std = (0.5, 0.5, 0.5)
    config.vqkd.codes = 8192
    config.vqkd.code_width = 32
    config.vqkd.decoder_depth = 1
    config.vqkd.teacher_width = 512
    config.train.batch_size = 512
    config.train.epochs = 100.0
    config.train.eval_every = 12_500
    config.optimizer.learning_rate = 5e-5
    config.optimizer.reference_batch = 128
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0
    return common.with_preset(config, CODEBOOKS, codebook)
