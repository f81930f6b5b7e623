"""What a repository promises beside its code: pins that match its requirements, tests that check shapes."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from opendeep_jax.ops.routing import expert_counts

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)( ; (?P<marker>.+))?")
PYTHONS = ("3.11.9", "3.12.9", "3.13.9")


def pins() -> list[re.Match]:
    """The lines of constraints.txt, comments left out."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [(line, PIN.fullmatch(line)) for line in lines if not line.startswith("#")]
    assert [line for line, match in found if match is None] == [], "only pins: no options, hosts, hashes or paths"
    return [match for _, match in found]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    environment = {"python_version": python[:4], "python_full_version": python, "sys_platform": "linux"}
    pinned = {
        match["name"]: match["version"]
        for match in pins()
        if not match["marker"] or Marker(match["marker"]).evaluate(environment)
    }
    extras = PROJECT["optional-dependencies"].values()
    requirements = [
        Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    ]
    wrong = [
        f"{requirement}: {pinned.get(canonicalize_name(requirement.name))}"
        for requirement in requirements
        if canonicalize_name(requirement.name) != PROJECT["name"]
        and not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]
    assert wrong == [], "`make lock` writes constraints.txt anew"


def test_continuous_integration_runs_lint_and_then_the_readmes_tests():
    commands = re.findall(r"^make .*?(?= </dev/null$)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert commands[0] == "make lint"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [f"```bash\n{command}\n```" in readme for command in commands[1:]] == [True]


def test_every_extra_that_is_named_is_one():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("opendeep_jax/**/*.py"), ROOT / "pyproject.toml"]
    named = {
        (file.name, extra.strip())
        for file in files
        for extras in re.findall(r"opendeep-jax\[([a-z, -]+)\]", file.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert len(named) > 10 and [one for one in named if one[1] not in PROJECT["optional-dependencies"]] == []


def test_shapes_in_annotations_are_checked_while_tests_trace():
    assert version("beartype")
    indices = jnp.zeros((2, 3, 4), jnp.int32)
    assert expert_counts(indices, jnp.ones((2, 3), jnp.bool_), 8).shape == (2, 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        expert_counts(indices, jnp.ones((2, 4), jnp.bool_), 8)
