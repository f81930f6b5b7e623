"""`opendeep checkpoints`: what it prints, how it ends, and what it refuses."""

import shlex
from pathlib import Path

import pytest
from small_checkpoints import flip, payload, save

import opendeep_jax
from opendeep_jax.cli.main import main
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.schema import RunConfig

PAGE = Path(opendeep_jax.__file__).parents[1] / "docs" / "checkpoints.md"


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A run with checkpoints of the steps 2, 4 and 6, of which 4 was the best."""
    save(tmp_path / "run", 2, 4, 6, measures={2: 3.0, 4: 1.25})
    save_run_config(RunConfig(), RunConfig(), tmp_path / "run")
    return tmp_path / "run"


def opendeep(capsys, *words) -> tuple[int, str, str]:
    status = main(["checkpoints", *map(str, words)])
    return (status, *capsys.readouterr())


def test_a_list_says_why_each_is_kept(workdir, capsys):
    status, out, _ = opendeep(capsys, "list", f"--workdir={workdir}")
    head, two, four, six = out.splitlines()
    assert status == 0 and head.split()[:2] == ["step", "time"]
    assert "not by the policy" in two and "1.2500" in four and "newest 2" in four and six.endswith("newest")
    assert len({line.index("durable") for line in (two, four, six)}) == 1


def test_verifying_ends_with_2_where_one_is_damaged(workdir, capsys):
    status, out, _ = opendeep(capsys, "verify", f"--workdir={workdir}")
    assert status == 0 and out.count("arrays are what was saved") == 3
    for file in payload(workdir / "checkpoints" / "4" / "digests"):
        flip(file)
    assert opendeep(capsys, "verify", f"--workdir={workdir}", "--step=2")[0] == 0
    status, out, error = opendeep(capsys, "verify", f"--workdir={workdir}")
    assert status == 2 and "step 4: its list of digests is damaged" in error and error.count("\n") == 1
    assert "its list of digests is damaged" in opendeep(capsys, "list", f"--workdir={workdir}")[1]


def test_two_checkpoints_are_compared(workdir, capsys, tmp_path):
    status, out, _ = opendeep(capsys, "diff", f"--workdir={workdir}", "--a=2", "--b=4")
    assert status == 0 and "params.embed" in out and "max abs" in out
    save(tmp_path / "other", 2)
    status, out, _ = opendeep(capsys, "diff", f"--workdir={workdir}", "--a=2", f"--other={tmp_path / 'other'}")
    assert out.startswith("bitwise equal: all ")


def test_pruning_and_averaging(workdir, capsys, tmp_path):
    out = tmp_path / "mean"
    assert "averaged 2" in opendeep(capsys, "average", f"--workdir={workdir}", "--steps=2,6", f"--out={out}")[1]
    assert opendeep(capsys, "verify", f"--workdir={out}")[0] == 0
    words = ("prune", f"--workdir={workdir}", "--keep=1", "--keep_best=1")
    assert opendeep(capsys, *words, "--dry_run")[1] == "would delete the checkpoints of steps 2\n"
    assert opendeep(capsys, *words)[1] == "deleted the checkpoints of steps 2\n"
    assert opendeep(capsys, *words)[1] == "nothing to delete\n"


@pytest.mark.parametrize(
    "words, text",
    [
        ("lst --workdir=W", "Did you mean"),
        ("verify --workdir=W --step=5", "there are: 2, 4, 6"),
        ("diff --workdir=W --a=4 --b=4", "one checkpoint"),
        ("average --workdir=W --steps=two --out=x", "with commas between"),
        ("average --workdir=W --steps=2,4", "--out is missing"),
        ("prune --workdir=W --keep=-7", "--keep=-7: must be at least 0"),
        ("diff --workdir=W --other=/nowhere", "/nowhere has no checkpoint"),
        ("list", "--workdir is missing"),
        ("list --workdir=/nowhere", "no run can be read there"),
    ],
)
def test_what_cannot_work_is_one_paragraph(words, text, workdir, capsys):
    status, _, error = opendeep(capsys, *words.replace("W", str(workdir)).split())
    assert status == 2 and text in error and error.count("\n") == 1


def test_the_help_and_the_page_name_every_action(capsys):
    status, out, _ = opendeep(capsys, "--help")
    page = PAGE.read_text()
    for action in ("list", "verify", "diff", "prune", "average"):
        assert f"checkpoints {action}" in out and f"checkpoints {action}" in page
    assert status == 0


def test_the_pages_commands_run(workdir, capsys, monkeypatch, tmp_path):
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("opendeep checkpoints ")]
    assert len(lines) >= 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(workdir)
    for line in lines:
        words = shlex.split(line.replace("100,150,200", "2,4,6").replace("=100", "=2").replace("=150", "=4"))
        assert main(words[1:]) == 0, capsys.readouterr().err
