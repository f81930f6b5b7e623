"""docs/architecture.md and docs/extending.md name nothing that does not exist: files, functions, tests, settings; nor
does another page name a function that is not there."""

import ast
import dataclasses
import re
from pathlib import Path

import opendeep_jax
from opendeep_jax.config.schema import RunConfig

PACKAGE = Path(opendeep_jax.__file__).parent
ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
QUOTED = sorted(
    set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE + EXTENDING, flags=re.DOTALL | re.MULTILINE)))
)
GROUPS = [field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)]

PLACES = [text for text in QUOTED if re.fullmatch(r"[\w.]+(/[\w.]+)+(:[\w.]+)?", text)]
SETTINGS = [text for text in QUOTED if re.fullmatch(rf"({'|'.join(GROUPS)})(\.(?!json)\w+)+", text)]


def find(path: str) -> Path | None:
    """The file or folder of a path from the repository's root or from the package; None if there is none."""
    return next((root / path for root in (ROOT, PACKAGE) if (root / path).exists()), None)


def defines(body: list[ast.stmt], name: str) -> bool:
    """Whether statements define `function`, `Class`, `Class.method` or `CONSTANT`."""
    first, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return not rest or defines(node.body, rest)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not rest and any(isinstance(target, ast.Name) and target.id == first for target in targets):
            return True
    return False


def is_setting(name: str) -> bool:
    """Whether a dotted name leads to a field of RunConfig."""
    value = RunConfig()
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def exists(place: str) -> bool:
    """Whether there is the file or folder of `path`, or what `path:name` names in it."""
    path, _, name = place.partition(":")
    file = find(path)
    return file is not None and (not name or defines(ast.parse(file.read_text(encoding="utf-8")).body, name))


def test_what_the_architecture_names_exists():
    assert [place for place in PLACES if not exists(place)] == []


def test_functions_that_other_pages_name_exist():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("**/*.md")]
    places = {place for page in pages for place in re.findall(r"`(\w+(?:/\w+)+\.py:[\w.]+)`", page)}
    assert len(places) > 100 and sorted(place for place in places if not exists(place)) == []


def test_settings_that_the_architecture_names_are_fields():
    assert [name for name in SETTINGS if not is_setting(name)] == []


def test_the_page_is_read_and_a_wrong_name_is_seen():
    assert len(PLACES) > 80 and len(SETTINGS) >= 3
    body = ast.parse((PACKAGE / "train" / "step.py").read_text(encoding="utf-8")).body
    assert defines(body, "make_train_step") and not defines(body, "make_step")
    assert find("train/step.py") and find("train/stride.py") is None
    assert is_setting("train.batch_ramp") and not is_setting("train.batch_ramps")


def test_every_room_has_a_row():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert {room for room in rooms if f"`opendeep_jax/{room}`" not in PAGE} == set()
