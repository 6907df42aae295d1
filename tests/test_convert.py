"""Foreign weights in and out, as the command line does it, against the official numbers."""

import json

import jax
import numpy as np
import pytest
import tiny
from golden_files import GOLDEN, checkpoint, load
from jax import export
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from beit_jax import architecture, augment, convert, features, metrics, portable
from beit_jax.checkpoint import Weights, load_weights, read_config
from beit_jax.errors import UserError
from beit_jax.interop import pytorch_writer
from beit_jax.run import Run

HEADS = ("--num-heads=3",)
BRANCH = ("--early-layers=2",)
# Folder, flags for what its odd sizes leave open, and the outputs that must be compared.
FOLDERS = {
    "beit_pretrain": ((), {"logits", "masked_logits", "encoder_output"}),
    "beit_pretrain_abs": (HEADS, {"logits"}),
    "beit_finetune": ((), {"logits", "features"}),
    "beit_finetune_cls": ((), {"logits", "features"}),
    "beitv2_pretrain": (BRANCH, {"logits", "cls_logits"}),
    "beitv2_pretrain_unshared": (BRANCH, {"logits", "cls_logits"}),
    "vqkd": (HEADS, {"preprocessed", "z", "tokens", "quantized", "reconstruction"}),
    "clip_vision": (HEADS, {"tokens", "projected"}),
    "dino": (HEADS, {"patch_tokens"}),
    "dall_e": ((), {"mapped", "z_logits", "tokens", "decoder_stats", "reconstruction01"}),
    "hf_beit_mim": ((), {"logits"}),
    "hf_beit_classification": ((), {"logits"}),
    "hf_beit_segmentation": ((), {"logits"}),
}


def source(name: str) -> str:
    """The weights of a golden folder: one file, or the folder where several belong together."""
    alone = GOLDEN / name / "checkpoint.pth"
    return str(alone if alone.exists() else GOLDEN / name)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Imports a golden folder once: name -> the run's folder and what was printed."""
    done, root = {}, tmp_path_factory.mktemp("imported")

    def get(name: str, capsys):
        if name not in done:
            flags, _ = FOLDERS[name]
            expected = f"--expect={GOLDEN / name / 'tensors.safetensors'}"
            capsys.readouterr()
            status = convert.main(["import", source(name), str(root / name), expected, *flags])
            done[name] = root / name, capsys.readouterr().out, status
        return done[name]

    return get


@pytest.mark.smoke
@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_gives_the_numbers_of_its_own_code(name, imported, capsys):
    _, printed, status = imported(name, capsys)
    assert status == 0, printed
    agreeing = {line.split()[1].rstrip(":") for line in printed.splitlines() if "agrees" in line}
    assert agreeing == FOLDERS[name][1]
    for line in ("recognised", "matched", "missing      none", "unexpected   none"):
        assert line in printed


@pytest.mark.parametrize(
    ("name", "style", "target"),
    [
        ("beit_pretrain", "unilm", "weights.pth"),
        ("beit_pretrain", "unilm", "weights.safetensors"),
        ("beit_pretrain_abs", "hf", "folder"),
        ("beit_finetune", "timm", "weights.safetensors"),
        ("beit_finetune_cls", "hf", "folder"),
        ("beitv2_pretrain_unshared", "unilm", "weights.pth"),
        ("vqkd", "unilm", "weights.safetensors"),
        ("dall_e", "unilm", "weights.safetensors"),
        ("hf_beit_segmentation", "hf", "folder"),
    ],
)
def test_an_export_read_back_is_bit_identical(name, style, target, imported, capsys, tmp_path):
    run, _, _ = imported(name, capsys)
    flags, _ = FOLDERS[name]
    out = str(tmp_path / target)
    assert convert.main(["export", str(run), out, f"--format={style}"]) == 0
    assert convert.main(["import", out, str(tmp_path / "again"), *flags]) == 0
    first, second = (load_weights(str(path), "a test") for path in (run, tmp_path / "again"))
    assert first.digest == second.digest
    assert first.config["task"] == second.config["task"]
    if style == "hf":  # which says everything beside the weights
        assert first.config["model"] == second.config["model"]


