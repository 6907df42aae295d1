"""Placement rules, and what they do to a compiled state."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from beit_jax import sharding
from beit_jax.errors import UserError

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((768, 3072), 1, P()),
        ((768, 3072), 8, P(None, "fsdp")),
        ((3072, 768), 8, P("fsdp")),
        ((16, 16, 3, 768), 8, P(None, None, None, "fsdp")),
        ((732, 12), 4, P("fsdp")),
        ((731, 13), 4, P()),  # nothing to divide
        ((768,), 8, P()),  # too small to be worth a gather
    ],
)
def test_the_largest_divisible_dimension_is_split(shape, fsdp, spec):
    assert sharding.partition_spec(shape, fsdp) == spec


def test_fsdp_keeps_a_part_on_each_device():
    mesh = sharding.make_mesh(4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    weights = {"kernel": np.zeros((64, 128), np.float32)}
    placed = jax.device_put(weights, sharding.state_sharding(weights, mesh))
    assert placed["kernel"].addressable_shards[0].data.shape == (64, 32)


def test_tables_of_relative_positions_stay_whole():
    mesh = sharding.make_mesh(8)
    block = {
        "relative_position_bias": {"table": np.zeros((732, 16))},
        "kernel": np.zeros((64, 128)),
    }
    found = sharding.state_sharding({"params": block, "moments": (block,)}, mesh)
    for tree in (found["params"], found["moments"][0]):
        assert tree["relative_position_bias"]["table"].spec == P()
        assert tree["kernel"].spec == P(None, "fsdp")


def test_rows_of_a_batch_are_split_over_all_devices():
    mesh = sharding.make_mesh(4)
    rows = np.arange(16, dtype=np.int32)
    placed = sharding.put_batch({"x": rows}, mesh)["x"]
    assert sorted(int(s.data[0]) for s in placed.addressable_shards) == list(range(0, 16, 2))
    np.testing.assert_array_equal(placed, rows)


def test_impossible_layouts_are_refused():
    with pytest.raises(UserError, match="config.mesh.fsdp=3 does not divide the 8 devices"):
        sharding.make_mesh(3)
    mesh = sharding.make_mesh(1)
    with pytest.raises(UserError, match="100 is not divisible by 8 devices; try 96 or 104"):
        sharding.check_batch("config.train.batch_size", 100, mesh)
    with pytest.raises(UserError, match="8 devices x 4 microbatches; try 32"):
        sharding.check_batch("config.train.batch_size", 8, mesh, 4)
