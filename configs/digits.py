"""What all configs of the quick start share: scikit-learn's 1,797 handwritten digits of 8x8 pixels.

A patch and its token cover 2x2 pixels, so there are 16 of them.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.data.source = "digits"
    config.data.image_size = (8, 8)
    config.data.channels = 1
    config.data.crop_scale = (0.7, 1.0)
    config.data.flip = 0.0  # a mirrored digit is not that digit
    config.data.color_jitter = 0.0
    config.data.eval_crop = 1.0
    config.data.workers = 2
    config.eval.batch_size = 128
    config.model.mean = (0.5,)
    config.model.std = (0.5,)
    config.model.patch_size = 2
    config.model.width = 64
    config.model.depth = 4
    config.model.heads = 2
    # Digits are centred, so a patch's place says much; tiny blocks learn faster at full gain.
    config.model.positions = "absolute"
    config.model.layer_scale = 0.0
    config.model.drop_path = 0.0
    config.model.dtype = "float32"
    config.dvae.dtype = "float32"
    config.dvae.groups = 2
    config.dvae.blocks_per_group = 1
    config.dvae.width = 32
    config.dvae.decoder_input = 32
    config.dvae.vocabulary = 64
    config.train.batch_size = 128
    config.train.log_every = 20
    return config
