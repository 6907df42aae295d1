"""One training a folder."""

import time

import jax
import kill_driver
import pytest
import tiny

from beit_jax import lock, metrics
from beit_jax.errors import UserError


def test_two_trainings_in_one_folder_are_refused_and_a_killed_one_is_in_nobodys_way(tmp_path):
    tree = tiny.config("classify", model__depth=1, train__steps=1)
    first = kill_driver.start(kill_driver.hold_lock, tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    run = tiny.run(tree, tmp_path, jax.devices()[:1])
    with pytest.raises(UserError, match=f"is being trained already, by process {first.pid} on "):
        run.execute("train")
    assert not (tmp_path / "config.json").exists()
    first.kill()
    first.join()
    run.execute("train")
    assert metrics.last_step(tmp_path) == 1
    with lock.held(tmp_path):  # an evaluation does not need it
        run.execute("eval")
