"""What the README and the docs tell people to type works.

Every ```bash block is read. A `make` target must exist, a file that is named must be there, and an `opendeep` command
must be understood by the real command line, with every setting in it; the slow test then runs the README's commands
one after the other, with a model small enough for seconds.
"""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

import opendeep_jax
from opendeep_jax.cli import data, describe, launch, plan, sweep
from opendeep_jax.cli.main import COMMANDS, main
from opendeep_jax.config.overrides import resolve

ROOT = Path(opendeep_jax.__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
ELSEWHERE = ("git clone", "cd ", "pip install", "python -m venv", "source ", "jupyter ", "tensorboard ")
"""Beginnings of commands that belong to other programs, which no test here runs."""

TINY = shlex.split(
    "--train.steps=2 --train.batch_size=8 --train.loss_chunk=32 --train.sample_every=0 --train.log_every=1 "
    "--optimizer.warmup_steps=1 --data.sequence_length=32 --data.tokenizer=bytes --model.vocab_size=512 "
    "--model.hidden_size=32 --model.num_layers=2 --model.moe.expert_size=16 --evaluation.every=0 "
    "--evaluation.final_batches=1 --checkpoint.every=0"
)
"""Overrides that make any small recipe a matter of seconds."""


def commands_of(page: Path) -> list[str]:
    """The command lines in a page's bash blocks; comments dropped, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


COMMANDS_IN_PAGES = [(page.name, command) for page in PAGES for command in commands_of(page)]


def train_commands() -> list[list[str]]:
    """Arguments of the README's `opendeep` commands that do something, in order."""
    lines = [shlex.split(line) for line in commands_of(ROOT / "README.md")]
    return [line[1:] for line in lines if line[0] == "opendeep" and "--help" not in line]


def test_the_readme_counts_the_published_models_right():
    tables = [sizes for path in sorted((ROOT / "configs").glob("*.py")) if (sizes := runpy.run_path(path).get("SIZES"))]
    counted = f"| {sum(map(len, tables))} published models of {len(tables)} families"
    assert counted in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_in_the_docs_are_understood(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named as seen from the repository
    wrong = []
    for page, command in COMMANDS_IN_PAGES:
        try:
            check_command(page, command, capsys)
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}: `{command}`: {error}")
    assert wrong == []


def check_command(page: str, command: str, capsys) -> None:
    """Fail unless what a page's command names is there, and an `opendeep` command is understood."""
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert [word for word in arguments if "=" not in word and word not in targets] == []
    elif program == "opendeep":
        understood(arguments, capsys)
    elif program.startswith("python") and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file()
    elif "/" in program:
        assert (ROOT / program).is_file()
    else:
        assert command.startswith(ELSEWHERE), f"{page}: no test knows how to check `{command}`"


def understood(arguments: list[str], capsys) -> None:
    """Fails unless the command exists and takes these settings."""
    name = arguments[0]
    if name.startswith("--"):
        assert main(arguments) == 0
        return
    assert name in COMMANDS
    words = [word for word in arguments if not word.startswith("--")]
    settings = [word for word in arguments if word.startswith("--") and word != "--help"]
    if any(setting.startswith("--config") for setting in settings):
        # These commands take settings of their own beside the recipe's, and their help names them.
        modules = {"data": data, "describe": describe, "plan": plan, "sweep": sweep, "launch": launch}
        own = modules[name].HELP if name in modules else ""
        of_the_run = [word for word in settings if not re.search(rf"{word.partition('=')[0]}[ =]", own)]
        resolve(of_the_run + [word for word in settings if word.startswith("--config")])  # raises for what is wrong
        return
    try:
        assert main([*words, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    explained = capsys.readouterr().out
    assert [setting for setting in settings if f"{setting.partition('=')[0]}" not in explained] == []


def test_the_links_of_the_pages_lead_somewhere():
    dead = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert dead == []


@pytest.mark.slow
def test_the_readmes_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(40):
        (corpus / f"{index}.py").write_text(f"def number_{index}():\n    return {index}\n" * 20)
    monkeypatch.chdir(tmp_path)
    source = [f"--data.sources.0.path={corpus}", "--data.sources.0.name=corpus", "--data.held_out_fraction=0.3"]
    more = {"train": [*TINY, *source], "branch": ["--train.steps=3"]}
    more |= {"generate": ["--max_tokens=4"], "prepare": [*TINY, *source]}
    # These take minutes; tests/cli/test_plan_command.py, tests/jobs and tests/train/test_processes.py run small ones.
    commands = [command for command in train_commands() if command[0] not in ("plan", "launch", "sweep")]
    expected = {"train", "describe", "generate", "eval", "report", "data", "watch", "checkpoints"}
    assert expected <= {command[0] for command in commands}
    for command in commands:
        name = command[1] if command[0] == "data" else command[0]
        if any(word.startswith("--from=") for word in command):
            name = "branch"
        command = [word.replace("json/decoder.py", "7.py") for word in command]  # a document of this corpus
        assert main([*command, *more.get(name, [])]) == 0, capsys.readouterr().err
    reports = list((tmp_path / "runs").glob("*/report.html"))
    assert len(reports) == 2 and all(report.stat().st_size for report in reports)
