"""The Python of docs/generation.md runs as it stands there."""

import re
from pathlib import Path

import opendeep_jax
from opendeep_jax.cli.main import main

PAGE = Path(opendeep_jax.__file__).parent.parent / "docs" / "generation.md"


def test_the_pages_python_generates_from_an_exported_run(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "hf", f"--workdir={small_run}", "--out=exported"]) == 0
    capsys.readouterr()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(code, {})
    assert re.fullmatch(r"\[\d+(, \d+)*\] (length|stop)\n", capsys.readouterr().out)
