"""Where arrays lie: the mesh, the placement of state and of batches.

The mesh has two axes. A batch is split over both. State is split over `fsdp` (each array along its
largest divisible dimension) and repeated over `data`. The compiler derives every collective from
these placements.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beit_jax.errors import UserError

BATCH = P(("data", "fsdp"))
# Below this many elements gathering an array costs more (one latency) than it saves.
MIN_SHARDED_ELEMENTS = 1024


def make_mesh(fsdp: int, devices=None) -> Mesh:
    """Lays `devices` (default: all, of all processes) out as (`data`, `fsdp`)."""
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        raise UserError(
            f"config.mesh.fsdp={fsdp} does not divide the {count} devices; choose a divisor."
        )
    # Auto: the compiler propagates placements. make_mesh's own default became Explicit.
    return jax.make_mesh(
        (count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def partition_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Splits the largest dimension that `fsdp` divides; small arrays stay whole."""
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED_ELEMENTS:
        return P()
    divisible = [d for d in range(len(shape)) if shape[d] % fsdp == 0]
    if not divisible:
        return P()
    axis = max(divisible, key=lambda d: shape[d])
    return P(*(None,) * axis, "fsdp")


def state_sharding(tree, mesh: Mesh):
    """Shardings for a tree of arrays or shapes: the same rule for weights and their moments.

    Tables of relative positions stay whole: split by heads, cuDNN's attention would refuse them.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path, x):
        table = any(getattr(key, "key", None) == "relative_position_bias" for key in path)
        return NamedSharding(mesh, P() if table else partition_spec(x.shape, fsdp))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this process's contiguous rows [b, ...] into global arrays [B, ...]."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def check_batch(name: str, batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Refuses a global batch that does not split evenly over devices and microbatches."""
    unit = mesh.size * microbatches
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        parts = f"{mesh.size} devices" + (
            f" x {microbatches} microbatches" if microbatches > 1 else ""
        )
        advice = f"{below} or {above}" if below else str(above)
        raise UserError(f"{name}={batch_size} is not divisible by {parts}; try {advice}.")
