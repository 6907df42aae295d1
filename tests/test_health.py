"""Every verdict is given to a run that deserves it, and to no healthy one."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from beit_jax import health, metrics, references
from beit_jax.data.pipeline import View
from beit_jax.run import Run
from beit_jax.task import Task, example_weights, mean_of_sums
from configs import (
    common,
    digits_classify,
    digits_dvae,
    digits_mim,
    digits_pixel_decoder,
    digits_vqkd,
    mim_base,
)

pytestmark = pytest.mark.smoke


def trained(*losses, every=100, **others) -> list[dict]:
    """Lines of training with these losses; others are lists alike, or one value for all."""
    lines = []
    for number, loss in enumerate(losses):
        line = {"step": max(1, number * every), "split": "train", "loss": loss, "skipped": 0.0}
        for name, values in {"lr": 1.0, **others}.items():
            line[name] = values[number] if isinstance(values, list) else values
        lines.append(line)
    return lines


def timed(rates, shares, seconds=1.0) -> list[dict]:
    return [
        {
            "step": 100 * i,
            "split": "timing",
            "images_per_second": rate,
            "data_wait_share": share,
            "step_seconds": seconds,
        }
        for i, (rate, share) in enumerate(zip(rates, shares, strict=True), 1)
    ]


def kinds(lines, recipe=common, classes=0) -> list[str]:
    return [verdict.kind for verdict in verdicts(lines, recipe, classes)]


def verdicts(lines, recipe=common, classes=0) -> list[health.Verdict]:
    return health.judge(recipe.get_config().to_dict(), lines, classes)


FALLING = (9.0, 8.0, 7.4, 7.0, 6.8, 6.7, 6.65, 6.7, 6.6)


def test_a_falling_loss_is_normal():
    (verdict,) = verdicts(trained(*FALLING))
    assert verdict.kind == health.NORMAL
    assert "from 9 to 6.65 by update 800" in verdict.evidence


def test_a_few_lines_are_too_few():
    (verdict,) = verdicts(trained(9.0, 99.0, 999.0))
    assert verdict.kind == health.EARLY and "logged 3 lines" in verdict.evidence
    assert "no update was made" in str(verdicts([])[0])


@pytest.mark.parametrize(
    "losses",
    [
        (9.0, 8.0, 7.0, 6.5, 6.4, 7.0, 7.9, 8.5, 9.5),
        (9.0, 9.3, 9.6, 10.4, 12.0, 15.0, 20.0, 33.0),  # from the start
        (0.2, -1.0, -1.5, -1.8, -1.9, -0.9, -0.8, -0.7),  # below zero, as densities may be
    ],
)
def test_a_loss_that_rises_is_diverging(losses):
    (verdict,) = verdicts(trained(*losses))
    assert verdict.kind == health.DIVERGING
    assert "was down to" in verdict.evidence and "learning_rate" in verdict.advice


def test_noise_is_not_diverging():
    flat = [9.0 + (0.3, -0.2, 0.1, -0.3, 0.2)[i % 5] for i in range(20)]
    assert kinds(trained(*flat)) == [health.NORMAL]
    assert kinds(trained(*FALLING, 40.0)) == [health.NORMAL]  # one odd batch


def test_a_dvae_whose_kl_term_is_faded_in_is_not_diverging():
    faded = (0.2, -2.0, -1.8, -1.5, -1.1, -0.8, -0.5, -0.4)  # within dvae.kl_steps
    lines = trained(*faded, perplexity=30.0)  # a line each 100 updates
    config = digits_dvae.get_config()
    config.dvae.kl_steps = 10_000
    assert health.judge(config.to_dict(), lines)[0].kind == health.NORMAL
    config.dvae.kl_steps = 0
    assert health.judge(config.to_dict(), lines)[0].kind == health.DIVERGING


def test_updates_that_are_skipped_are_diverging():
    lines = trained(*FALLING, skipped=[0.0] * 6 + [4.0, 9.0, 30.0])
    (verdict,) = verdicts(lines)
    assert verdict.kind == health.DIVERGING
    assert "30 of the last 300 updates up to 800 were not finite" in verdict.evidence
    few = trained(*FALLING, skipped=[0.0] * 6 + [1.0, 1.0, 2.0])
    assert kinds(few) == [health.NORMAL]


@pytest.mark.parametrize("accuracy", [0.02, 0.03])
def test_stuck_at_the_guess_baseline_once_the_warm_up_is_over(accuracy):
    rates = [0.0, 0.5, 1.0, 0.99, 0.9, 0.8, 0.7, 0.6, 0.5]
    lines = trained(*FALLING, lr=rates, accuracy=accuracy, guess_accuracy=0.02)
    stuck = accuracy == 0.02
    (verdict,) = verdicts(lines)
    assert verdict.kind == (health.STUCK if stuck else health.NORMAL)
    assert "2.00%" in verdict.evidence
    sooner = trained(*FALLING, every=10, lr=rates, accuracy=0.02, guess_accuracy=0.02)
    assert kinds(sooner) == [health.NORMAL]
    warming = trained(*FALLING, lr=list(range(9)), accuracy=accuracy, guess_accuracy=0.02)
    assert kinds(warming) == [health.NORMAL]


def test_stuck_among_ten_classes():
    lines = trained(*FALLING, accuracy=0.1)
    (verdict,) = verdicts(lines, digits_classify, classes=10)
    assert verdict.kind == health.STUCK and "labels belong to the images" in verdict.advice
    assert kinds(lines, digits_classify, classes=100) == [health.NORMAL]


def test_a_collapsed_codebook():
    codes = {"usage": 1.0, "perplexity": 40.0}
    lines = trained(*FALLING, recent_usage=[1.0] * 8 + [0.1], **codes)
    (verdict,) = verdicts(lines, digits_vqkd)
    assert verdict.kind == health.COLLAPSED
    assert "10.0% of the 64 codes were chosen in the last 50 updates" in verdict.evidence
    evaluated = {"step": 800, "split": "validation", "usage": 0.3, "vectors_per_code": 9.0}
    healthy = trained(*FALLING, recent_usage=1.0, **codes)
    assert kinds([*healthy, evaluated], digits_vqkd) == [health.COLLAPSED]
    few = evaluated | {"vectors_per_code": 0.3}  # which cannot choose more
    assert health.COLLAPSED not in kinds([*healthy, few], digits_vqkd)


@pytest.mark.parametrize(("perplexity", "collapsed"), [(1.3, True), (20.0, False)])
def test_a_dvae_that_uses_one_code(perplexity, collapsed):
    found = kinds(trained(*FALLING, perplexity=perplexity), digits_dvae)
    assert (health.COLLAPSED in found) == collapsed


def test_tokens_that_are_all_the_same():
    lines = trained(*FALLING, accuracy=0.99, guess_accuracy=0.9)
    found = verdicts(lines, mim_base)
    assert [v.kind for v in found] == [health.STUCK, health.COLLAPSED]
    assert "config.tokenizer.path=runs/dvae" in found[1].advice


@pytest.mark.parametrize(
    ("recipe", "metric"),
    [
        (digits_dvae, "reconstruction"),
        (digits_vqkd, "imitation"),
        (digits_mim, "loss"),
        (digits_pixel_decoder, "loss"),
    ],
)
def test_slow_beside_our_own_runs(recipe, metric):
    config = recipe.get_config().to_dict()
    (reference,) = references.alike(config)
    assert reference["metric"] == metric
    batch = config["train"]["batch_size"]
    healthy = {images // batch: high for images, _, high in reference["points"]}

    def run(seen_late: float) -> list[str]:
        """A run that learns as our slowest did, so many times more slowly."""
        known = list(healthy)
        lines = trained(*FALLING, perplexity=30.0, usage=1.0, recent_usage=1.0)[:1]
        for step in known[1:]:
            reached = [healthy[s] for s in known if s <= max(step / seen_late, 1)][-1]
            lines.append(lines[0] | {"step": step, metric: reached})
        lines[0][metric] = healthy[known[0]]
        if metric != "loss":
            lines = [line | {"loss": line[metric]} for line in lines]
        return [v.kind for v in health.judge(config, lines)]

    assert run(1) == run(1.5) == [health.NORMAL]
    assert run(6) == [health.SLOW]


def test_the_bundled_curves_are_whole():
    entries = json.loads(references.CURVES.read_text())
    for entry in entries:
        assert entry["name"] and entry["source"]
        images = [point[0] for point in entry["points"]]
        assert images == sorted(set(images))
        assert all(low <= high for _, low, high in entry["points"])
    assert {e["points"][0][1] for e in entries if len(e["points"]) == 1} == {0.0496, 6.299, 0.16}


def test_beside_what_the_authors_report():
    ends = 300 * 1_281_167 // 2048
    losses = [9.01, 8.0, 7.0, 6.8, 6.6, 6.4, 6.35, 6.3, 6.3]
    every = ends // 8 + 1
    good = trained(*losses, every=every, accuracy=[0.0] * 6 + [0.045] * 3, guess_accuracy=0.01)
    (verdict,) = verdicts(good, mim_base)
    assert verdict.kind == health.NORMAL
    slow = [line | {"accuracy": line["accuracy"] * 0.7} for line in good]
    (verdict,) = verdicts(slow, mim_base)
    assert verdict.kind == health.SLOW and "BEiT base on dVAE tokens had 0.0496" in verdict.evidence
    sooner = [line | {"step": line["step"] // 3 + 1} for line in slow]
    (verdict,) = verdicts(sooner, mim_base)
    assert verdict.kind == health.NORMAL and "0.0496 in the end" in verdict.evidence


def test_slower_than_before_and_waiting_for_data():
    lines = trained(*FALLING)
    steady, idle = [100.0] * 8, [0.05] * 8
    assert kinds(lines + timed(steady, idle)) == [health.NORMAL]
    (slow,) = verdicts(lines + timed([*steady[:5], 40.0, 30.0, 40.0], idle))
    assert slow.kind == health.SLOW
    assert "40 images a second lately, 100 before" in slow.evidence
    (bound,) = verdicts(lines + timed(steady, [*idle[:5], 0.5, 0.6, 0.7]))
    assert bound.kind == health.DATA_BOUND and "60% of the time" in bound.evidence
    assert "config.data.workers" in bound.advice and ", 3.3 minutes so far" in bound.evidence
    quick = timed(steady, [*idle[:5], 0.5, 0.6, 0.7], seconds=0.1)
    assert kinds(lines + quick) == [health.NORMAL]  # 20 seconds in all


def test_the_worst_comes_first():
    rising = (9.0, 8.0, 7.0, 6.5, 6.4, 7.0, 7.9, 8.5, 9.5)
    lines = trained(*rising, accuracy=0.01, guess_accuracy=0.02)
    assert kinds(lines + timed([100.0] * 8, [0.9] * 8)) == [
        health.DIVERGING, health.STUCK, health.DATA_BOUND
    ]  # fmt: skip


# Real runs that deserve it, of a network that compiles in no time, as `main` shows them.


def linear(config, source, run) -> Task:
    """Classification of pixels by a linear layer."""

    def sums(params, batch):
        images = batch["image"].reshape(len(batch["image"]), -1) / 255.0
        logits, weight = images @ params["kernel"], example_weights(batch)
        hits = (logits.argmax(-1) == batch["label"]) * weight
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": ((loss * weight).sum(), weight.sum()),
                "accuracy": (hits.sum(), weight.sum())}  # fmt: skip

    def loss_fn(params, model_state, frozen, batch, keys, step):
        found = sums(params, batch)
        return found["loss"], ({}, found)

    return Task(
        views={"image": View(tuple(config.data.image_size), config.data.interpolation)},
        init=lambda key: ({"kernel": jnp.zeros((64, 10))}, {}),
        loss_fn=loss_fn,
        eval_fn=lambda params, model_state, frozen, batch, keys: sums(params, batch),
        finalize=mean_of_sums,
        frozen={},
        predict=None,
        class_names=source.class_names,
    )


def said_by(tmp_path, capfd, rate: float, steps: int, **changes) -> str:
    changes = {"train__batch_size": 256, "optimizer__clip": 0.0} | changes
    tree = tiny.config("classify", optimizer__learning_rate=rate, train__steps=steps, **changes)
    Run(tree, tmp_path, jax.devices()[:1], linear).execute("train")
    return capfd.readouterr().out


def test_a_rate_far_too_high_is_diverging(tmp_path, capfd):
    said = said_by(tmp_path, capfd, 300.0, 12, optimizer__final_learning_rate=300.0)
    assert "ALARM at update 12: diverging: the loss began at 2.303, was down to " in said


def test_a_run_that_learns_nothing_is_stuck(tmp_path, capfd):
    changes = {"train__log_every": 18, "optimizer__final_learning_rate": 0.0}
    said = said_by(tmp_path, capfd, 0.0, 108, train__batch_size=64, **changes)
    assert "ALARM at update 108: stuck at the guess baseline: training accuracy is " in said
    assert "guessing scores 10.00%" in said


def test_a_healthy_run_says_so_at_its_end_alone(tmp_path, capfd):
    said = said_by(tmp_path, capfd, 0.1, 30, train__eval_every=25)
    assert "ALARM" not in said
    assert said.count("health: normal: training accuracy is ") == 1
    assert "s an update: about 0:0" in said
    timing = [line for line in metrics.read(tmp_path) if "data_wait_share" in line]
    assert timing and all(0 <= line["data_wait_share"] <= 1 for line in timing)
