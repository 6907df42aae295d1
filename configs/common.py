"""Every key that a recipe may set, with its unit and its default.

`get_config` returns the tree locked: a recipe or a command line can change a value, never invent
a key, so a misspelt `--config.x` fails at once. Nothing here is derived: steps, warm-up, the number
of masked patches and the tokenizer's view are worked out after all overrides, by the code that
needs them. The defaults are those shared by the published BEiT recipes; a recipe says the rest. A
run that is older than a key is read with its default, so that of a new key means "as before".
"""

from collections.abc import Mapping

from ml_collections import ConfigDict


def with_preset(config: ConfigDict, presets: Mapping[str, Mapping], name: str) -> ConfigDict:
    """Applies the one of a recipe's presets that `--config=FILE.py:NAME` asks for.

    Args:
      config: the recipe without it.
      presets: name -> {"section.key": value}.
      name: what follows the colon.
    """
    if name not in presets:
        raise LookupError(f"there is no preset {name!r}; choose one of {', '.join(presets)}")
    config.update_from_flattened_dict(presets[name])
    return config


def get_config() -> ConfigDict:
    """Returns the locked tree of all keys."""
    config = ConfigDict()
    config.task = "mim"  # dvae | vqkd | pixel_decoder | mim | classify | probe | segment
    config.seed = 0

    config.data = data = ConfigDict()
    data.source = "tfds:imagenet2012"  # digits | folder:PATH | tfds:NAME[/CONFIG][:VERSION]
    data.data_dir = ""  # where TFDS datasets lie; "" is TFDS's own default, $TFDS_DATA_DIR or ~
    data.train_split = "train"
    data.eval_split = "validation"  # read by evaluation; TFDS slices such as train[99%:] work
    data.predict_split = "all"  # read by --mode=predict; all: every image of the source
    data.holdout = 0.05  # share of a folder without train/ and validation/ that is held out
    data.labels_per_class = 0  # seeded, balanced subset of the training split; 0 takes all of it
    data.image_size = (224, 224)  # pixels, height and width
    data.channels = 3
    data.max_value = 65535  # the value of 16-bit sources that becomes 255
    data.interpolation = "bicubic"
    # Segmentation cuts by config.segment in place of these two and of eval_crop.
    data.crop_scale = (0.08, 1.0)  # share of the image's area in a random resized crop
    data.crop_ratio = (3 / 4, 4 / 3)  # width over height of that crop
    data.flip = 0.5  # probability of a horizontal flip
    data.color_jitter = 0.4  # brightness, contrast and saturation; 0 switches it off
    data.rand_augment = 0.0  # RandAugment's magnitude, at most 10 (two operations); 0: none
    data.eval_crop = 0.875  # the centre crop's share of the resized shorter side
    data.workers = -1  # threads that read and decode; -1: one a core, at most 16; 0: none
    data.max_bad_share = 0.01  # share of unreadable images that is still tolerated

    config.model = model = ConfigDict()  # the vision transformer
    model.patch_size = 16  # pixels
    model.width = 768
    model.depth = 12
    model.heads = 12
    model.mlp_ratio = 4.0
    model.positions = "shared_relative"  # absolute, relative, shared_relative, or absolute+relative
    model.layer_scale = 0.1  # initial value; 0 leaves LayerScale out
    model.drop_path = 0.1  # of the last block; linear over depth from 0
    model.pooling = "mean"  # classify: mean (of patches, own norm) | cls
    model.early_layers = 0  # mim: blocks below BEiT v2's CLS branch; 0: no branch
    model.head_layers = 2  # blocks of that branch
    model.shared_head = True  # whether the branch predicts with the encoder's own norm and head
    model.qkv_bias = "qv"  # attention biases: qv (BEiT) | qkv (DINO, CLIP) | none
    model.activation = "gelu"  # gelu | quick_gelu (CLIP)
    model.norm_epsilon = 1e-6
    model.norm_pre = False  # a LayerNorm before the first block, as CLIP has
    model.patch_bias = True  # bias of the patch embedding; CLIP has none
    model.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; one number serves all channels
    model.std = (0.229, 0.224, 0.225)
    model.dtype = "bfloat16"  # compute; parameters stay float32
    model.remat = False  # recompute each block in the backward pass: less memory, more FLOPs

    config.dvae = dvae = ConfigDict()
    dvae.vocabulary = 8192
    dvae.width = 256  # channels of the first group; doubled by each group
    dvae.groups = 4  # each but the last halves height and width: 4 groups are 8x down
    dvae.blocks_per_group = 2
    dvae.decoder_input = 128  # channels after the decoder's first convolution
    dvae.dtype = "bfloat16"
    dvae.temperature = (1.0, 1 / 16)  # Gumbel-softmax, from and to, cosine
    dvae.temperature_steps = 150_000  # updates
    dvae.kl_weight = 6.6
    dvae.kl_steps = 5_000  # updates over which the weight rises from 0, cosine

    config.vqkd = vqkd = ConfigDict()  # BEiT v2's tokenizer; its encoder is config.model
    vqkd.codes = 8192
    vqkd.code_width = 32
    vqkd.decoder_depth = 1  # blocks, which are like the encoder's; 1 or 3 were published
    vqkd.teacher_width = 512  # of the features that it imitates: 512 (CLIP) | 768 (DINO)
    vqkd.decay = 0.99  # share of a code that stays when it follows its vectors' mean, each update
    vqkd.kmeans = 10  # iterations that place the codes before the first update; 0: random codes
    vqkd.kmeans_vectors = 10  # vectors that these see for each code, at least
    vqkd.dead_after = 1_000  # updates without being chosen after which a code counts as dead
    vqkd.restart_dead = False  # whether dead codes start again from vectors of the batch
    vqkd.alarm_usage = 0.5  # share of the codes below which a run says that they collapse

    config.teacher = teacher = ConfigDict()  # what config.vqkd imitates
    teacher.path = ""  # run folder of an imported CLIP or DINO, or of any encoder

    config.tokenizer = tokenizer = ConfigDict()
    tokenizer.path = ""  # run folder of a dVAE, a VQ-KD or a pixel decoder on one

    config.init = init = ConfigDict()
    init.path = ""  # a run folder whose encoder is the starting point

    config.mim = mim = ConfigDict()  # the papers' comparisons
    mim.target = "tokens"  # tokens (of config.tokenizer) | pixels (squared error of a patch's)
    mim.predict = "masked"  # masked | all: the patches whose prediction training counts

    config.mask = mask = ConfigDict()
    mask.kind = "blockwise"  # blockwise | random
    mask.share = 75 / 196  # of the patches; rounded to a whole number of patches
    mask.min_block = 16  # patches
    mask.aspect = 0.3  # least aspect ratio of a block; the largest is its inverse

    config.classify = classify = ConfigDict()
    classify.label_smoothing = 0.1
    classify.mixup = 0.0  # of Beta(a, a), the share of an image blended with another; 0: no mixup
    classify.cutmix = 0.0  # of Beta(a, a), the share of an image that a box of another leaves
    classify.mix_switch = 0.5  # probability of cutmix where there are both
    classify.erase = 0.0  # probability that a random box of an image becomes noise
    classify.head_scale = 0.001  # factor on the head's initial weights

    config.probe = probe = ConfigDict()  # linear heads on the frozen encoder of config.init.path
    probe.learning_rates = (1.0,)  # of a head each, as multiples of optimizer.learning_rate

    config.segment = segment = ConfigDict()  # UPerNet on the encoder
    segment.classes = 0  # of the label maps; 0: as many as the data's list of names has
    segment.reduce_zero_label = False  # whether label maps hold 0 for no class, k + 1 for class k
    segment.taps = (4, 6, 8, 12)  # blocks below each of its four levels, finest first
    segment.pools = (1, 2, 3, 6)  # cells down and across that the coarsest level is averaged over
    segment.auxiliary_width = 256  # channels of the auxiliary head; 0: no such head
    segment.dropout = 0.1  # share of the channels that classes do not see in training
    segment.auxiliary_weight = 0.4  # of the auxiliary head's loss beside the other's
    segment.short_side = 512  # pixels that images' shorter side is resized to; 4 times the longer
    segment.resize = (0.5, 2.0)  # factor on that in training, by chance; data.image_size is cut out
    segment.max_category = 0.75  # share of a training window that one class may fill
    segment.photometric = True  # mmsegmentation's distortion of colours in training
    segment.stride = 341  # pixels between evaluation's windows; 0: images as a whole in one window
    segment.scales = (1.0,)  # factors on short_side in evaluation, averaged over probabilities
    segment.mirror = False  # whether evaluation averages over mirrored images too

    config.optimizer = optimizer = ConfigDict()  # AdamW
    optimizer.learning_rate = 1.5e-3  # peak
    optimizer.reference_batch = 0  # where the rate is quoted for; 0: absolute, not scaled by batch
    optimizer.schedule = "cosine"  # cosine | linear; from the peak to
    optimizer.final_learning_rate = 1e-5
    optimizer.warmup_epochs = 10.0
    optimizer.warmup_steps = 0  # updates; overrides warmup_epochs where above 0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.05
    optimizer.clip = 3.0  # global gradient norm; 0 switches it off
    optimizer.layer_decay = 1.0  # factor on the learning rate per block away from the head

    config.train = train = ConfigDict()
    train.batch_size = 2048  # images of one update, over all devices and microbatches
    train.epochs = 800.0
    train.steps = 0  # updates; overrides epochs where above 0
    train.accumulate = 1  # microbatches of one update
    train.ema_decay = 0.0  # of the averaged weights, which evaluation then reads; 0: none
    train.log_every = 50  # updates
    train.eval_every = 0  # updates; 0 evaluates at the end only
    train.checkpoint_every = 2_500  # updates
    train.keep = 2  # newest checkpoints; the best is kept beside them
    train.max_skipped = 20  # non-finite updates in a row that end the run
    train.max_failed_saves = 10  # saves in a row, a minute apart, whose failure ends the run

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 256
    evaluation.best = "loss"  # the evaluation metric that chooses the best checkpoint
    evaluation.maximize = False  # whether a larger value of it is better
    evaluation.raw = False  # also score the weights that train.ema_decay averages, as raw_<metric>
    evaluation.knn = ()  # neighbours of the k-NN on labelled sources, such as (10, 20); (): none
    evaluation.probe = False  # linear probe on frozen features of labelled sources
    evaluation.blocks = ()  # blocks whose features these two score, 0 the first; (): all
    evaluation.select_split = "validation"  # where these two choose block, pooling and k
    evaluation.pixels = False  # score raw pixels beside the features; for small images
    evaluation.attention = ()  # heads of the last block whose attention is drawn; (): none

    config.log = log = ConfigDict()  # beside metrics.jsonl and TensorBoard
    log.wandb = ""  # project of Weights & Biases; "": none
    log.mlflow = ""  # tracking URI of MLflow, such as http://HOST:5000; "": none

    config.mesh = mesh = ConfigDict()
    mesh.fsdp = 1  # devices that share one copy of the parameters; the rest is data-parallel
    mesh.start_timeout = 60  # seconds until all processes of a run must have come, devices ready
    mesh.heartbeat_timeout = 30  # seconds of silence after which a process counts as lost

    config.lock()
    return config
