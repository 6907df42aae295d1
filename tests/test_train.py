"""The train step on a task small enough to follow on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import sharding, train
from beit_jax.errors import UserError
from beit_jax.task import Task, mean_of_sums
from configs import common

pytestmark = pytest.mark.smoke

LEARNING_RATE = 0.1


def line_task() -> Task:
    """Fits `w * x` to `y`, weighs rows, counts them as model state."""

    def loss_fn(params, model_state, frozen, batch, keys, step):
        error = jnp.square(params["w"] * batch["x"] - batch["y"])
        loss = (error * batch["weight"]).sum()
        weight = batch["weight"].sum()
        draw = jax.vmap(jax.random.uniform)(keys)
        sums = {"loss": (loss, weight), "draw": (draw.sum(), jnp.float32(len(draw)))}
        return (loss, weight), ({"rows": jnp.float32(len(draw))}, sums)

    return Task(
        views={},
        init=lambda key: ({"w": jnp.ones(())}, {"rows": jnp.zeros(())}),
        loss_fn=loss_fn,
        eval_fn=None,
        finalize=mean_of_sums,
        frozen={},
        predict=None,
        update_state=lambda state, statistics: {"rows": state["rows"] + statistics["rows"]},
        schedules={"lr": lambda step: jnp.float32(step)},
    )


def batch(rows: int = 16) -> dict:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, rows)).astype(np.float32)
    weight = rng.uniform(0.1, 1.0, rows).astype(np.float32)
    return {"x": x, "y": y, "weight": weight}


def one_update(values: dict, *, microbatches: int = 1, ema_decay: float = 0.0):
    mesh = sharding.make_mesh(1)
    task, optimizer = line_task(), optax.sgd(LEARNING_RATE)
    step = train.make_train_step(
        task, optimizer, mesh, seed=0, microbatches=microbatches, ema_decay=ema_decay
    )
    state = train.create_state(*task.init(jax.random.key(0)), optimizer, ema=ema_decay > 0)
    return step(state, task.frozen, sharding.put_batch(values, mesh))


def test_an_update_is_the_weighted_mean_gradient():
    values = batch()
    state, metrics = one_update(values)
    x, y, weight = values["x"], values["y"], values["weight"]
    gradient = (2 * (x - y) * x * weight).sum() / weight.sum()
    np.testing.assert_allclose(state.params["w"], 1 - LEARNING_RATE * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), rtol=1e-5)
    assert int(state.step) == 1


def test_accumulation_changes_nothing_but_memory():
    whole, whole_metrics = one_update(batch())
    parts, parts_metrics = one_update(batch(), microbatches=2)
    np.testing.assert_allclose(whole.params["w"], parts.params["w"], rtol=1e-6)
    for name in whole_metrics:  # "draw" shows that a row keeps its random key
        np.testing.assert_allclose(whole_metrics[name], parts_metrics[name], rtol=1e-6)
    assert float(parts.model_state["rows"]) == 16  # once, from summed statistics


def test_a_non_finite_update_is_skipped_and_counted():
    values = batch()
    values["x"][3] = np.inf
    state, metrics = one_update(values, ema_decay=0.5)
    assert float(state.params["w"]) == 1.0
    assert float(state.ema_params["w"]) == 1.0
    assert float(state.model_state["rows"]) == 0.0
    assert int(state.step) == 1
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["draw"])  # null in the file: no number


def test_a_batch_that_weighs_nothing_is_an_update_of_zero_gradients():
    values = batch()
    values["weight"][:] = 0
    state, metrics = one_update(values)
    assert float(state.params["w"]) == 1.0 and float(state.model_state["rows"]) == 16
    assert float(metrics["grad_norm"]) == int(metrics["skipped"]) == 0
    assert np.isnan(metrics["loss"])  # null in the file
    values["y"][3] = np.nan  # which no weight hides
    state, metrics = one_update(values)
    assert float(state.model_state["rows"]) == 0.0 and int(metrics["skipped"]) == 1


def test_averaged_weights():
    state, _ = one_update(batch(), ema_decay=0.75)
    expected = 0.75 * 1.0 + 0.25 * float(state.params["w"])
    np.testing.assert_allclose(state.ema_params["w"], expected, rtol=1e-6)
    assert state.evaluated_params is state.ema_params


def test_logged_schedules_follow_the_updates_that_were_made():
    task, optimizer, mesh = line_task(), optax.sgd(LEARNING_RATE), sharding.make_mesh(1)
    step = train.make_train_step(task, optimizer, mesh, seed=0, microbatches=1, ema_decay=0.0)
    state = train.create_state(*task.init(jax.random.key(0)), optimizer, ema=False)
    good = sharding.put_batch(batch(), mesh)
    bad = sharding.put_batch({**batch(), "y": np.full(16, np.nan, np.float32)}, mesh)
    rates = []
    for values in (good, bad, good, good):
        state, metrics = step(state, {}, values)
        rates.append(float(metrics["lr"]))
    assert rates == [0.0, 1.0, 1.0, 2.0]


def test_total_steps_are_derived():
    config = common.get_config()
    config.train.batch_size, config.train.epochs = 100, 3.0
    assert train.total_steps(config, 250) == 8
    config.train.steps = 5
    assert train.total_steps(config, 250) == 5
    config.train.steps = -1
    with pytest.raises(UserError, match="config.train.steps"):
        train.total_steps(config, 250)
