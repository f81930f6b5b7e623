"""docs/serving.md tells the truth: its programs run against a server, and its settings are those of the commands."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_engine import EchoEngine
from live_server import live

import opendeep_jax
from opendeep_jax.cli import chat, serve

PAGE = (Path(opendeep_jax.__file__).parent.parent / "docs/serving.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The contents of the page's blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def server():
    with live(lambda: EchoEngine(max_length=4096)) as running:
        yield running


def test_the_program_with_openais_client_runs(server, capsys):
    (program,) = blocks("python")
    exec(program.replace(ADDRESS, server.address), {})
    assert capsys.readouterr().out.startswith("<user>Why is the sky blue?<assistant><user>")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_lines_with_curl_run(server):
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    for line in lines:
        done = subprocess.run(
            [*shlex.split(line.replace(ADDRESS, server.address)), "--fail"], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0 and done.stdout, (line, done.stderr)
    assert len(lines) == 3


def test_the_commands_and_the_settings_are_understood(capsys):
    shown = {}
    for name, command in {"chat": chat, "serve": serve}.items():
        with pytest.raises(SystemExit):
            command.main(["--help"])
        shown[name] = capsys.readouterr().out
    commands = [line for block in blocks("bash") for line in block.splitlines() if "opendeep " in line]
    assert len(commands) >= 5
    for line in commands:
        words = shlex.split(line.partition("opendeep ")[2])
        if words[0] not in shown:
            continue
        for word in words[1:]:
            assert f"  {word.partition('=')[0]} " in shown[words[0]], line
    for setting, default in re.findall(r"^\| `(--\w+)(?:=(\d+))?` \|", PAGE, flags=re.MULTILINE):
        (line,) = [line for line in shown["serve"].splitlines() if line.startswith(f"  {setting} ")]
        assert not default or float(re.search(r"default: ([\d.]+)", line)[1]) == float(default)
