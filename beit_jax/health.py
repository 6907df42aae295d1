"""Is my run healthy? Verdicts in words, from what a run has written so far and nothing else.

Each has its evidence and what to try. `main` says them at evaluations, the report at any time.
What is compared is the median of the last lines of training, as one batch says little.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from beit_jax import metrics, references

NORMAL = "normal"
EARLY = "too early to say"
DIVERGING = "diverging"
STUCK = "stuck at the guess baseline"
COLLAPSED = "collapsed codebook"
SLOW = "slow"
DATA_BOUND = "data-bound"
FINE = (NORMAL, EARLY)  # nothing to act on

WINDOW = 3  # lines whose median counts: the fewest of which one odd batch cannot decide
ENOUGH = 2 * WINDOW  # lines of training from which on a verdict is dared: two whole windows
# Share of the updates lately that were not finite. Half precision skips one now and then.
SKIPPED = 0.05
# Of what the loss has fallen in all, the part that it has risen again. On the digits, the median
# never rises by more than a tenth.
RISEN = 0.25
NOISE = 3  # times how far lines stand beside their trend: what a rise must exceed to be none of it
# Factor on what guessing scores. The digits' encoders are beyond 1.4 when the warm-up ends.
ABOVE_GUESS = 1.1
# Updates after the warm-up that a run may take to get there; the digits' take fewer than that.
PATIENCE = 100
# Effective number of codes, as a share of all: 164 of 8,192. The digits' tokenizers use 40 %, and
# two codes are too few for any number of them.
PERPLEXITY = 0.02
# Share of one code among all tokens. It is 5 to 13 % on the digits, with 64 codes.
COMMONEST = 0.5
# Of the run's usual images a second, what is left. Neighbours on a shared machine cost less.
SLOWED = 0.5
# Share of the time that devices stood idle for a batch: what faster reading can gain at most. In a
# run that has lost less than a minute so, it is not worth a person's time.
WAITING, WAITED = 0.3, 60.0

Lines = list[dict]


class Verdict(NamedTuple):
    """How a run is doing: one of the kinds above, what shows it, and what to try."""

    kind: str
    evidence: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.evidence}" + (f"; {self.advice}." if self.advice else ".")


def judge(config: Mapping, lines: Lines, classes: int = 0) -> list[Verdict]:
    """All that is wrong with a run, the worst first; else that it is normal, or too early to say.

    Args:
      config: the resolved config.
      lines: of metrics.jsonl.
      classes: that the run's head tells apart; 0: no such head.
    """
    trained = [line for line in lines if line["split"] == "train"]
    collapsed = _collapsed(config, lines, trained)
    if len(trained) < ENOUGH:
        few = f"training has logged {len(trained)} lines, and a verdict takes {ENOUGH}"
        return list(collapsed) or [Verdict(EARLY, few if trained else "no update was made")]
    found = [
        *_diverging(config, trained),
        *_stuck(config, trained, classes),
        *collapsed,
        *_behind(config, trained),
        *_slowed(lines),
        *_data_bound(lines),
    ]
    return found or [Verdict(NORMAL, _progress(config, trained, classes))]


def _diverging(config: Mapping, trained: Lines) -> Iterator[Verdict]:
    """Updates that are not finite, or a loss that rises."""
    before, last = trained[-WINDOW - 1], trained[-1]
    made = last["step"] - before["step"]
    skipped = last["skipped"] - before["skipped"]
    advice = (
        "start in a new --workdir with a lower config.optimizer.learning_rate, a longer warm-up or "
        "a smaller config.optimizer.clip"
    )
    if skipped > SKIPPED * made:
        yield Verdict(
            DIVERGING,
            f"{skipped:.0f} of the last {made} updates up to {last['step']} were not finite",
            f"{advice}, and with config.model.dtype='bfloat16' if it is float16",
        )
        return
    # While the dVAE's KL term is faded in, another sum is minimised at every update.
    settled = config["dvae"]["kl_steps"] if config["task"] == "dvae" else 0
    losses = _values([line for line in trained if line["step"] > settled], "loss")
    if len(losses) < ENOUGH:
        return
    medians = [statistics.median(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW + 1)]
    start, best, now = losses[0], min(medians), medians[-1]
    if now - best > RISEN * (start - best) and (
        now - best > NOISE * _noise(losses) or now > 2 * abs(start)
    ):
        yield Verdict(
            DIVERGING,
            f"the loss began at {start:.4g}, was down to {best:.4g} and is {now:.4g} at update "
            f"{last['step']}",
            advice,
        )


def _noise(values: list[float]) -> float:
    """How far neighbouring values stand apart beside their trend."""
    return float(np.median(np.abs(np.diff(values, n=2)) / 2))


def _stuck(config: Mapping, trained: Lines, classes: int) -> Iterator[Verdict]:
    """After the warm-up, no better than naming the commonest token or any class."""
    rates = _values(trained, "lr")
    warm = trained[rates.index(max(rates)) :] if rates else trained
    pair = _accuracies(warm, classes)
    patient = warm[-1]["step"] - warm[0]["step"] < PATIENCE or len(warm) < WINDOW
    if patient or pair is None or pair[0] > ABOVE_GUESS * pair[1]:
        return
    accuracy, guess = pair
    tokens = "guess_accuracy" in warm[-1]
    yield Verdict(
        STUCK,
        f"training accuracy is {accuracy:.2%} at update {warm[-1]['step']}, and "
        + ("always naming the commonest token" if tokens else "guessing")
        + f" scores {guess:.2%}",
        (
            f"look at the pictures of {config['tokenizer']['path'] or 'the tokenizer'} for a "
            "tokenizer that has learnt nothing, and "
            if tokens
            else "look whether the labels belong to the images, and "
        )
        + "try a third of config.optimizer.learning_rate in a new --workdir",
    )


def _collapsed(config: Mapping, lines: Lines, trained: Lines) -> Iterator[Verdict]:
    """A tokenizer that uses few of its codes, or tokens that are nearly all the same."""
    if config["task"] == "vqkd":
        evaluated = [line for line in lines if line["split"] not in metrics.NOT_EVALUATIONS]
        yield from _short_of_codes(config["vqkd"], trained[-1:] + evaluated[-1:])
    elif config["task"] == "dvae" and len(trained) >= WINDOW:
        yield from _narrow(config["dvae"]["vocabulary"], trained[-WINDOW:])
    elif config["task"] == "mim" and len(trained) >= WINDOW:
        share = statistics.median(_values(trained[-WINDOW:], "guess_accuracy") or [0])
        if share > COMMONEST:
            yield Verdict(
                COLLAPSED,
                f"{share:.1%} of all tokens are one and the same code",
                "train another tokenizer than config.tokenizer.path="
                f"{config['tokenizer']['path']}, and look at its health first",
            )


def _short_of_codes(vqkd: Mapping, last: Lines) -> Iterator[Verdict]:
    """A VQ-KD in whose last update or evaluation few codes were chosen."""
    found = (short_of_codes(line, vqkd["alarm_usage"], vqkd["dead_after"]) for line in last)
    if short := next(filter(None, found), None):
        usage, where = short
        yield Verdict(
            COLLAPSED,
            f"{usage:.1%} of the {vqkd['codes']} codes were chosen {where}",
            "start in a new --workdir with config.vqkd.restart_dead=True, or with fewer "
            "config.vqkd.codes",
        )


def _narrow(codes: int, lately: Lines) -> Iterator[Verdict]:
    """A dVAE whose tokens are nearly always the same few."""
    perplexity = statistics.median(_values(lately, "perplexity") or [codes])
    if perplexity < max(2, PERPLEXITY * codes):
        yield Verdict(
            COLLAPSED,
            f"the tokens of a batch are spread as over {perplexity:.1f} of the {codes} codes at "
            f"update {lately[-1]['step']}",
            "start in a new --workdir with a lower config.optimizer.learning_rate, or a smaller or "
            "slower KL term: config.dvae.kl_weight and config.dvae.kl_steps",
        )


def short_of_codes(
    values: Mapping[str, float], alarm_usage: float, dead_after: int
) -> tuple[float, str] | None:
    """Usage and where it was seen if too few codes of a VQ-KD are chosen, else None.

    Args:
      values: metrics of an update, with `recent_usage`, or of an evaluation.
      alarm_usage: the share of those that could be chosen below which they are too few.
      dead_after: updates that `recent_usage` is about.
    """
    if "recent_usage" in values:
        usage, expected = values["recent_usage"], 1.0
        where = f"in the last {dead_after} updates"
    else:  # a small split cannot choose all codes
        usage, expected = values["usage"], 1 - math.exp(-values["vectors_per_code"])
        where = "by the evaluation"
    return (usage, where) if usage < alarm_usage * expected else None


def _behind(config: Mapping, trained: Lines) -> Iterator[Verdict]:
    """Learning more slowly than the bundled runs of this recipe."""
    seen = trained[-1]["step"] * config["train"]["batch_size"]
    for reference in references.alike(config):
        values = _values(trained, reference["metric"])
        if values and (evidence := references.lag(reference, seen, values, WINDOW)):
            yield Verdict(
                SLOW,
                evidence,
                "compare config.optimizer, the data and the tokenizer with that recipe's, and look "
                "at the gradient norm: a clipped or a tiny one asks for another learning rate",
            )


def _slowed(lines: Lines) -> Iterator[Verdict]:
    """Fewer images a second than the run made before."""
    rates = _values([line for line in lines if line["split"] == "timing"], "images_per_second")
    if len(rates) < ENOUGH:
        return
    usual, now = statistics.median(rates[:-WINDOW]), statistics.median(rates[-WINDOW:])
    if now < SLOWED * usual:
        yield Verdict(
            SLOW,
            f"{now:,.0f} images a second lately, {usual:,.0f} before",
            "look for another program on these machines, a disk or network that others use, and "
            "devices that are too hot",
        )


def _data_bound(lines: Lines) -> Iterator[Verdict]:
    """Devices that wait for batches."""
    timings = [line for line in lines if line.get("data_wait_share") is not None]
    if len(timings) < WINDOW:
        return
    share = statistics.median(line["data_wait_share"] for line in timings[-WINDOW:])
    waited = sum(
        line["data_wait_share"] * line["step_seconds"] * (line["step"] - before["step"])
        for before, line in itertools.pairwise(timings)
    )
    if share > WAITING and waited > WAITED:
        yield Verdict(
            DATA_BOUND,
            f"{share:.0%} of the time lately the devices had nothing to do but wait for a batch, "
            f"{waited / 60:,.1f} minutes so far",
            "prepare the images at a smaller size on a local disk, raise config.data.workers where "
            "the disk is slow, and measure with `python -m beit_jax.benchmark input`; where a CPU "
            "trains, it needs its cores for both",
        )


def _progress(config: Mapping, trained: Lines, classes: int) -> str:
    """The best news of a run that is doing well."""
    step, seen = trained[-1]["step"], trained[-1]["step"] * config["train"]["batch_size"]
    found = []
    if pair := _accuracies(trained, classes):
        found.append(f"training accuracy is {pair[0]:.2%} at update {step}, where guessing scores "
                     f"{pair[1]:.2%}")  # fmt: skip
    else:
        losses = _values(trained, "loss")
        found.append(
            f"the loss has gone from {losses[0]:.4g} to {statistics.median(losses[-WINDOW:]):.4g} "
            f"by update {step}"
        )
    for reference in references.alike(config):
        images, low, high = reference["points"][-1]
        if len(reference["points"]) == 1 and seen < images:
            found.append(f"{reference['name']} had {reference['metric']} {high:.4g} in the end, "
                         f"after {images:,} images")  # fmt: skip
        elif len(reference["points"]) > 1:
            found.append(f"no slower than {reference['name']}")
    return "; ".join(found)


def _accuracies(trained: Lines, classes: int) -> tuple[float, float] | None:
    """Accuracy lately, and what guessing scores; None for a run without either."""
    accuracy = _values(trained[-WINDOW:], "accuracy")
    guesses = _values(trained[-WINDOW:], "guess_accuracy") or ([1 / classes] if classes else [])
    if not accuracy or not guesses:
        return None
    return statistics.median(accuracy), statistics.median(guesses)


def _values(lines: Lines, name: str) -> list[float]:
    """The values of a metric that exist."""
    return [line[name] for line in lines if line.get(name) is not None]
