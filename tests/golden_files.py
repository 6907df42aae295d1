"""Reference numbers of tests/golden, and parameters for tests without compiling an `init`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from beit_jax.interop import files
from beit_jax.interop.table import Table, export_params, import_params

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    """Arrays of golden/<name>.safetensors, as PyTorch lays them out."""
    return load_file(GOLDEN / f"{name}.safetensors")


def checkpoint(name: str) -> dict[str, np.ndarray]:
    """Arrays of the weights golden/<name>, in the format that their authors publish."""
    paths = (GOLDEN / f"{name}{ending}" for ending in (".pth", ".pkl", ".safetensors"))
    tensors = files.read(str(next(path for path in paths if path.exists()))).tensors
    return {key: np.asarray(tensor) for key, tensor in tensors.items()}


def nhwc(array: np.ndarray) -> jax.Array:
    """PyTorch's [B, ch, H, W] as [B, H, W, ch]."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def indices(mask: np.ndarray) -> jax.Array:
    """bool [B, N], the same count true in every row -> int32 [B, M]."""
    return jnp.asarray(np.stack([np.flatnonzero(row) for row in mask]), jnp.int32)


def shapes(module, *inputs):
    """The parameter tree of a module as shapes and dtypes, without computing anything."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def random_params(module, *inputs, scale=0.2):
    """Parameters with no zero among them, so that every bias, gain and table takes part."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (scale * random.standard_normal(leaf.shape)).astype(leaf.dtype),
        shapes(module, *inputs),
    )


def weights(module, table: Table, tensors, *inputs):
    """Foreign weights as the module's parameters."""
    return import_params(table, tensors, shapes(module, *inputs))


def foreign_shapes(table: Table, tree) -> dict[str, tuple[int, ...]]:
    """Names and shapes that parameters of these shapes have in a family, array by array."""
    found = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        array = np.broadcast_to(np.int8(0), leaf.shape)
        tensors = export_params(table, unflatten_dict({path: array}, sep="/"))
        found |= {name: tensor.shape for name, tensor in tensors.items()}
    return found
