"""docs/data.md tells the truth: its programs run, and its commands print what it says they print."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import opendeep_jax
from opendeep_jax.cli.main import main

ROOT = Path(opendeep_jax.__file__).parent.parent
PAGE = (ROOT / "docs/data.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The contents of the page's blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def without_keys(text: str) -> str:
    """Output without the keys of directories, which depend on when files were written."""
    return re.sub(r"-[0-9a-f]{16}\b", "-KEY", text).strip()


def run(command: str, capsys) -> str:
    """What a line of the page prints: its output, or the error of an `opendeep` command that refuses."""
    program, *arguments = shlex.split(command.partition(" > ")[0])
    if program == "opendeep":
        status = main(arguments)
        printed = capsys.readouterr()
        refusal = printed.err[printed.err.rfind("opendeep: ") :] if status == 2 else ""
        return "" if " > " in command else printed.out + refusal
    line = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1) if program == "python" else command
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout


def test_the_commands_print_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # as on a terminal
    programs = [block.partition("\n") for block in blocks("python") if re.match(r"# \w+\.py\n", block)]
    for name, _, program in programs:
        Path(name.removeprefix("# ")).write_text(program, "utf-8")
    sessions = [part for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert len(programs) == 3 and len(sessions) > 10
    for command, _, shown in (session.partition("\n") for session in sessions):
        assert without_keys(run(command, capsys)) == without_keys(shown), command


def test_the_phases_are_those_of_the_recipe():
    (excerpt,) = (block for block in blocks("python") if not block.startswith("# "))
    recipe = (ROOT / "configs/open_moe_1b.py").read_text("utf-8")
    assert "".join(excerpt.split()) in "".join(recipe.split())
