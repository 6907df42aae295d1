"""What a person sees of a run: a progress bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Screen:
    """Progress of one run, shown by process 0 only."""

    def __init__(self, batch_size: int):
        """`batch_size` is the images of one update, over all devices."""
        self._batch_size = batch_size
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
        self._mark = None  # (step, seconds) after the last logged update
        self._alarms = frozenset()  # names of those that stand

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def start(self, step: int, total: int) -> None:
        if step < total:
            self.say("compiling the train step...")
        self._started = time.perf_counter()
        self._first, self._total = step + 1, total
        self._bar.start()
        self._row = self._bar.add_task("training", total=total, completed=step, numbers="")

    def advance(self, step: int) -> None:
        """Called when update `step` has finished on the devices."""
        if step == self._first:
            self.say(f"compiled and made the first update in {self._elapsed():.1f} s")
            self._mark = (step, time.perf_counter())
        self._bar.update(self._row, completed=step)

    def rates(self, step: int) -> dict[str, float]:
        """Seconds per update and images per second since the last call; empty the first time."""
        now = time.perf_counter()
        if self._mark is None or step == self._mark[0]:
            return {}
        seconds = (now - self._mark[1]) / (step - self._mark[0])
        self._mark = (step, now)
        self._rates = {"step_seconds": seconds, "images_per_second": self._batch_size / seconds}
        return self._rates

    def show(self, step: int, numbers: dict[str, float]) -> None:
        """Shows the metrics of update `step`."""
        text = "  ".join(
            f"{name} {numbers[name]:.4g}"
            for name in ("loss", "accuracy", "aAcc", "usage", "lr")
            if name in numbers
        )
        rates = getattr(self, "_rates", None)
        if rates:
            text += f"  {rates['images_per_second']:.0f} images/s"
        self._bar.update(self._row, numbers=text)
        if not self._console.is_terminal:
            left = ""
            if rates:
                left = f"  {_duration(rates['step_seconds'] * (self._total - step))} left"
            self.say(f"update {step}/{self._total}  {text}{left}")

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Shows an evaluation; of a group of numbers, group/name, the files have the details."""
        if self._mark is not None:
            self._mark = (step, time.perf_counter())  # evaluating is no part of the training rate
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

    def stop(self) -> None:
        self._bar.stop()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
