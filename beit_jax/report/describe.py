"""What a run is, in a sentence and a few facts."""

from beit_jax.report.runs import Run

TASKS = {
    "dvae": "Visual tokenizer (dVAE)",
    "vqkd": "Visual tokenizer (VQ-KD)",
    "pixel_decoder": "Pixel decoder",
    "mim": "Masked image modelling",
    "classify": "Classification",
    "probe": "Linear probe",
    "segment": "Segmentation",
}


def sentence(run: Run) -> str:
    """One sentence from the run's config."""
    config = run.config
    height, width = config["data"]["image_size"]
    seen = f"images of {width} x {height} pixels"
    return {
        "dvae": _dvae,
        "vqkd": _vqkd,
        "pixel_decoder": _pixel_decoder,
        "mim": _mim,
        "classify": _classify,
        "probe": _probe,
        "segment": _segment,
    }[run.task](config, seen)


def facts(run: Run) -> list[tuple[str, str]]:
    """Names and values for the top of the page."""
    batch = run.config["train"]["batch_size"]
    hours = run.device_hours
    start = run.starts[-1] if run.starts else {}
    found = [
        ("data", run.config["data"]["source"]),
        ("updates", f"{run.updates:,} of {batch:,} images"),
        ("images seen", f"{run.updates * batch:,}"),
        ("time", duration(run.seconds)),
    ]
    if hours is not None:
        found.append(("device-hours", f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"))
    if "devices" in start:
        found.append(("devices", f"{start['devices']} x {start['device']}"))
    if "parameters" in start:
        found.append(("parameters", f"{start['parameters']:,}"))
    if len(run.starts) > 1:
        found.append(("starts", str(len(run.starts))))
    return found


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _encoder(config) -> str:
    model = config["model"]
    return (
        f"vision transformer of {model['depth']} blocks of width {model['width']} with patches of "
        f"{model['patch_size']} x {model['patch_size']}"
    )


def _dvae(config, seen: str) -> str:
    dvae = config["dvae"]
    factor = 2 ** (dvae["groups"] - 1)
    return (
        f"A discrete VAE learns to turn {seen} into tokens of {dvae['vocabulary']:,} codes, one "
        f"for each {factor} x {factor} pixels, and back."
    )


def _vqkd(config, seen: str) -> str:
    return (
        f"A {_encoder(config)} learns to give {seen} tokens of {config['vqkd']['codes']:,} codes "
        f"from which the features of {config['teacher']['path'] or 'its teacher'} can be told."
    )


def _pixel_decoder(config, seen: str) -> str:
    tokenizer = config["tokenizer"]["path"] or "a tokenizer"
    return f"A decoder learns to draw {seen} from the tokens of {tokenizer}."


def _mim(config, seen: str) -> str:
    model, data = config["model"], config["data"]
    height, width = (side // model["patch_size"] for side in data["image_size"])
    masked = round(config["mask"]["share"] * height * width)
    of = f"the tokens of {config['tokenizer']['path'] or 'its tokenizer'}"
    what = "the pixels" if config["mim"]["target"] == "pixels" else of
    branch = ", and CLS alone from its early ones (BEiT v2)" if model["early_layers"] else ""
    return (
        f"A {_encoder(config)} sees {seen} with {masked} of {height * width} patches masked, and "
        f"learns to predict {what} there from the other patches{branch}."
    )


def _classify(config, seen: str) -> str:
    labels = config["data"]["labels_per_class"]
    start = config["init"]["path"]
    return (
        f"A {_encoder(config)} learns to classify {seen}, "
        + (f"starting from {start}" if start else "from scratch")
        + (f", with {labels} labels a class." if labels else ", with all labels.")
    )


def _probe(config, seen: str) -> str:
    start = config["init"]["path"] or "an encoder"
    return f"Linear classifiers learn to tell {seen} apart by the frozen features of {start}."


def _segment(config, seen: str) -> str:
    start = config["init"]["path"]
    return f"UPerNet on a {_encoder(config)} learns to label each pixel of {seen}, " + (
        f"starting from {start}." if start else "from scratch."
    )
