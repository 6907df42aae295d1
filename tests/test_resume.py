"""A run that was interrupted ends as if it had not been."""

import jax
import numpy as np
import pytest
import tiny

from beit_jax import metrics
from beit_jax.errors import UserError

STEPS, HALF = 40, 20


def values(folder, after: int) -> list[dict]:
    lines = metrics.read(folder)
    return [line for line in lines if line["step"] > after and line["split"] != "timing"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.config(
        "mim",
        tokenizer__path=str(tiny.random_tokenizer(tmp_path_factory.mktemp("dvae"))),
        train__steps=STEPS,
        train__checkpoint_every=HALF,
        train__ema_decay=0.9,
        train__eval_every=30,
        model__drop_path=0.2,
        data__workers=2,
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.run(recipe, folder, jax.devices()[:1]).execute("train")
    return folder


def test_resumed_lines_are_identical(recipe, whole, tmp_path):
    tiny.killed_after(tiny.run(recipe, tmp_path, jax.devices()[:1]), 28)
    beyond = [line["step"] for line in values(tmp_path, HALF)]
    assert beyond == list(range(HALF + 1, 28)), "nothing to drop on resuming"
    tiny.run(recipe, tmp_path, jax.devices()[:1]).execute("train")
    expected = values(whole, HALF)
    assert len(expected) > STEPS - HALF  # twenty updates and two evaluations
    assert values(tmp_path, HALF) == expected


def test_another_number_of_devices_goes_on(recipe, whole, tmp_path):
    tiny.killed_after(tiny.run(recipe, tmp_path, jax.devices()[:1]), 28)
    other = recipe.copy_and_resolve_references()
    other.mesh.fsdp = 4
    tiny.run(other, tmp_path).execute("train")
    expected, found = values(whole, HALF), values(tmp_path, HALF)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"split"}:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_finished_run_is_evaluated_again(recipe, whole):
    before = [line for line in metrics.read(whole) if line["step"] == STEPS]
    tiny.run(recipe, whole).execute("eval")
    after = [line for line in metrics.read(whole) if line["split"] == "validation"][-1]
    first = next(line for line in before if line["split"] == "validation")
    for name in first.keys() - {"split"}:
        np.testing.assert_allclose(after[name], first[name], rtol=1e-5, err_msg=name)


def test_evaluating_an_empty_folder_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        tiny.run(recipe, tmp_path).execute("eval")
