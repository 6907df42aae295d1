"""The machine that every test sees: eight CPU devices, strict ranks, and no data of the user's.

Environment variables are read when JAX and TFDS are imported, so this comes before any such import,
and processes that a test starts inherit it. What one test compiled serves the others, in this
session alone: a run on a changed machine or JAX must compile what it tests.
"""

import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# The time limit: on a busy machine of two cores a device may reach a collective long after another.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    # Programs that compile soon and run slowly: a test's time goes into compiling.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share that of the session's first process
    _cache = tempfile.TemporaryDirectory(prefix="beit_jax_cache_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
_data_dir = tempfile.TemporaryDirectory(prefix="beit_jax_tests_")
os.environ["TFDS_DATA_DIR"] = _data_dir.name

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """Fails the run at once, instead of testing one device eight times."""
    assert jax.device_count() == 8, f"tests need 8 CPU devices, JAX found {jax.devices()}"
