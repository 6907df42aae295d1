"""The house stands on its rules: imports point down, and nothing reaches for what is banned.

The rules are read from the sources, so they hold for imports inside functions too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "beit_jax"
# From the ground up. A room imports rooms of lower floors and, if it is a folder, its own files.
FLOORS = [
    {"durable", "errors", "references"},
    {
        "augment",
        "command_line",
        "damage",
        "distributed",
        "limits",
        "lock",
        "losses",
        "masking",
        "metrics",
        "models",
        "photometric",
        "preemption",
        "resize",
        "retention",
        "windows",
    },
    {
        "architecture",
        "data",
        "environment",
        "health",
        "logistic",
        "optimizer",
        "pictures",
        "sharding",
        "stored_config",
        "trackers",
    },
    {"attention", "checkpoint", "class_names", "interop", "knn", "progress", "reading", "task"},
    {"frozen", "gradients", "plan", "same_data", "saving"},
    {"bad_update"},
    {"evaluate", "features", "teacher", "tokenizer", "warm_start"},
    {"feature_scores"},
    {"tasks", "train"},  # neither knows the other
    {"portable", "run"},
    {"predict"},
    {"benchmark", "convert", "main", "prepare", "report"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What the benchmark compares with is in PyTorch; nothing else imports it.
PEER = PACKAGE / "benchmark" / "peer.py"
BANNED = {"tensorflow", "timm", "torch", "torchvision", "transformers"}
FOLDERS = ("beit_jax", "configs", "tests", "launch")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports; `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (f"{start}.{alias.name}" for alias in node.names)


def banned(tree: ast.AST) -> list[str]:
    return [name for name in imports(tree) if name.split(".")[0] in BANNED]


def wrong_floors(tree: ast.AST, path: Path) -> list[str]:
    """Imports of beit_jax in one of its files that do not point down."""
    first, *inner = path.relative_to(PACKAGE).parts
    room = first.removesuffix(".py")
    wrong = []
    for name in imports(tree):
        head, other = (name.split(".") + [""])[:2]
        if head == "":
            wrong.append(f"{name}: write imports in full")
        elif head != "beit_jax" or (inner and other == room):
            continue
        elif other not in FLOOR:
            wrong.append(f"{name}: not a room of FLOORS")
        elif FLOOR[other] >= FLOOR[room]:
            wrong.append(f"{name}: {room} is on floor {FLOOR[room]}, {other} on {FLOOR[other]}")
    return wrong


def config_gets(tree: ast.AST) -> list[int]:
    """Lines that call `get` on a config or a part of one: a default hidden from configs/."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).split(".")
            if node.func.attr == "get" and "config" in owner:
                lines.append(node.lineno)
    return lines


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=named)
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        assert not list(imports(parse(path))), "the package's root stays cheap to import"
        return
    assert not wrong_floors(parse(path), path)


@pytest.mark.parametrize("path", [path for path in SOURCES if path != PEER], ids=named)
def test_neither_torch_nor_tensorflow(path):
    assert not banned(parse(path))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=named)
def test_no_default_is_hidden_in_config_get(path):
    assert not config_gets(parse(path))


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").rglob("*.py")), ids=named)
def test_models_take_fields_and_no_config(path):
    assert not [name for name in imports(parse(path)) if name.startswith("ml_collections")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=named)
def test_configs_import_no_code_of_the_package(path):
    assert not [name for name in imports(parse(path)) if name.split(".")[0] == "beit_jax"]


# The rules themselves, against sources that break them.


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("train.py", "from beit_jax.tasks import mim"),
        ("train.py", "from beit_jax import tasks"),
        ("tasks/mim.py", "def f():\n    import beit_jax.train"),
        ("models/vit.py", "from beit_jax import losses"),
        ("losses.py", "from beit_jax.metrics import add"),
        ("task.py", "from beit_jax.newcomer import x"),
        ("models/vit.py", "from .layers import Block"),
        ("train.py", "import beit_jax"),
    ],
)
def test_an_import_that_points_up_is_seen(room, source):
    assert wrong_floors(ast.parse(source), PACKAGE / room)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("models/vit.py", "from beit_jax.models.layers import Block\nimport jax"),
        ("train.py", "from beit_jax import checkpoint\nfrom beit_jax.task import Task"),
        ("masking.py", "from beit_jax.errors import UserError"),
    ],
)
def test_an_import_that_points_down_is_not(room, source):
    assert not wrong_floors(ast.parse(source), PACKAGE / room)


def test_banned_libraries_and_hidden_defaults_are_seen():
    assert banned(ast.parse("def f():\n    import torch.nn"))
    assert banned(ast.parse("from tensorflow import io"))
    assert not banned(ast.parse("import tensorflow_datasets as tfds"))
    assert config_gets(ast.parse("x = config.model.get('width', 3)")) == [1]
    assert config_gets(ast.parse("x = self.config.get('a')")) == [1]
    assert not config_gets(ast.parse("x = table.get('a')"))
