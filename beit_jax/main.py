"""Trains and evaluates: flags, distributed start, config -> task -> loop.

python -m beit_jax.main --config=configs/mim_base.py --config.data.source=folder:PHOTOS
"""

import argparse
import math
import sys
from asyncio.log import logger as asyncio_logger
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from beit_jax import command_line, distributed, predict, preemption, same_data, stored_config
from beit_jax.errors import UserError
from beit_jax.run import Run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/; change a value with --config.key=value", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "the run's folder; default: runs/<config>[_<preset>]"
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "predict"],
    "train (resuming by itself), evaluate the newest checkpoint, or write what it says of each "
    "image of config.data.source",
)
FORCE = flags.DEFINE_bool(
    "force", False, "go on with a run although its config or its training data have changed"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, if there are more")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes that train together")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "this process's number, from 0")

STORED_CONFIG = str(Path(stored_config.__file__))
# May differ between a run and its continuation: they change no number that was logged.
CHANGEABLE = (
    "train.steps", "train.epochs", "train.accumulate", "train.log_every", "train.eval_every",
    "train.checkpoint_every", "train.keep", "train.max_skipped", "train.max_failed_saves", "eval",
    "log", "mesh", "data.data_dir", "data.source", "data.workers", "data.max_bad_share",
    "data.eval_split", "model.remat", "tokenizer.path", "teacher.path", "vqkd.alarm_usage",
    "vqkd.restart_dead", "data.predict_split",
)  # fmt: skip

# May differ in an evaluation or prediction besides: they change what it sees, and no weight.
EVALUATED_WITH = (
    "mask", "model.mean", "model.std", "model.dtype", "data.eval_crop", "data.interpolation",
    "data.train_split", "data.labels_per_class", "data.holdout", "segment.classes",
    "segment.reduce_zero_label", "segment.short_side", "segment.stride", "segment.scales",
    "segment.mirror",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Reads the flags and runs one training, evaluation or prediction."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; values are given as --config.key=value.")
    if not CONFIG.value:
        raise UserError(
            "--config is missing; for example: python -m beit_jax.main "
            "--config=configs/mim_base.py --config.data.source=folder:PHOTOS"
        )
    mesh = CONFIG.value.mesh
    distributed.start(
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        start_timeout=mesh.start_timeout,
        heartbeat_timeout=mesh.heartbeat_timeout,
    )
    folder, config = resolve()
    same = {"--mode": MODE.value, "--workdir": str(folder)}
    same |= {f"config.{key}": value for key, value in _flat(config.to_dict())}
    distributed.agree(same, mesh.start_timeout)
    if MODE.value == "predict":
        predict.write(config, folder)
    elif MODE.value == "eval":
        Run(config, folder).execute("eval")
    else:
        stop = preemption.Stop()
        with stop.listening():
            Run(config, folder).execute("train", stop)


def resolve() -> tuple[Path, ConfigDict]:
    """The run's folder and its config, checked against what the folder already holds."""
    if "://" in (WORKDIR.value or ""):
        raise UserError(
            f"--workdir={WORKDIR.value} is no folder; mount the bucket (gcsfuse, rclone), or a "
            "file server where there are several hosts, and name the folder."
        )
    path, *preset = config_flags.get_config_filename(flags.FLAGS["config"]).split(":", 1)
    run = Path(WORKDIR.value or Path("runs", "_".join([Path(path).stem, *preset]))).expanduser()
    stored = stored_config.read_config(run) if (run / "config.json").is_file() else None
    config = CONFIG.value
    if path == STORED_CONFIG and MODE.value != "train":  # perhaps on a smaller machine
        config.mesh.fsdp = math.gcd(config.mesh.fsdp, jax.device_count())
    if MODE.value != "train" and stored is None:
        raise UserError(
            f"--workdir={run} holds no run for --mode={MODE.value}; train it with --mode=train."
        )
    if stored is not None:
        _refuse_changes(run, stored, config.to_dict())
    if FORCE.value and MODE.value == "train" and jax.process_index() == 0:
        (run / same_data.FILE).unlink(missing_ok=True)
    return run, config


def _refuse_changes(run: Path, old: dict, new: dict) -> None:
    """Refuses to go on with a run under another recipe than it was started with."""
    if old["task"] != new["task"]:
        raise UserError(
            f"{run} is a run of task {old['task']}, and this config is of task {new['task']}; "
            "give another --workdir."
        )
    old, new = dict(_flat(old)), dict(_flat(new))
    changeable = CHANGEABLE + (EVALUATED_WITH if MODE.value != "train" else ())
    changes = [
        f"config.{key} from {old.get(key)} to {value}"
        for key, value in new.items()
        if not any(key == c or key.startswith(c + ".") for c in changeable)
        and old.get(key) != (list(value) if isinstance(old.get(key), list) else value)
    ]
    if not changes:
        return
    said = f"the config of {run} has changed since it was started, {', '.join(changes)}"
    if not FORCE.value:
        raise UserError(
            f"{said}; give the old values, a new --workdir, or --force to go on all the same."
        )
    if jax.process_index() == 0:
        print(f"--force: {said}")


def _flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def parse(argv: list[str]) -> list[str]:
    """Parses flags; a misspelt key gets one sentence with its nearest neighbour."""
    if {"--help", "-h"} & set(argv):
        app.usage(writeto_stdout=True)
        sys.exit(0)
    return command_line.parse_flags(flags.FLAGS, _with_config(argv))


def _with_config(argv: list[str]) -> list[str]:
    """Adds the config that the run in --workdir was started with where no --config is given."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", "-config")
    finder.add_argument("--workdir", "-workdir")
    given, _ = finder.parse_known_args(argv[1:])
    if given.config or not given.workdir:
        return argv
    run = Path(given.workdir).expanduser()
    if not (run / "config.json").is_file():
        raise UserError(
            f"--config is missing, and {run} holds no config.json of an earlier run; give "
            "--config=configs/... or the folder of a run."
        )
    return [argv[0], f"--config={STORED_CONFIG}:{run}", *argv[1:]]


def command() -> None:
    """The command line: exit status 0, 1 for a problem that the user can mend, or a traceback."""
    # Orbax reports every step of every save, and every thread of one that fails, asyncio every
    # array; what a person must know raises.
    logging.set_verbosity(logging.FATAL)
    asyncio_logger.setLevel("CRITICAL")
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.fail(error, 1)
        sys.exit(1)
    except preemption.Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(preemption.STATUS)
    except KeyboardInterrupt as error:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        distributed.fail(error, preemption.STATUS)
        sys.exit(preemption.STATUS)
    except Exception as error:
        distributed.fail(error, 1)
        raise


if __name__ == "__main__":
    command()
