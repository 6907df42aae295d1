"""Exchanges weights with the PyTorch world: official, Hugging Face, timm, OpenAI and DINO files.

`python -m beit_jax.convert --help` shows its commands with examples. PyTorch is not needed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from beit_jax import checkpoint, class_names, command_line, limits, metrics, portable, stored_config
from beit_jax.errors import UserError
from beit_jax.interop import expect, exporting, files, pytorch_writer
from beit_jax.interop.exporting import STYLES
from beit_jax.interop.families import recognise
from beit_jax.interop.importing import Imported, import_archive

_EXAMPLES = """examples:
  # a tokenizer and a pre-trained encoder, as their authors publish them
  python -m beit_jax.convert import downloads/dall_e runs/dall_e
  python -m beit_jax.convert import beit_base_patch16_224_pt22k.pth runs/beit_base
  python -m beit_jax.main --mode=eval --workdir=runs/beit_base \\
      --config.tokenizer.path=runs/dall_e --config.data.source=folder:PHOTOS

  # what was trained here, for transformers
  python -m beit_jax.convert export runs/mim_base hf_folder --format=hf

  python -m beit_jax.convert inspect beit_base_patch16_224_pt22k.pth
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every step of a save

    def command() -> int:
        options = _parser().parse_args(arguments)
        return options.run(options)

    return command_line.run("beit_jax.convert", command, "an unfinished DST can be deleted.")


def _parser() -> command_line.Parser:
    description = __doc__.split("\n")[0]
    parser, layout = command_line.make_parser("beit_jax.convert", description, _EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="import|export|inspect")

    reading = commands.add_parser("import", help="foreign weights to a run's folder", **layout)
    reading.add_argument("src", metavar="SRC", help="a weight file, or a folder with one")
    reading.add_argument("dst", metavar="DST", help="the run's folder to write; must not exist")
    reading.add_argument("--num-heads", type=int, help="attention heads, where nothing tells")
    reading.add_argument(
        "--early-layers", type=int, help="blocks below BEiT v2's CLS branch, where nothing tells"
    )
    reading.add_argument(
        "--allow-partial", action="store_true", help="initialise what the file lacks"
    )
    reading.add_argument(
        "--expect", metavar="FILE", help="safetensors of inputs and outputs to compare with"
    )
    reading.add_argument("--atol", type=float, default=1e-4, help="largest difference from them")
    reading.set_defaults(run=import_)

    writing = commands.add_parser("export", help="a run's weights to foreign files", **layout)
    writing.add_argument("src", metavar="RUN", help="a run's folder, or one of its checkpoints")
    writing.add_argument(
        "dst",
        metavar="DST",
        help="what to write: a folder (hf), or a file *.safetensors or *.pth (unilm, timm; .pth "
        "is for torch.load), or *.stablehlo",
    )
    writing.add_argument("--format", required=True, choices=(*STYLES, "stablehlo"))
    writing.set_defaults(run=export)

    looking = commands.add_parser("inspect", help="what a file or a run's folder holds", **layout)
    looking.add_argument("src", metavar="SRC", help="a weight file, or a folder")
    looking.set_defaults(run=inspect)
    return parser


