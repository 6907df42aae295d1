"""A run that is asked to stop does so soon, wherever it is, and loses nothing."""

import os
import signal
import time

import jax
import kill_driver
import pytest
import tiny

from beit_jax import checkpoint, metrics, preemption

STEPS = 6


@pytest.fixture(scope="module")
def recipe():
    return tiny.config(
        "classify",
        model__depth=1,
        train__steps=STEPS,
        train__eval_every=2,
        train__checkpoint_every=100,
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.run(recipe, folder, jax.devices()[:1]).execute("train")
    return values(folder)


def values(folder) -> list[dict]:
    return [line for line in metrics.read(folder) if line["split"] != "timing"]


def asked_in(run, batches: str, number: int) -> preemption.Stop:
    """Asks a run to stop while it reads batch `number` by its method `batches`."""
    stop, read = preemption.Stop(), getattr(run, batches)

    def asking(*arguments):
        for place, batch in enumerate(read(*arguments)):
            if place == number:
                stop.ask()
            yield batch

    setattr(run, batches, asking)
    return stop


@pytest.mark.parametrize(
    ("batches", "number", "saved"),
    [("train_batches", 2, 3), ("train_batches", 1, 2), ("split_batches", 1, 2)],
    ids=["between evaluations", "before an evaluation", "in an evaluation"],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(batches, number, saved, recipe, whole, tmp_path):
    run = tiny.run(recipe, tmp_path, jax.devices()[:1])
    stop = asked_in(run, batches, number)
    with pytest.raises(preemption.Interrupted, match=f"stopped at update {saved}, which is saved"):
        run.execute("train", stop)
    assert checkpoint.load_weights(str(tmp_path), "a test").source.endswith(f"/{saved}")
    lines = values(tmp_path)
    assert lines == whole[: len(lines)]
    evaluated = {line["step"] for line in lines if line["split"] == "validation"}
    assert evaluated == set(range(2, saved, 2))  # the last waits until the run goes on
    tiny.run(recipe, tmp_path, jax.devices()[:1]).execute("train")
    assert values(tmp_path) == whole


def test_a_finished_run_is_not_evaluated_again(recipe, whole, tmp_path):
    for _ in range(2):
        tiny.run(recipe, tmp_path, jax.devices()[:1]).execute("train")
    assert values(tmp_path) == whole


def test_a_run_is_stopped_before_its_first_update(tmp_path):
    teacher = tiny.random_network(tmp_path / "teacher", tiny.config("classify"), 10)
    tree = tiny.config("vqkd", teacher__path=str(teacher), vqkd__kmeans=2, train__batch_size=8)
    run = tiny.run(tree, tmp_path / "run", jax.devices()[:1])
    stop = asked_in(run, "train_batches", 0)
    with pytest.raises(preemption.Interrupted, match="before the first update"):
        run.execute("train", stop)
    assert not checkpoint.any_in(tmp_path / "run")


def ended(process, number: int, within: float) -> int | None:
    """The exit status after a signal, None where the process goes on."""
    os.kill(process.pid, number)
    process.join(within)
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_python_cannot_interrupt_ends_where_nothing_is_unsaved(number, tmp_path):
    """It is inside of XLA, as in a compilation of minutes."""
    started = {}
    for unsaved in (False, True):
        started[unsaved] = kill_driver.start(
            kill_driver.inside_xla, tmp_path / str(unsaved), unsaved
        )
    for folder in started:
        while not (tmp_path / str(folder) / "ready").exists():
            time.sleep(0.01)
    assert ended(started[False], number, 20) == preemption.STATUS
    said = (tmp_path / "False" / "output.txt").read_text()
    assert said.strip().endswith(
        "stopped at update 7, which is saved; the same command resumes there"
    )
    assert ended(started[True], number, 3 * preemption.PATIENCE) is None
    started[True].kill()
    started[True].join()
