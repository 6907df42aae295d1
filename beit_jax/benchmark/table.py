"""Measurements as a person reads them."""

import io

from rich.console import Console
from rich.table import Table

_UNITS = (
    ("flops_per_second", 1e9, "GFLOP/s"),
    ("flops_per_image", 1e9, "GFLOP an image"),
    ("bytes", 2**20, "MiB"),
)


def render(found: dict) -> str:
    """A table of names and values; nested ones stand below their name."""
    out = Table(show_header=False, title=f"beit_jax.benchmark {found['command']}")
    out.add_column(justify="left")
    out.add_column(justify="right", overflow="fold")
    _add(out, {key: value for key, value in found.items() if key != "command"}, "")
    console = Console(file=io.StringIO(), width=100)
    console.print(out)
    return console.file.getvalue().rstrip()


def _add(out: Table, values: dict, indent: str) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            out.add_row(f"{indent}{name.replace('_', ' ')}", "")
            _add(out, value, indent + "  ")
        else:
            out.add_row(*_row(indent, name, value))


def _row(indent: str, name: str, value) -> tuple[str, str]:
    for ending, unit, said in _UNITS:
        if name.endswith(ending) and value is not None:
            name = name.removesuffix(ending).rstrip("_") or ending.split("_")[0]
            return f"{indent}{name.replace('_', ' ')}", f"{value / unit:,.1f} {said}"
    if name.endswith("_seconds"):
        return f"{indent}{name.removesuffix('_seconds').replace('_', ' ')}", _duration(value)
    if name.endswith("share"):
        return f"{indent}{name.replace('_', ' ')}", f"{100 * value:.2f} %"
    text = f"{value:,.2f}" if isinstance(value, float) else str(value)
    return f"{indent}{name.replace('_', ' ')}", text


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"
