"""What the devices say to each other in a training step, read from the compiled program."""

import math
import re

import jax
import pytest
import tiny

BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
ROWS = 23  # of a device: a size that nothing else has
METRICS = 2_000  # bytes at most for losses, counts and the histogram of tokens
# The shared bias [heads, L, L] is added up before its gradient goes into the smaller table.
BIAS = 4 * 2 * 17 * 17


def collectives(hlo: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(kind, type, shape) of every array that a collective gives; asynchronous ones once."""
    return [
        (kind, dtype, tuple(map(int, filter(None, dims.split(",")))))
        for shapes, kind in COLLECTIVE.findall(hlo)
        for dtype, dims in ARRAY.findall(shapes)
    ]


def size(found) -> int:
    return sum(BYTES[dtype] * math.prod(shape) for _, dtype, shape in found)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Compiles the step over 8 devices; gives its collectives and the bytes of the parameters."""
    folder = tmp_path_factory.mktemp("collectives")
    tokenizer = tiny.random_tokenizer(folder / "dvae")

    def compiled(fsdp: int):
        tree = tiny.config(
            "mim",
            tokenizer__path=str(tokenizer),
            train__batch_size=8 * ROWS,
            mesh__fsdp=fsdp,
            model__positions="shared_relative",
            model__layer_scale=0.1,
            model__drop_path=0.1,
            data__color_jitter=0.4,
        )
        run = tiny.run(tree, folder / f"fsdp_{fsdp}")
        state = run.abstract_state()
        batch = next(run.train_batches(0))
        program = run.train_step.lower(state, run.task.frozen, batch).compile()
        parameters = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(state.params))
        return collectives(program.as_text()), parameters, program.memory_analysis()

    found = {fsdp: compiled(fsdp) for fsdp in (1, 8)}
    return found.get


def test_data_parallel_devices_add_their_gradients_and_nothing_else(step):
    found, parameters, _ = step(1)
    assert {kind for kind, _, _ in found} == {"all-reduce"}
    assert parameters <= size(found) <= parameters + BIAS + METRICS


def test_sharded_devices_gather_parameters_and_scatter_gradients(step):
    found, parameters, _ = step(8)
    gathered = [one for one in found if one[0] == "all-gather"]
    added = [one for one in found if one[0] in ("all-reduce", "reduce-scatter")]
    assert {one[0] for one in found} <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    # Once for the forward pass, and perhaps again for the backward pass.
    assert 0.8 * parameters <= size(gathered) <= 2.2 * parameters
    assert size(added) <= 1.2 * parameters + BIAS + METRICS


@pytest.mark.parametrize("fsdp", [1, 8])
def test_no_collective_carries_images_or_their_features(step, fsdp):
    found, _, _ = step(fsdp)
    # The labels of the batch are no array of the step's; indices of rows are not sent either.
    assert not [one for one in found if {ROWS, 8 * ROWS} & set(one[2])]


def test_sharded_state_takes_an_eighth_of_the_memory(step):
    whole, sharded = (step(fsdp)[2].argument_size_in_bytes for fsdp in (1, 8))
    frozen_and_batch = 0.25 * whole
    assert sharded < whole / 8 + frozen_and_batch
