"""BEiT v2's tokenizer, taught by DINO ViT-B/16: as `vqkd_base_clip`, features of width 768.

Command:
    python -m beit_jax.convert import dino_vitbase16_pretrain.pth runs/dino
    python -m beit_jax.main --config=configs/vqkd_base_dino.py

Cost: 94,851,872 trained parameters, 250,228 updates of 512 images. Not run by us at full length.
Expected (reported by the authors, on the validation split): `usage` 100 %.
"""

from configs import vqkd_base_clip


def get_config(codebook="full"):
    config = vqkd_base_clip.get_config(codebook)
    config.teacher.path = "runs/dino"
    config.vqkd.teacher_width = 768
    return config
