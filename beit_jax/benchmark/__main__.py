"""Measures what training costs on this machine: its step, its input, its masks, its checkpoints.

Everything that is compared is measured in turns in one run, so that a busy machine slows all sides
alike: trust the ratios rather than the times.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import flax
import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from beit_jax import command_line
from beit_jax.benchmark import checkpoint, loading, masking, step, table
from beit_jax.errors import UserError

_EXAMPLES = """examples:
  python -m beit_jax.benchmark train --config=configs/mim_base.py --config.train.batch_size=128
  python -m beit_jax.benchmark train --peer     # beside Hugging Face's BEiT in PyTorch
  python -m beit_jax.benchmark input --config.data.source=folder:PHOTOS
  python -m beit_jax.benchmark masking
  python -m beit_jax.benchmark checkpoint --json

Values of the config are changed with --config.key=value, as for beit_jax.main. Images are the
built-in digits at the config's size, unless data.source is given.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every step of every save

    def command() -> int:
        options, overrides = _parser().parse_known_args(arguments)
        if options.peer:  # else JAX takes most of a GPU's memory, and PyTorch has none
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        config = _config(options, overrides)
        with tempfile.TemporaryDirectory(prefix="beit_jax_benchmark_") as folder:
            found = {
                "command": options.name,
                **_machine(config),
                **options.measure(config, Path(folder), options),
            }
        print(json.dumps(found, indent=2) if options.json else table.render(found), flush=True)
        return 0

    return command_line.run("beit_jax.benchmark", command, "nothing was kept.")


def _parser() -> command_line.Parser:
    parser, layout = command_line.make_parser(
        "beit_jax.benchmark", __doc__.split("\n\n")[0], _EXAMPLES
    )
    commands = parser.add_subparsers(
        required=True, metavar="train|input|masking|checkpoint", dest="name"
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", default="configs/mim_base.py", help="recipe (%(default)s)")
    shared.add_argument(
        "--repeats", type=int, default=10, help="turns that are measured (%(default)s)"
    )
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    for name, measure, text in (
        ("train", step.measure, "a training step: time, FLOPs, memory, compilation, its parts"),
        ("input", loading.measure, "images from JPEG files to batches on the device"),
        ("masking", masking.measure, "masks on the device beside a Python loop"),
        ("checkpoint", checkpoint.measure, "how long training stands still for a save"),
    ):
        command = commands.add_parser(name, parents=[shared], help=text, description=text, **layout)
        command.set_defaults(measure=measure, peer=False)
        if name == "train":
            command.add_argument(
                "--peer",
                action="store_true",
                help="measure BEiT in PyTorch beside it (pip install -e '.[peers]')",
            )
    return parser


def _config(options: argparse.Namespace, overrides: list[str]) -> ConfigDict:
    """The recipe on the digits, with what suits one small machine, unless said otherwise."""
    if options.repeats < 1:
        raise UserError(f"--repeats={options.repeats} must be at least 1.")
    if wrong := [given for given in overrides if not given.startswith("--config.")]:
        raise UserError(f"{wrong[0]!r} is not a flag here; see --help.")
    cpu = jax.default_backend() == "cpu"
    defaults = [
        "--config.data.source=digits",
        f"--config.train.batch_size={(8 if cpu else 128) * jax.device_count()}",
        f"--config.model.dtype={'float32' if cpu else 'bfloat16'}",
    ]
    keys = {given.split("=")[0] for given in overrides}
    defaults = [default for default in defaults if default.split("=")[0] not in keys]
    values = flags.FlagValues()
    argv = ["benchmark", f"--config={options.config}", *defaults, *overrides]
    config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, lock_config=True, sys_argv=argv
    )
    command_line.parse_flags(values, argv)
    return values["config"].value


def _machine(config: ConfigDict) -> dict:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "task": config.task,
        "dtype": config.model.dtype,
        "batch_size": config.train.batch_size,
        "image_size": list(config.data.image_size),
    }


if __name__ == "__main__":
    sys.exit(main())
