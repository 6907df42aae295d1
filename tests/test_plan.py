"""What a run says at its start is what it then does."""

import jax
import numpy as np
import tiny

from beit_jax import optimizer, plan, sharding


def test_batch_rate_and_length(tmp_path):
    tree = tiny.config(
        "dvae", train__batch_size=64, train__accumulate=2, train__steps=35,
        optimizer__reference_batch=128, optimizer__learning_rate=4e-3, optimizer__warmup_steps=5,
    )  # fmt: skip
    run = tiny.run(tree, tmp_path)
    state = run.abstract_state()  # shapes are enough
    said = run._plan(state)
    assert "64 images an update = 8 devices x 4 images x 2 microbatches" in said
    assert "0.002 = 0.004 x 64 / 128 images, after 5 updates of warm-up; then cosine" in said
    assert "35 updates = 2.042 epochs of 1,097 images" in said
    counted = sum(x.size for x in jax.tree.leaves(state.params))
    assert f"parameters:    {counted:,}\n" in said and "MiB a device for weights" in said


def test_parameters_that_stay_frozen_and_an_absolute_rate(tmp_path):
    tree = tiny.config("dvae", train__steps=100, optimizer__schedule="linear")
    run = tiny.run(tree, tmp_path / "run")
    frozen = jax.device_put({"kernel": np.zeros((300, 4), np.float32)}, jax.devices()[0])
    run.task = run.task._replace(frozen=frozen)
    said = run._plan(run.abstract_state())
    assert ", and 1,200 that stay frozen" in said
    assert f"{tree.optimizer.learning_rate:g}, after 0 updates of warm-up; then linear" in said


def test_bytes_are_those_of_a_device():
    mesh = sharding.make_mesh(4)
    tree = {"wide": np.zeros((1024, 8), np.float32), "small": np.zeros(3, np.float16)}
    placed = jax.device_put(tree, sharding.state_sharding(tree, mesh))
    assert plan.bytes_a_device(placed) == 1024 * 8 * 4 // 4 + 3 * 2
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert plan.bytes_a_device(placed) == held


def test_the_rate_that_is_said_is_the_one_that_is_reached(tmp_path):
    tree = tiny.config("dvae", train__batch_size=64, optimizer__reference_batch=128)
    peak = optimizer.scaled_learning_rate(
        tree.optimizer.learning_rate, reference_batch=128, batch_size=64
    )
    run = tiny.run(tree, tmp_path)
    np.testing.assert_allclose(run.task.schedules["lr"](0), peak, rtol=1e-6)
    assert f"{peak:.3g} = " in run._plan(run.abstract_state())
