"""The config in a run's folder, and as a config file: --config=.../stored_config.py:RUN.

`main` names it where a run is evaluated or resumed without --config, so that values can be
changed with --config.key=value all the same.
"""

import json
import runpy
from pathlib import Path

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from beit_jax import limits
from beit_jax.errors import UserError

COMMON = Path(__file__).parents[1] / "configs" / "common.py"  # no part of an installed package


def get_config(run: str) -> ConfigDict:
    """The resolved config that `run` was started with, locked."""
    config = ConfigDict(read_config(Path(run).expanduser()))
    config.lock()
    return config


def read_config(run: Path) -> dict:
    """The resolved config of a run, as plain dictionaries with tuples for lists."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(), object_hook=tuples)
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore or delete it.") from error
    return completed(config, path)


def completed(config: dict, path: Path) -> dict:
    """A config read from `path` with the defaults of the keys that it is older than.

    Those of configs/common.py mean "as before"; where that is not to be seen, UserError.
    """
    known = flatten_dict(config, sep=".")
    if COMMON.is_file():
        defaults = flatten_dict(every_key().to_dict(), sep=".")
        for key, value in known.items():
            if isinstance(defaults.get(key), tuple) and not isinstance(value, tuple):
                known[key] = (value,) if value else ()  # of before the key took several
        return unflatten_dict(defaults | known, sep=".")
    if missing := [key for key in limits.KEYS if key not in known]:
        raise UserError(
            f"{path} is older than config.{missing[0]}: read it with the beit_jax repository, "
            "whose configs/common.py has the default, or write the key into it."
        )
    return config


def every_key() -> ConfigDict:
    """Every config key with its default."""
    if not COMMON.is_file():
        raise UserError(
            "configs/common.py is not to be seen from here: run this in the root of the beit_jax "
            "repository"
        )
    return runpy.run_path(str(COMMON))["get_config"]()


def tuples(node: dict) -> dict:
    """Lists of a JSON object as tuples, which a config holds; a hook of `json.loads`."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in node.items()}
