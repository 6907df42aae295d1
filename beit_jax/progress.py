"""What a person sees of a run: a progress bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from beit_jax import health

TIMED = 20  # updates after the first that the run's time is estimated from
Batch = Values = Mapping[str, jax.Array]


class Screen:
    """Progress of one run, shown by process 0 only."""

    def __init__(self, batch_size: int, total: int = 0):
        """`batch_size` is the images of one update, over all devices; `total` the run's updates."""
        self._batch_size, self._total = batch_size, total
        self._console = Console(quiet=jax.process_index() != 0, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._first = 1  # the update that this process makes first
        self._timed = self._mark = None  # (step, seconds): estimated from, last logged
        self._waited = 0.0  # seconds since the latter in which the devices had run dry
        self._rates = {}  # of the last call
        self._alarms = frozenset()  # names of those that stand

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def start(self, step: int) -> None:
        """Called before the update after `step`."""
        self.say("compiling the train step...")
        self._started, self._first = time.perf_counter(), step + 1
        self._bar.start()
        self._row = self._bar.add_task("training", total=self._total, completed=step, numbers="")

    def advance(self, step: int) -> None:
        """Called when update `step` has finished on the devices."""
        if step == self._first:
            seconds = time.perf_counter() - self._started
            self.say(f"compiled and made the first update in {seconds:.1f} s")
            self._mark = self._timed = (step, time.perf_counter())
            self._waited = 0.0
        if step == self._timed[0] + TIMED and step < self._total:
            seconds = (time.perf_counter() - self._timed[1]) / TIMED
            left = _duration(seconds * (self._total - step))
            self.say(f"{seconds:.3g} s an update: about {left} left, evaluations aside")
        self._bar.update(self._row, completed=step)

    def next_batch(self, batches: Iterator[Batch], queued: Values | None) -> Batch:
        """The next batch, timed: `queued` is what the last update will give, None if it was read.

        Reading goes on beside the devices' work, so that waiting costs something only where they
        have finished all of it by the time that the batch comes.
        """
        started = time.perf_counter()
        batch = next(batches)
        if queued is not None and all(value.is_ready() for value in queued.values()):
            self._waited += time.perf_counter() - started
        return batch

    def rates(self, step: int) -> dict[str, float]:
        """What an update takes since the last call, and the share of it spent waiting for data.

        The share is the most that reading faster can gain. Empty the first time.
        """
        now = time.perf_counter()
        if self._mark is None or step == self._mark[0]:
            return {}
        seconds = (now - self._mark[1]) / (step - self._mark[0])
        share = self._waited / (now - self._mark[1])
        self._mark, self._waited = (step, now), 0.0
        self._rates = {
            "step_seconds": seconds,
            "images_per_second": self._batch_size / seconds,
            "data_wait_share": share,
        }
        return self._rates

    def show(self, step: int, numbers: dict[str, float]) -> None:
        """Shows the metrics of update `step`."""
        text = "  ".join(
            f"{name} {numbers[name]:.4g}"
            for name in ("loss", "accuracy", "aAcc", "usage", "lr")
            if name in numbers
        )
        if self._rates:
            text += f"  {self._rates['images_per_second']:.0f} images/s"
        self._bar.update(self._row, numbers=text)
        if not self._console.is_terminal:
            left = ""
            if self._rates:
                seconds = self._rates["step_seconds"] * (self._total - step)
                left = f"  {_duration(seconds)} left"
            self.say(f"update {step}/{self._total}  {text}{left}")

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Shows an evaluation; of a group of numbers, group/name, the files have the details."""
        if self._mark is not None:  # evaluating is no part of the training rate
            self._mark, self._waited = (step, time.perf_counter()), 0.0
            self._timed = self._mark if step < self._timed[0] + TIMED else self._timed
        self.say(
            f"evaluation at update {step}: "
            + "  ".join(f"{name} {value:.4g}" for name, value in scores.items() if "/" not in name)
        )

    def alarm(self, step: int, sentences: Mapping[str, str]) -> None:
        """Shows what a person must act on; what still stands since the last call is not repeated.

        `sentences` are by the name of what they are about.
        """
        for name, sentence in sentences.items():
            if name not in self._alarms:
                self.say(f"ALARM at update {step}: {sentence}")
        self._alarms = frozenset(sentences)

    def judged(self, step: int, verdicts: Sequence[health.Verdict]) -> None:
        """Shows how the run is doing: what is wrong at any evaluation, that nothing is at the end.

        `step` is the update of the evaluation.
        """
        for verdict in verdicts:
            if verdict.kind not in health.FINE:
                self.say(f"ALARM at update {step}: {verdict}")
            elif step == self._total:
                self.say(f"health: {verdict}")

    def stop(self) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
