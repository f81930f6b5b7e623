"""`opendeep generate` continues prompts with any model, one as it comes or many as JSON lines."""

import json
import re

import pytest

from opendeep_jax.cli.main import main


@pytest.fixture(scope="module")
def generate(small_run):
    """A function (capsys, arguments) to status, output and errors of the command on a small trained run."""

    def generate(capsys, *arguments):
        capsys.readouterr()
        status = main(["generate", f"--workdir={small_run}", "--max_length=64", *arguments])
        return (status, *capsys.readouterr())

    return generate


def test_a_trained_run_goes_on_writing(generate, capsys):
    answers = {
        generate(capsys, "--prompt=import ", "--max_tokens=12", "--temperature=0", f"--seed={s}") for s in (0, 7)
    }
    ((status, text, errors),) = answers
    assert status == 0 and errors == "" and text.startswith("import ") and 1 < len(text) - len("import ") <= 13


def test_the_seed_decides_what_is_sampled(generate, capsys):
    hot = ["--prompt=import ", "--max_tokens=20", "--temperature=2"]
    one, again, other = (generate(capsys, *hot, f"--seed={seed}")[1] for seed in (3, 3, 4))
    assert one == again != other


def test_many_prompts_give_json_lines_in_their_order_that_are_what_each_gives_alone(generate, capsys, tmp_path):
    prompts = ["import ", "def main(", "x", "class A:\n"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    settings = ["--max_tokens=9", "--temperature=1.5", "--seed=5"]
    _, out, _ = generate(capsys, f"--prompts={tmp_path / 'prompts.jsonl'}", "--n=2", "--slots=3", *settings)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in prompts for _ in range(2)]
    assert [line["seed"] for line in lines] == [5, 6] * 4
    alone = generate(capsys, f"--prompt={prompts[1]}", *settings)[1]
    assert alone == prompts[1] + lines[2]["text"] + "\n"


def test_drafts_change_no_text(generate, capsys):
    settings = ["--prompt=def f(", "--max_tokens=30", "--temperature=0"]
    _, drafted, errors = generate(capsys, *settings, "--speculate=2")
    assert drafted == generate(capsys, *settings)[1]
    assert re.fullmatch(r"\d+ of \d+ drafted tokens stood\.\n", errors)


def test_a_mesh_writes_what_one_device_writes(generate, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("import \ndef main(\nx\n")
    settings = [f"--prompts={tmp_path / 'prompts.txt'}", "--max_tokens=12", "--temperature=0"]
    status, divided, errors = generate(capsys, *settings, "--parallel.tensor=2", "--parallel.expert=2")
    assert (status, divided) == (0, generate(capsys, *settings)[1]), errors


def test_a_stop_text_ends_the_continuation_before_itself(generate, capsys):
    settings = ["--prompt=def f(", "--max_tokens=30", "--temperature=0"]
    whole = generate(capsys, *settings)[1][len("def f(") : -1]
    stop = whole[4:6]
    stopped = generate(capsys, *settings, f"--stop={stop}")[1][len("def f(") : -1]
    assert stopped == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["--temperature=-1"], "--temperature = -1.0: must be from 0 to 100"),
        (["--temperature=nan"], "--temperature = nan"),
        (["--temperature=hot"], "--temperature=hot"),
        (["--max_tokens=0"], "must be at least 1"),
        (["--top_k=-1"], "must be at least 0"),
        (["--n=0"], "--n=0: must be at least 1"),
        (["--model=elsewhere"], "are both given"),
        (["--prompt=x", "--prompts=y"], "are both given"),
        (["--prompts=nowhere.txt"], "cannot be read"),
        (["--parallel.context=2"], "--parallel.context: generation divides neither a text nor"),
        (["--parallel.tensor=3"], "--parallel.tensor=3: 3 does not divide the 8 devices that are found here"),
        (["--parallel.data=-1", "--parallel.fsdp=-1"], "one may be -1"),
        (["--parallel.tensor=0"], "--parallel.tensor=0: each must be at least 1"),
        (["--parallel.tensor=8"], "must divide over parallel.tensor = 8"),
        (["--workdr=x"], "Did you mean --workdir?"),
        (["--speculate=16"], "speculate = 16"),
        (["--prompt=" + "word " * 200], "prompt and output together may have 64"),
    ],
)
def test_senseless_requests_are_refused_and_nothing_is_printed(arguments, answer, generate, capsys):
    status, out, errors = generate(capsys, *arguments)
    assert status == 2 and out == "" and answer in errors


@pytest.mark.parametrize("text", ["", "[1]\n", '{"text": "x"}\n', '{"prompt": 3}\n', "{"])
def test_files_without_prompts_are_refused(text, generate, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(text)
    status, _, errors = generate(capsys, f"--prompts={tmp_path / 'prompts.jsonl'}")
    assert status == 2 and str(tmp_path / "prompts.jsonl") in errors


def test_a_model_must_be_named_and_be_there(capsys, tmp_path):
    assert main(["generate"]) == 2 and "--model is missing" in capsys.readouterr().err
    assert main(["generate", f"--workdir={tmp_path}"]) == 2 and "holds no model" in capsys.readouterr().err
