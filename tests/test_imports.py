"""Rooms look one way: each imports only from those before it, as docs/architecture.md draws them."""

import ast
import sys
from pathlib import Path

import pytest

import opendeep_jax

ROOT = Path(opendeep_jax.__file__).parent.parent

ORDER = [
    {"config"},
    {"display"},
    {"text"},
    {"record"},
    {"parallel"},
    {"kernels_pallas"},
    {"ops"},
    {"models"},
    {"data", "generation", "interop"},
    {"checkpoint"},
    {"pretrained"},
    {"faults"},
    {"train"},
    {"plan", "posttrain", "evaluation", "openness"},
    {"jobs", "serving"},
    {"cli"},
]
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
STRANGERS = ({"data", "models"},)
"""Rooms that never import each other, whatever their order."""

FILES = sorted([*(ROOT / "opendeep_jax").glob("*/**/*.py"), *(ROOT / "kernels_pallas").rglob("*.py")])


PENDING = {
    "opendeep_jax/checkpoint/checkpoints.py": {"checkpoint imports opendeep_jax.train.state.TrainState"},
    "opendeep_jax/checkpoint/versions.py": {"checkpoint imports opendeep_jax.faults.health.new_health"},
}
"""Files that moved before what they need did; a line goes when its import does."""


def imported(text: str) -> set[str]:
    """Dotted names that a module imports, also inside functions; `from a.b import c` counts as a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """The room that a dotted module name belongs to; None for other packages and the bare `opendeep_jax`."""
    parts = name.split(".")
    if parts[0] == "kernels_pallas":
        return "kernels_pallas"
    return parts[1] if parts[0] == "opendeep_jax" and len(parts) > 1 and not parts[1].startswith("__") else None


def violations(room: str, text: str) -> list[str]:
    """Imports in a module of `room` that look the wrong way."""
    wrong = []
    for name in sorted(imported(text)):
        target = room_of(name)
        if target is None or target == room:
            continue
        if PLACE[target] >= PLACE[room] or any({room, target} == pair for pair in STRANGERS):
            wrong.append(f"{room} imports {name}")
    return wrong


def test_modules_import_only_from_earlier_rooms():
    rooms = {path: room_of(".".join(path.relative_to(ROOT).parts)) for path in FILES}
    new = set(rooms.values()) - PLACE.keys()
    assert not new, f"{new} are new rooms: give them a place in ORDER and in docs/architecture.md"
    found = {str(path.relative_to(ROOT)): set(violations(room, path.read_text())) for path, room in rooms.items()}
    assert {path: wrong for path, wrong in found.items() if wrong} == PENDING


def test_config_needs_nothing_but_the_standard_library_and_the_command_line_parsers():
    for path in sorted((ROOT / "opendeep_jax" / "config").glob("*.py")):
        parsers = {"tyro", "absl"} if path.name == "overrides.py" else set()
        others = {name.split(".")[0] for name in imported(path.read_text())} - sys.stdlib_module_names - parsers
        assert others <= {"opendeep_jax"}, path


def test_kernels_know_nothing_of_the_project():
    for path in (ROOT / "kernels_pallas").rglob("*.py"):
        assert not any(name.startswith("opendeep_jax") for name in imported(path.read_text())), path


@pytest.mark.parametrize(
    "room, text, wrong",
    [
        ("ops", "from opendeep_jax.models import decoder", True),
        ("data", "def f():\n    import opendeep_jax.models.decoder", True),
        ("models", "from opendeep_jax.data.batch import Batch", True),
        ("generation", "from opendeep_jax import interop", True),
        ("models", "from opendeep_jax.ops.norm import rms_norm\nfrom kernels_pallas import x\nimport jax", False),
        ("cli", "from opendeep_jax.train.loop import train\nimport opendeep_jax", False),
    ],
)
def test_the_check_itself_sees_a_wrong_import(room, text, wrong):
    assert bool(violations(room, text)) is wrong
