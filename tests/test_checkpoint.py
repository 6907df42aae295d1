"""What is kept, what another stage reads, and where weights come from."""

import jax
import numpy as np
import optax
import pytest

from beit_jax import checkpoint, frozen, sharding, train
from beit_jax.errors import UserError

pytestmark = pytest.mark.smoke


def make_state(mesh, value: float = 1.0) -> train.TrainState:
    optimizer = optax.adam(1e-3)
    params = {"encoder": {"kernel": np.full((64, 64), value, np.float32)}}
    params = jax.device_put(params, sharding.state_sharding(params, mesh))
    state = train.create_state(params, {}, optimizer, ema=True)
    return jax.device_put(state, sharding.state_sharding(state, mesh))


def keep(folder, *, number: int = 2) -> checkpoint.Keeper:
    return checkpoint.Keeper(folder, keep=number, best="loss", maximize=False)


def save_run(folder, losses):
    """Saves one checkpoint per loss, with parameters of that step's number."""
    mesh = sharding.make_mesh(1)
    keeper = keep(folder)
    for step, loss in enumerate(losses, start=1):
        state = make_state(mesh, float(step))._replace(step=np.int32(step))
        keeper.save(state)
        if loss is not None:
            keeper.evaluated(step, {"loss": loss})
    keeper.wait()
    keeper.close()
    (folder / "config.json").write_text('{"task": "mim", "data": {"image_size": [8, 8]}}')


def test_newest_and_best_are_kept(tmp_path):
    save_run(tmp_path, [3.0, 1.0, None, 2.0, None])
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 5]


def test_a_state_is_restored_on_another_layout(tmp_path):
    save_run(tmp_path, [1.0])
    mesh = sharding.make_mesh(4)
    like = jax.eval_shape(lambda: make_state(mesh))
    placed = sharding.state_sharding(like, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed
    )
    state, passed_over = keep(tmp_path).restore(abstract)
    assert not passed_over
    kernel = state.params["encoder"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    np.testing.assert_array_equal(kernel, np.ones((64, 64)))
    np.testing.assert_array_equal(state.ema_params["encoder"]["kernel"], np.ones((64, 64)))
    assert int(state.step) == 1


def test_another_stage_reads_the_averaged_weights(tmp_path):
    mesh = sharding.make_mesh(1)
    state = make_state(mesh)._replace(step=np.int32(1))
    doubled = jax.tree.map(lambda x: 2 * x, state.ema_params)
    keeper = keep(tmp_path)
    keeper.save(state._replace(ema_params=doubled))
    keeper.close()
    (tmp_path / "config.json").write_text('{"data": {"image_size": [8, 8]}}')
    weights = checkpoint.load_weights(str(tmp_path), "config.init.path")
    np.testing.assert_array_equal(weights.params["encoder"]["kernel"], np.full((64, 64), 2.0))
    assert weights.config["data"]["image_size"] == (8, 8)


def test_one_checkpoint_of_a_run_can_be_named(tmp_path):
    save_run(tmp_path, [1.0, 2.0])
    for path, value in ((tmp_path, 2.0), (tmp_path / "checkpoints" / "1", 1.0)):
        weights = checkpoint.load_weights(str(path), "config.init.path")
        assert weights.params["encoder"]["kernel"][0, 0] == value


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.tokenizer.path=.* holds no finished checkpoint"):
        checkpoint.load_weights(str(tmp_path), "config.tokenizer.path")


def test_an_unknown_best_metric_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.eval.best='loss' is not among .*accuracy"):
        keep(tmp_path).evaluated(1, {"accuracy": 1.0})


def test_a_frozen_copy_is_read_back_and_checked(tmp_path):
    params = {"encoder": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}
    digest = checkpoint.digest({"params": params})
    weights = checkpoint.Weights(params, {}, {"task": "dvae"}, "somewhere", digest)
    assert frozen.load(tmp_path / "tokenizer") is None
    frozen.save(tmp_path / "tokenizer", weights)
    back = frozen.load(tmp_path / "tokenizer")
    np.testing.assert_array_equal(back.params["encoder"]["kernel"], params["encoder"]["kernel"])
    assert back.digest == digest and back.config["task"] == "dvae"
    about = tmp_path / "tokenizer" / "source.json"
    about.write_text(about.read_text().replace(digest, "0" * 64))
    with pytest.raises(UserError, match="damaged"):
        frozen.load(tmp_path / "tokenizer")