def import_(options: argparse.Namespace) -> int:
    """Writes foreign weights as a run's folder; 1 if they do not give the expected numbers."""
    folder = Path(options.dst).expanduser()
    if folder.exists():
        state = (
            "" if (folder / "config.json").exists() else ", perhaps of an import that was cut off"
        )
        raise UserError(f"{folder} is there already{state}: choose another DST, or delete it first")
    expected = None if options.expect is None else _read_expected(options.expect)
    imported = import_archive(
        files.read(options.src),
        stored_config.every_key(),
        num_heads=options.num_heads,
        early_layers=options.early_layers,
        allow_partial=options.allow_partial,
    )
    _print(imported.report)
    try:
        limits.check(imported.config)
    except UserError as error:
        raise UserError(f"what lies beside the weights cannot work: {error}") from error
    # Compared first, so that no folder is left of weights that turned out wrong.
    if expected is not None and not _compare(imported, expected, options.atol):
        print(f"the numbers do not agree within --atol={options.atol}; {folder} was not written")
        return 1
    _write_run(folder, imported)
    print(f"wrote {folder}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Writes a run's weights as another project does."""
    target = Path(options.dst).expanduser()
    suffixes = {"hf": (), "stablehlo": (".stablehlo",)}.get(options.format, WEIGHT_FILES)
    if suffixes and target.suffix not in suffixes:
        raise UserError(
            f"DST is {target}, but --format={options.format} writes one file: name it "
            f"*{' or *'.join(suffixes)}"
        )
    if target.exists():
        raise UserError(f"{target} is there already: choose another DST, or delete it first")
    weights = checkpoint.load_weights(options.src, "RUN")
    lines = [("read", f"{weights.kind} of {weights.source}, task {weights.config['task']}")]
    if options.format == "stablehlo":
        content, signature = portable.stablehlo(weights)
        _write(target, lambda file: file.write_bytes(content))
        lines.append(("function", signature))
    else:
        names = class_names.read(weights.run)
        exported = exporting.export(weights.config, weights.variables, options.format, names)
        file = target if suffixes else target / "model.safetensors"
        _write(file, lambda part: WEIGHT_FILES[file.suffix](part, exported.tensors))
        for name, content in exported.jsons.items():
            _write(target / name, partial(_write_json, content))
        lines.append(("tensors", f"{len(exported.tensors)}"))
        lines += [("left out", text) for text in exporting.said(exported.left_out)]
        lines += [("not in it", text) for text in exported.unsaid]
    _print([*lines, ("wrote", str(target))])
    return 0


def _write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    # transformers wants to know whose arrays these are.
    save_file(tensors, file, {"format": "pt"})


WEIGHT_FILES = {".safetensors": _write_safetensors, ".pth": pytorch_writer.write}


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a file beside `file`, which takes its place when it is whole."""
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # safetensors writes files that nobody else may read
        write(part)
        part.chmod(mode)
        part.replace(file)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be written ({reason}); choose another place") from error


def _write_json(content: dict, file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def inspect(options: argparse.Namespace) -> int:
    """Prints what a weight file or a run's folder holds."""
    folder = Path(options.src).expanduser()
    if (folder / "checkpoints").is_dir() or folder.resolve().parent.name == "checkpoints":
        _inspect_run(folder)
        return 0
    archive = files.read(options.src)
    lines = [("read", f"{archive.kind}: {', '.join(archive.paths)}")]
    try:
        family, description = recognise(archive)
        lines.append(("recognised", f"{description.label} ({family.name})"))
        lines += [(key, str(value)) for key, value in description.config.items()]
        lines += [("assumed", note) for note in description.notes]
    except UserError as error:  # the tensors are worth seeing all the more
        lines.append(("not recognised", str(error)))
    lines += [(f"with it: {name}", _short(value)) for name, value in archive.extras.items()]
    _print(lines)
    _print_tensors(archive.tensors)
    return 0


def _inspect_run(folder: Path) -> None:
    weights = checkpoint.load_weights(str(folder), "SRC")
    model = weights.config["dvae" if weights.config["task"] == "dvae" else "model"]
    lines = [
        ("read", f"run of task {weights.config['task']}: {weights.source}"),
        ("step", Path(weights.source).name),
        ("sha256", weights.digest),
        ("images", f"{weights.config['data']['image_size']}"),
        *((key, str(value)) for key, value in model.items()),
    ]
    if (folder / "metrics.jsonl").is_file():
        scores = [
            line for line in metrics.read(folder) if line["split"] not in metrics.NOT_EVALUATIONS
        ]
        lines += [(f"{name}", str(value)) for name, value in (scores[-1] if scores else {}).items()]
    _print(lines)
    _print_tensors(flatten_dict(weights.variables, sep="/"))


def _read_expected(path: str) -> dict[str, np.ndarray]:
    if not path:  # a shell variable that is not set, which would name the folder we are in
        raise UserError("--expect is empty: name a file of inputs and outputs, or leave it out")
    return {name: np.asarray(tensor) for name, tensor in files.read(path).tensors.items()}


def _compare(imported: Imported, expected: dict[str, np.ndarray], atol: float) -> bool:
    """Prints every comparison; whether all agree."""
    comparisons, others = expect.compare(
        imported.config, imported.outputs, imported.variables, expected
    )
    for found in comparisons:
        text = f"largest difference {found.difference:.3g}"
        if found.equal is not None:
            text = f"{found.equal:.2%} of the tokens equal"
        verdict = "agrees" if found.agrees(atol) else "DIFFERS"
        print(f"{verdict:<12} {found.name}: {text}")
    if others:
        print(f"{'not compared':<12} {', '.join(others)}")
    return all(found.agrees(atol) for found in comparisons)


def _write_run(folder: Path, imported: Imported) -> None:
    """The run's folder: one checkpoint of no updates, and its config, written last."""
    report = "\n".join(_lines(imported.report)) + "\n"
    _write(folder / "import.txt", lambda file: file.write_text(report))
    try:
        checkpoint.save_weights(folder, imported.variables)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder} cannot be written ({reason}); make room there") from error
    class_names.keep(folder, imported.class_names)
    _write(folder / "config.json", partial(_write_json, imported.config.to_dict()))


def _print(report: list[tuple[str, str]]) -> None:
    print("\n".join(_lines(report)))


def _lines(report: list[tuple[str, str]]) -> list[str]:
    return [f"{what:<12} {text}" for what, text in report]


def _print_tensors(tensors) -> None:
    width = max(map(len, tensors), default=0)
    for name, tensor in tensors.items():
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        print(f"  {name:<{width}}  {str(tensor.dtype):<9} {shape:<18} {tensor.nbytes:>12,} bytes")


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + " ..."


if __name__ == "__main__":
    sys.exit(main())
