"""docs/evaluation.md tells the truth: its commands run on a tiny model, and its task is one."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import opendeep_jax  # noqa: E402
from opendeep_jax.cli.main import main  # noqa: E402

PAGE = (Path(opendeep_jax.__file__).parent.parent / "docs/evaluation.md").read_text("utf-8")
FROM_THE_HUB = "hellaswag"


def blocks(language: str) -> list[str]:
    """The contents of the page's blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_commands_run(tiny_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(
        "opendeep_jax.train.evaluate.evaluate_workdir", lambda workdir, step: {"held_out_bits_per_byte": 1.0}
    )
    shutil.copytree(tiny_directory, tmp_path / "models/SmolLM2")
    for directory in ("texts", "tasks", "runs/quickstart"):
        Path(directory).mkdir(parents=True)
    Path("runs/quickstart/config.json").write_text("{}", "utf-8")
    Path("texts/novel.txt").write_text("Call me a novel. " * 10, "utf-8")
    Path("texts/articles.jsonl").write_text('{"text": "An article."}\n' * 12, "utf-8")
    for block in blocks("yaml") + blocks("json"):
        name, _, content = block.partition("\n")
        Path(name.removeprefix("# ")).write_text(content, "utf-8")
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("opendeep ")]
    run = [line for line in lines if FROM_THE_HUB not in line]
    assert (len(lines), len(run)) == (6, 5)
    for line in run:
        words = [word for word in shlex.split(line)[1:] if not word.startswith(("--max_length", "--stride"))]
        assert main(words) == 0, (line, capsys.readouterr().err)
    found = json.loads(Path("colors.json").read_text("utf-8"))
    for field in re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE):
        value = found
        for part in field.replace("NAME", "colors").split("."):
            value = value[part]
        assert value
    assert found["settings"]["cut_prompts"] == 0
    assert json.loads(Path("articles.json").read_text("utf-8"))["drawn"] == "documents"


def test_every_setting_on_the_page_is_one(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert [setting for setting in set(re.findall(r"(--\w+)", PAGE)) if f"{setting} " not in shown] == []
