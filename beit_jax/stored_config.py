"""The config of a run's folder as a config file: --config=.../stored_config.py:RUN.

`main` names it where a run is evaluated or resumed without --config, so that values can be
changed with --config.key=value all the same.
"""

from pathlib import Path

from ml_collections import ConfigDict

from beit_jax import checkpoint


def get_config(run: str) -> ConfigDict:
    """The resolved config that `run` was started with, locked."""
    config = ConfigDict(checkpoint.read_config(Path(run).expanduser()))
    config.lock()
    return config