def test_an_export_is_what_the_other_project_wrote(imported, capsys, tmp_path):
    run, _, _ = imported("hf_beit_mim", capsys)
    assert convert.main(["export", str(run), str(tmp_path / "out"), "--format=hf"]) == 0
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load("hf_beit_mim/model")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["architectures"] == ["BeitForMaskedImageModeling"]


def test_what_a_format_cannot_say_is_left_out_aloud_or_refused(imported, capsys, tmp_path):
    run, _, _ = imported("beitv2_pretrain", capsys)
    assert convert.main(["export", str(run), str(tmp_path / "hf"), "--format=hf"]) == 0
    assert "CLS branch is left out" in capsys.readouterr().out
    run, _, _ = imported("dino", capsys)
    assert convert.main(["export", str(run), str(tmp_path / "x.pth"), "--format=unilm"]) == 1
    assert "no network of task 'teacher'" in capsys.readouterr().err


def test_wrong_numbers_are_seen_and_leave_no_folder(capsys, tmp_path):
    expected = load("beit_finetune/tensors")
    save_file({"image": expected["image"], "logits": expected["logits"] + 1e-3}, tmp_path / "e")
    command = ["import", str(GOLDEN / "beit_finetune"), str(tmp_path / "run")]
    assert convert.main([*command, f"--expect={tmp_path / 'e'}"]) == 1
    assert "DIFFERS      logits: largest difference 0.001" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert convert.main([*command, f"--expect={tmp_path / 'e'}", "--atol=0.01"]) == 0


def test_tokens_are_counted_not_measured(capsys, tmp_path):
    expected = load("vqkd/tensors")
    expected["tokens"][0, 0] += 1
    save_file({name: expected[name] for name in ("image01", "tokens")}, tmp_path / "e")
    command = ["import", source("vqkd"), str(tmp_path / "run"), *HEADS]
    assert convert.main([*command, f"--expect={tmp_path / 'e'}", "--atol=9"]) == 1
    assert "96.88% of the tokens equal" in capsys.readouterr().out


def test_an_imported_classifier_is_evaluated_like_any_run(imported, capsys):
    folder, _, _ = imported("beit_finetune", capsys)
    config = ConfigDict(read_config(folder))
    config.data.source, config.data.eval_split, config.data.workers = "digits", "test", 0
    Run(config, folder, jax.devices()[:1]).execute("eval")
    (scores,) = (line for line in metrics.read(folder) if line["split"] == "test")
    assert 0 <= scores["accuracy"] <= 1
    with pytest.raises(UserError, match="--config.init.path"):
        Run(config, folder, jax.devices()[:1]).execute("train")


def test_weights_of_another_number_of_classes_are_not_evaluated(imported, capsys, tmp_path):
    src = partial(
        tmp_path,
        **{"head.weight": np.zeros((7, 48), np.float32), "head.bias": np.zeros(7, np.float32)},
    )
    assert convert.main(["import", src, str(tmp_path / "run")]) == 0
    config = ConfigDict(read_config(tmp_path / "run"))
    config.data.source, config.data.eval_split, config.data.workers = "digits", "test", 0
    with pytest.raises(UserError, match=r"head/bias is \(7,\) in .* but \(10,\)"):
        Run(config, tmp_path / "run", jax.devices()[:1]).execute("eval")


@pytest.mark.parametrize("tokenizer", ["dall_e", "vqkd"])
def test_imported_tokenizers_and_encoders_are_those_of_a_run(tokenizer, imported, capsys, tmp_path):
    tokens, _, _ = imported(tokenizer, capsys)
    start, _, _ = imported("beit_pretrain", capsys)
    sizes = dict(width=48, depth=3, heads=3, patch_size=16, layer_scale=0.1)
    sizes["positions"] = "shared_relative"
    config = tiny.config(
        "mim",
        tokenizer__path=str(tokens),
        init__path=str(start),
        data__channels=3,
        data__image_size=(64, 64),
        **{f"model__{key}": value for key, value in sizes.items()},
    )
    run = tiny.run(config, tmp_path / "run", jax.devices()[:1])
    state = tiny.fresh_state(run)
    first, taken = load_weights(str(start), "a test").params, state.params
    np.testing.assert_array_equal(
        taken["encoder"]["block_2"]["attn"]["qkv"]["kernel"],
        first["encoder"]["block_2"]["attn"]["qkv"]["kernel"],
    )
    batch = {name: rows[:4] for name, rows in next(run.split_batches("test")).items()}
    keys = jax.random.split(jax.random.key(0), 4)
    sums = run.task.eval_fn(state.params, {}, run.task.frozen, batch, keys)
    codes, _ = sums["guess_accuracy"]
    assert codes.shape == ({"dall_e": 512, "vqkd": 64}[tokenizer],) and codes.sum() > 0


