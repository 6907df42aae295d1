"""Checkpoints cut short, emptied or lost: the newest whole one is used, and it is said."""

import shutil

import jax
import pytest
import tiny

from beit_jax import checkpoint, features, metrics
from beit_jax.errors import UserError

OLD, NEW = 2, 4
DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "lost": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def recipe():
    return tiny.config(
        "classify", model__depth=1, train__steps=NEW, train__checkpoint_every=OLD, train__keep=2
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny.run(recipe, folder, jax.devices()[:1]).execute("train")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def break_params(folder, step: int) -> None:
    for path in (folder / "checkpoints" / str(step) / "params" / "d").iterdir():
        DAMAGES["cut short"](path)


@pytest.mark.filterwarnings("ignore:passed over")
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_what_is_read_was_saved(damage, trained, tmp_path):
    newest = trained / "checkpoints" / str(NEW)
    digests = {
        step: checkpoint.load_weights(str(trained / "checkpoints" / str(step)), "a test").digest
        for step in (OLD, NEW)
    }
    read = set()
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        if "opt_state" not in path.parts:  # which another stage does not read
            copy = shutil.copytree(trained, tmp_path / "copy")
            DAMAGES[damage](copy / path.relative_to(trained))
            found = checkpoint.load_weights(str(copy), "a test")
            read.add(int(found.source.split("/")[-1]))
            assert found.digest == digests[int(found.source.split("/")[-1])], path
            shutil.rmtree(copy)
    assert read == {OLD, NEW}  # some files tell nothing that is needed


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", ["_CHECKPOINT_METADATA", "progress/metadata", "opt_state/manifest.ocdbt"]
)
def test_a_run_goes_on_with_what_is_whole(file, damage, recipe, trained, copy):
    DAMAGES[damage](copy / "checkpoints" / str(NEW) / file)
    abstract = tiny.run(recipe, copy, jax.devices()[:1]).abstract_state()
    keeper = tiny.keeper(copy)
    state, said = keeper.restore(abstract)
    keeper.save(state._replace(step=state.step + 1))
    keeper.close()
    assert int(state.step) == OLD and said.startswith("passed over what is damaged: ")
    weights = checkpoint.load_weights(str(trained / "checkpoints" / str(OLD)), "a test")
    assert checkpoint.digest({"params": jax.device_get(state.params)}) == weights.digest
    assert [path.name for path in (copy / "damaged").iterdir()] == [f"{NEW}_0"]
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {str(OLD + 1)}


def test_a_run_goes_on_from_the_checkpoint_before(recipe, trained, copy, capsys):
    break_params(copy, NEW)
    tiny.run(recipe, copy, jax.devices()[:1]).execute("train")
    said = capsys.readouterr().out
    assert f"resuming at update {OLD}; passed over what is damaged: " in said
    assert f"updates {OLD + 1} to {NEW} are made again" in said
    assert [path.name for path in (copy / "damaged").iterdir()] == [f"{NEW}_0"]
    lines, expected = (
        [line for line in metrics.read(folder) if line["split"] != "timing"]
        for folder in (copy, trained)
    )
    assert lines == expected


def test_an_evaluation_says_so_and_touches_nothing(recipe, copy, capsys):
    break_params(copy, NEW)
    before = sorted(copy.rglob("*"))
    tiny.run(recipe, copy, jax.devices()[:1]).execute("eval")
    assert f"evaluating update {OLD}; passed over what is damaged" in capsys.readouterr().out
    assert set(before) <= set(copy.rglob("*")) and not (copy / "damaged").exists()


def test_another_stage_says_so(copy):
    (copy / "checkpoints" / f"{NEW + 1}.orbax-checkpoint-tmp").mkdir()  # never became one
    shutil.rmtree(copy / "checkpoints" / str(NEW) / "params")
    with pytest.warns(UserWarning, match=f"passed over what is damaged: .*/{NEW} .params lost"):
        features.load(copy)
    with pytest.raises(UserError, match="holds no checkpoint that can be read.*params lost"):
        checkpoint.load_weights(str(copy / "checkpoints" / str(NEW)), "a test")


def test_where_all_are_damaged_nothing_is_moved(recipe, copy):
    for step in (OLD, NEW):
        break_params(copy, step)
    with pytest.raises(UserError, match=f"no checkpoint that can be read, the newest is .*/{NEW} "):
        tiny.run(recipe, copy, jax.devices()[:1]).execute("train")
    assert (copy / "checkpoints" / str(NEW)).is_dir() and not (copy / "damaged").exists()
