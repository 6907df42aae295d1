"""What is kept of updates that were not finite, for whoever looks for the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from beit_jax import checkpoint, metrics
from beit_jax.errors import UserError

GOOD = 3  # updates, before all others are poisoned


def poisoned(tree, folder):
    """A run whose head's gradient does not exist from update GOOD + 1 on."""
    run = tiny.run(tree, folder, jax.devices()[:1])
    loss_fn = run.task.loss_fn

    def poisoned_loss(params, model_state, frozen, batch, keys, step):
        (loss, weight), rest = loss_fn(params, model_state, frozen, batch, keys, step)
        poison = jnp.where(step >= GOOD, jnp.nan, 0.0)
        return (loss + poison * params["head"]["kernel"].sum(), weight), rest

    run.task = run.task._replace(loss_fn=poisoned_loss)
    run.train_step = tiny.rebuilt_step(run)
    return run


@pytest.mark.parametrize("max_skipped", [1, 4])
def test_the_update_that_ends_a_run_can_be_looked_at(max_skipped, tmp_path):
    tree = tiny.config(
        "classify",
        model__depth=1,
        train__max_skipped=max_skipped,
        train__checkpoint_every=GOOD,
        train__steps=20,
    )
    run, last = poisoned(tree, tmp_path / "run"), GOOD + max_skipped
    with pytest.raises(UserError) as stopped:
        run.execute("train")
    folder = run.folder / f"bad_update_{last}"
    said = str(stopped.value)
    assert said.startswith(f"The last {max_skipped} updates up to {last} were not finite")
    assert "beginning with gradient of head/kernel; the state before, the batch" in said
    assert str(folder) in said and "config.optimizer.learning_rate" in said

    names = (folder / "non_finite.txt").read_text().splitlines()
    assert names == ["gradient of head/kernel", "norm of the gradient"]
    batch = next(run.train_batches(last - 1))
    kept = np.load(folder / "batch.npz")
    assert set(kept) == set(batch)
    for name in batch:
        np.testing.assert_array_equal(kept[name], batch[name])

    before, expected = (
        checkpoint.load_weights(str(path), "a test")
        for path in (folder, run.folder / "checkpoints" / str(GOOD))
    )
    assert before.digest == expected.digest and before.source.endswith(f"/{last - 1}")

    lines = [line for line in metrics.read(run.folder) if line["split"] == "train"]
    assert [line["skipped"] for line in lines] == [0] * GOOD + [*range(1, max_skipped + 1)]
    assert all((line["loss"] is None) == (line["step"] > GOOD) for line in lines)

    again = poisoned(tree, folder)  # which is the folder of a run: it makes the update again
    with pytest.raises(UserError, match=f"updates up to {last} were not finite"):
        again.execute("train")