def test_features_of_imported_towers_come_with_their_preprocessing(imported, capsys):
    run, _, _ = imported("clip_vision", capsys)
    encoder = features.load(str(run))
    images = np.random.default_rng(0).integers(0, 256, (2, 80, 100, 3), np.uint8)
    vectors = encoder(images, pooling="cls")
    assert vectors.shape == (2, 48) and np.isfinite(vectors).all()
    assert encoder.config["model"]["mean"] == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize("name", ["beit_pretrain", "beit_finetune"])
def test_a_stablehlo_file_is_the_network_for_any_batch(name, imported, capsys, tmp_path):
    run, _, _ = imported(name, capsys)
    file = tmp_path / "network.stablehlo"
    assert convert.main(["export", str(run), str(file), "--format=stablehlo"]) == 0
    assert "uint8 (batch, 64, 64, 3)" in capsys.readouterr().out
    network = export.deserialize(file.read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    weights = load_weights(str(run), "a test")
    model = weights.config["model"]
    if name == "beit_pretrain":
        extract = features.make_extractor(weights.config)
        expected = extract(weights.params["encoder"], images)["mean"][:, -1]
    else:
        classifier = architecture.make_classifier(weights.config, 10)
        pixels = augment.normalize(images, model["mean"], model["std"])
        expected = classifier.apply({"params": weights.params}, pixels)
    np.testing.assert_allclose(network.call(images), expected, atol=1e-5)
    np.testing.assert_allclose(network.call(images[:1]), expected[:1], atol=1e-5)


def test_a_stablehlo_file_that_a_gpu_machine_writes_runs_elsewhere(monkeypatch):
    config = tiny.config("mim", model__dtype="bfloat16")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    params = architecture.make_encoder(config).init(jax.random.key(0), images / 255)["params"]
    tiny.pretend_gpu(monkeypatch, "9.0")
    written, _ = portable.stablehlo(
        Weights({"encoder": params}, {}, config.to_dict(), "a test", "")
    )
    assert np.isfinite(export.deserialize(written).call(images)).all()


def test_stablehlo_without_a_cpu_is_one_sentence(imported, capsys, monkeypatch):
    run, _, _ = imported("beit_pretrain", capsys)

    def local_devices(backend=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(UserError, match="JAX_PLATFORMS"):
        portable.stablehlo(load_weights(str(run), "a test"))


def test_inspect_tells_of_files_and_of_runs(imported, capsys):
    assert convert.main(["inspect", source("vqkd")]) == 0
    printed = capsys.readouterr().out
    assert "PyTorch archive (zip)" in printed and "quantize.embedding.weight" in printed
    assert "--num-heads" in printed  # cannot be told from these odd sizes, and says so
    run, _, _ = imported("beit_pretrain", capsys)
    assert convert.main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "task mim" in printed and "params/encoder/cls_token" in printed


def partial(tmp_path, **changes) -> str:
    """beit_finetune's weights with some tensors changed, or left out where None."""
    tensors = {**checkpoint("beit_finetune/checkpoint"), **changes}
    path = tmp_path / "weights"
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    return str(path)


def refusal(capsys, *arguments) -> str:
    assert convert.main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error
    return error


def test_a_shortfall_in_the_encoder_is_an_error_unless_allowed(capsys, tmp_path):
    src, dst = partial(tmp_path, **{"blocks.1.attn.q_bias": None}), tmp_path / "run"
    assert "lacks encoder/block_1/attn/q_bias" in refusal(capsys, "import", src, dst)
    assert convert.main(["import", src, str(dst), "--allow-partial"]) == 0
    assert "1 (initialised afresh): encoder/block_1/attn/q_bias" in capsys.readouterr().out
    taken = load_weights(str(dst), "a test").params["encoder"]["block_1"]["attn"]
    assert not taken["q_bias"].any() and taken["v_bias"].any()


def test_a_shortfall_in_the_head_is_only_reported(capsys, tmp_path):
    src = partial(tmp_path, **{"head.bias": None})
    assert convert.main(["import", src, str(tmp_path / "run")]) == 0
    assert "1 (initialised afresh): head/bias" in capsys.readouterr().out


def test_what_has_no_place_is_an_error_unless_allowed(capsys, tmp_path):
    src, dst = partial(tmp_path, surplus=np.zeros(3, np.float32)), tmp_path / "run"
    assert "surplus" in refusal(capsys, "import", src, dst)
    assert convert.main(["import", src, str(dst), "--allow-partial"]) == 0
    assert "unexpected   1 (left out" in capsys.readouterr().out


def test_values_that_are_not_finite_are_warned_of_by_name(capsys, tmp_path):
    bad = np.full(48, np.nan, np.float32)
    src = partial(tmp_path, **{"blocks.0.gamma_1": bad})
    assert convert.main(["import", src, str(tmp_path / "run")]) == 0
    warning = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("WARNING"))
    assert "encoder/block_0/gamma_1" in warning and "block_1" not in warning


def test_mistakes_get_one_sentence(capsys, tmp_path):
    finetune, dst = GOLDEN / "beit_finetune", tmp_path / "run"
    absolute = GOLDEN / "beit_pretrain_abs"
    assert "--num-heads" in refusal(capsys, "import", absolute, dst)
    assert "does not divide" in refusal(capsys, "import", absolute, dst, "--num-heads=5")
    assert "--early-layers" in refusal(capsys, "import", GOLDEN / "beitv2_pretrain", dst)
    assert "is there already" in refusal(capsys, "import", finetune, tmp_path)
    assert "no such" in refusal(capsys, "import", tmp_path / "nothing", dst).lower()
    expected = f"--expect={GOLDEN / 'dino' / 'tensors.safetensors'}"
    assert "no output of this network" in refusal(capsys, "import", finetune, dst, expected)
    expected = f"--expect={GOLDEN / 'dall_e' / 'tensors.safetensors'}"
    assert "has no image" in refusal(capsys, "import", finetune, dst, expected)
    assert "required" in refusal(capsys, "export", dst, tmp_path / "out")
    assert "holds no finished" in refusal(capsys, "export", dst, tmp_path / "o", "--format=hf")
    assert "invalid choice" in refusal(capsys, "export", dst, tmp_path / "o", "--format=onnx")
    assert "*.safetensors or *.pth" in refusal(
        capsys, "export", dst, tmp_path / "out", "--format=unilm"
    )
    unknown = tmp_path / "unknown"
    save_file({"fc.weight": np.zeros((2, 3), np.float32)}, unknown)
    assert "no known family" in refusal(capsys, "import", unknown, dst)
    misfit = partial(tmp_path, **{"patch_embed.proj.weight": np.zeros((48, 3), np.float32)})
    assert "what that family never has" in refusal(capsys, "import", misfit, dst)
    assert not dst.exists()


def run_of(tmp_path, capsys, src, *flags) -> tuple[dict, str]:
    """Imports `src`; the config of the run, and what was printed."""
    assert convert.main(["import", str(src), str(tmp_path / "run"), *flags]) == 0
    return read_config(tmp_path / "run"), capsys.readouterr().out


def saved(tmp_path, tensors, **jsons) -> str:
    """A folder with weights and the JSON files beside them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    for name, content in jsons.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_a_config_or_a_flag_that_contradicts_the_weights_is_refused(capsys, tmp_path):
    dst = tmp_path / "run"
    tensors = checkpoint("beit_finetune/checkpoint")
    for name, value in {"num_hidden_layers": 9, "hidden_size": 64, "image_size": 32}.items():
        (tmp_path / name).mkdir()
        folder = saved(tmp_path / name, tensors, config={name: value})
        said = refusal(capsys, "import", folder, dst)
        assert f"says {name}={value if name != 'image_size' else (32, 32)}" in said
    assert "have 3 heads" in refusal(
        capsys, "import", source("beit_finetune"), dst, "--num-heads=6"
    )
    v2 = source("beitv2_pretrain")
    assert "no CLS branch" in refusal(capsys, "import", source("beit_pretrain"), dst, *BRANCH)
    assert "not between 0 and" in refusal(capsys, "import", v2, dst, "--early-layers=-2")
    assert "not between 0 and" in refusal(capsys, "import", v2, dst, "--early-layers=3")


def test_a_null_in_a_config_says_nothing_and_nonsense_is_refused(capsys, tmp_path):
    tensors = checkpoint("beit_finetune/checkpoint")
    config, _ = run_of(
        tmp_path, capsys, saved(tmp_path, tensors, config={"pretrained_cfg": {"crop_pct": None}})
    )
    assert config["data"]["eval_crop"] == 0.875
    (tmp_path / "zero").mkdir()
    cfg = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0, 0, 0]}}
    folder = saved(tmp_path / "zero", tensors, config=cfg)
    assert "config.model.std" in refusal(capsys, "import", folder, tmp_path / "run2")
    assert not (tmp_path / "run2").exists()


def test_a_missing_block_is_no_smaller_network(capsys, tmp_path):
    tensors = checkpoint("beit_finetune/checkpoint")
    gap = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}
    save_file(gap, tmp_path / "gap")
    for flags in ((), ("--allow-partial",)):
        said = refusal(capsys, "import", tmp_path / "gap", tmp_path / "run", *flags)
        assert "lack blocks.1." in said


def test_weights_of_one_channel_are_normalised_with_one_number(capsys, tmp_path):
    grey = np.zeros((48, 1, 16, 16), np.float32)
    config, _ = run_of(tmp_path, capsys, partial(tmp_path, **{"patch_embed.proj.weight": grey}))
    assert config["model"]["mean"] == (0.5,)
    images = np.zeros((1, 64, 64, 1), np.uint8)
    assert features.load(str(tmp_path / "run"))(images).shape == (1, 48)


def test_what_a_file_cannot_hold_is_said_on_the_way_out_and_assumed_aloud(
    imported, capsys, tmp_path
):
    run, _, _ = imported("beitv2_pretrain", capsys)
    assert convert.main(["export", str(run), str(tmp_path / "x.pth"), "--format=unilm"]) == 0
    printed = capsys.readouterr().out
    assert "the CLS branch starts after 2 blocks" in printed and "mean (0.485" in printed
    _, printed, _ = imported("dino", capsys)
    assert "CLS branch" not in printed


def test_averaged_weights_beside_the_others_are_mentioned(capsys, tmp_path):
    tensors = checkpoint("beit_finetune/checkpoint")
    pytorch_writer.write(tmp_path / "ema.pth", tensors, key="model_ema")
    _, printed = run_of(tmp_path, capsys, tmp_path / "ema.pth")
    assert "not read" not in printed  # alone they are the weights


def test_an_empty_expect_is_a_mistake(capsys, tmp_path):
    said = refusal(capsys, "import", source("beit_finetune"), tmp_path / "run", "--expect=")
    assert "--expect is empty" in said


def test_an_evaluation_leaves_no_tokenizer_behind(imported, capsys, tmp_path):
    run, _, _ = imported("beit_pretrain", capsys)
    tokens, _, _ = imported("vqkd", capsys)
    config = ConfigDict(read_config(run))
    config.update_from_flattened_dict(
        {
            "data.source": "digits",
            "data.eval_split": "validation",
            "data.workers": 0,
            "tokenizer.path": str(tokens),
            "mask.min_block": 1,
        }
    )
    evaluated = Run(config, run, jax.devices()[:1])
    assert set(evaluated.task.copies) == {"tokenizer"} and not (run / "frozen").exists()
    config.data.image_size = (32, 32)
    with pytest.raises(UserError, match="gives 4x4 tokens, but .* make 2x2 patches"):
        Run(config, run, jax.devices()[:1])
