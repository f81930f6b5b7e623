"""What `opendeep launch` writes, whatever the target, and what it refuses."""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rendered_jobs import (
    BOTH,
    HOSTILE,
    NEEDS,
    RUN,
    bash,
    container,
    programs,
    read_yaml,
    rendered,
    startup_script,
)

from opendeep_jax.cli.launch import SETTINGS, main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.jobs.launch.render import TARGETS, fill, job_name, template_directory

# ---- all of them


@pytest.mark.parametrize("target, more", BOTH)
def test_every_placeholder_is_filled_and_the_command_is_in_the_file(target, more):
    text = rendered(target, *more)
    assert not re.search(r"\{\{|\}\}(?!\])", text.replace("{{name}}", ""))
    assert "/shared/runs/a" in text and re.search("images.example[/#]opendeep:1", text)
    assert len(text.splitlines()) < 140


def test_a_template_names_only_values_that_there_are():
    used = {name for file in template_directory().iterdir() for name in re.findall(r"\{\{(\w+)\}\}", file.read_text())}
    assert used  # each is looked up by `fill`, which has no default
    with pytest.raises(KeyError):
        fill("{{unknown}}", {})


def test_a_line_with_an_empty_value_is_left_out():
    assert fill("a\nb {{x}}\nc {{y}}{{y}}\n", {"x": "", "y": "1"}) == "a\nc 11\n"


def test_a_value_is_never_read_as_a_placeholder():
    assert fill("{{x}}", {"x": "{{y}}", "y": "wrong"}) == "{{y}}\n"


@pytest.mark.parametrize(
    "workdir, name",
    [
        ("/shared/runs/Wide_1", "opendeep-wide-1"),
        ("/shared/runs/learning_rate=3e-4,seed=1", "opendeep-learning-rate-3e-4-seed-SHA256"),
        ("/shared/" + "x" * 31, "opendeep-" + "x" * 31),
        ("/shared/" + "x" * 80, "opendeep-" + "x" * 24 + "-SHA256"),
        ("/shared/ÄÖ", "opendeep-SHA256"),
        ("/shared/runs/" + "ab-" * 30, "opendeep-ab-ab-ab-ab-ab-ab-ab-ab-SHA256"),
    ],
)
def test_a_job_has_a_name_that_every_engine_takes(workdir, name):
    name = name.replace("SHA256", hashlib.sha256(Path(workdir).name.encode()).hexdigest()[:6])
    assert job_name(workdir) == name
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40


def test_jobs_of_runs_that_differ_anywhere_in_their_names_are_not_one_job():
    ends = [
        f"learning_rate={rate},experts_per_token={k},seed={s}" for rate in (-1, 1, 0.1) for k in (2, 4) for s in (0, 1)
    ]
    assert len({job_name(f"/shared/runs/{end}") for end in ends}) == 12


@pytest.mark.parametrize(
    "flag, form",
    [
        ("XLA_FLAGS", r"--xla_\w+=\w+"),
    ],
)
def test_the_compiler_flags_in_the_templates_are_known(flag, form):
    found = {word for target in TARGETS for word in re.findall(form, rendered(target))}
    assert found
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", flag: " ".join(sorted(found))}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    environment[flag] += " --xla_gpu_no_such_flag=1"
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0


def test_a_file_is_written_without_loading_jax():
    arguments = ["--target=slurm", "--dry_run", *NEEDS["slurm"], *RUN]
    program = f"import sys; from opendeep_jax.cli.launch import main; main({arguments}); sys.exit('jax' in sys.modules)"
    root = template_directory().parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True)


# ---- what is refused


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--target=slrum"], "Did you mean slurm?"),
        (["--target=slurm"], "--config is missing"),
        (["--target=slurm", *RUN], "--image, --topology are missing"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--modle.vocab_size=8"], "there is no such setting"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--topology=v5p:2x2x1"], "Use --target=gke-tpu or tpu-vm"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--queue=a"], "has no use for it"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--time=soon"], "--time=soon"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--image=a b"], "--image=a b"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--image=a\n#SBATCH --uid=0"], "--image="),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--job_name=-x"], "--job_name=-x"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--shared=/a b"], "--shared=/a b"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--grace_seconds=0"], "--grace_seconds=0"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--grace_seconds=99999"], "from 1 to 9999"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--restarts=-1"], "--restarts=-1"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--restarts=99999999999999999999"], "from 0 to"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--workdir=runs/a"], "--workdir=runs/a: every machine"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--workdir=/shared/../a"], "--workdir=/shared/../a"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--workdir=/sharedelsewhere"], "--workdir=/sharedelsewhere"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--data.directory=runs/data"], "--data.directory=runs/data"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--name=a\nb"], "must be one line"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--processes=2"], "for --target=local"),
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--parallel.fsdp=3"], "does not fit the 16 devices of h100:2x8"),
        (["--target=gke-gpu", *NEEDS["gke-gpu"], *RUN, "--topology=h100:2x8"], "Chips there: h200, b200"),
        (["--target=gke-gpu", *NEEDS["gke-gpu"], *RUN, "--spot=perhaps"], "true or false"),
        (["--target=tpu-vm", *NEEDS["tpu-vm"], *RUN, "--topology=v7x:2x2x1"], "Chips there: v5e, v5p, v6e"),
        (["--target=tpu-vm", *NEEDS["tpu-vm"], *RUN, "--nfs=here"], "host:/export"),
        (["--target=local", *RUN, "--image=a"], "--image: is for clusters"),
        (["--target=local", *RUN, "--processes=-1"], "at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_paragraph(argv, words):
    with pytest.raises(ConfigError) as error:
        main(argv)
    assert words in str(error.value)
    assert "\n\n" not in str(error.value)


def test_a_recipe_file_must_be_where_the_machines_see_it(tmp_path):
    recipe = tmp_path / "mine.py"
    shutil.copy(template_directory().parent / "configs/quickstart.py", recipe)
    argv = ["--target=slurm", "--dry_run", *NEEDS["slurm"], *RUN[1:]]
    for given in ([f"--config={recipe}"], ["--config", str(recipe)]):
        with pytest.raises(ConfigError, match="--config=.*every machine of the job has to see it"):
            main([*argv, *given])
    inside = ["--shared=" + str(tmp_path), f"--workdir={tmp_path}/a", f"--data.directory={tmp_path}/d"]
    assert main([*argv, f"--config={recipe}", *inside]) == 0


def test_an_engine_that_is_not_there_is_told_before_anything_is_sent(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for target in TARGETS:
        with pytest.raises(ConfigError, match="is not installed here.*--dry_run"):
            main([f"--target={target}", *NEEDS[target], *RUN])


def test_settings_of_a_cluster_can_be_kept_in_a_variable(monkeypatch, capsys):
    monkeypatch.setenv("OPENDEEP_LAUNCH", shlex.join(NEEDS["slurm"]))
    assert main(["--target=slurm", "--dry_run", *RUN]) == 0
    assert capsys.readouterr().out == rendered("slurm")
    monkeypatch.setenv("OPENDEEP_LAUNCH", "--image='a")
    with pytest.raises(ConfigError, match="OPENDEEP_LAUNCH=--image='a: cannot be read"):
        main(["--target=slurm", "--dry_run", *RUN])


@pytest.mark.parametrize("target, engine", [("slurm", "sbatch"), ("gke-gpu", "kubectl"), ("skypilot", "sky")])
def test_the_file_is_handed_to_the_engine_whose_status_counts(target, engine, tmp_path, monkeypatch):
    environment = programs(tmp_path, **{engine: f'cat "${{@: -1}}" >{tmp_path}/got; exit 7'})
    monkeypatch.setenv("PATH", environment["PATH"])
    assert main([f"--target={target}", *NEEDS[target], *RUN]) == 7
    assert (tmp_path / "got").read_text() == rendered(target)


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in (*SETTINGS, *TARGETS, "dry_run", "processes", "restarts", "topology"):
        assert name in text


# ---- commands arrive as they were given


def arguments_at_the_end(environment: dict[str, str], text: str, directory: Path, end: str) -> list[str]:
    """The arguments that `opendeep train` gets when the file is executed; `end` is what executes its command."""
    done = bash(text, environment, directory)
    assert not (directory / "gone").exists(), f"{end}: {done.stderr}"
    return json.loads((directory / "arguments.json").read_text())


SHOW_PROGRAM = "import json, sys; json.dump(sys.argv[1:], open('arguments.json', 'w'))"
SHOW = shlex.join(["exec", sys.executable, "-c", SHOW_PROGRAM])


@pytest.mark.parametrize("target", ["slurm", "skypilot", "tpu-vm", "local"])
def test_a_hostile_setting_reaches_the_run_unchanged_through_a_shell(target, tmp_path):
    setting = f"--name={HOSTILE}"
    program = {"slurm": "srun", "tpu-vm": "docker"}.get(target, "opendeep")
    environment = programs(tmp_path, **{program: SHOW + ' "$@"'}, mountpoint="exit 0", mkdir="exit 0")
    if target == "local":
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(["--dry_run", *RUN, setting])
        text = out.getvalue()
    else:
        text = rendered(target, setting)
    if target == "skypilot":
        text = read_yaml(text)["run"]
    if target == "tpu-vm":
        text = startup_script(text, tmp_path)
    assert arguments_at_the_end(environment, text, tmp_path, program)[-1] == setting


@pytest.mark.parametrize("target", ["slurm", "skypilot", "tpu-vm"])
def test_a_work_directory_with_a_space_is_one_word_of_the_file(target):
    text = rendered(target, "--workdir=/shared/runs/a b")
    places = re.findall(r".?/shared/runs/a b.?", text)
    assert places and all(place[0] == "'" or place[0] == "=" for place in places), text


def test_a_hostile_setting_reaches_the_run_unchanged_through_kubernetes():
    setting = f"--name={HOSTILE}"
    for target, field in (("gke-tpu", "command"), ("gke-gpu", "args")):
        words = container(read_yaml(rendered(target, setting)))[field]
        assert words[:2] == ["opendeep", "train"]
        assert words[-1] == setting.replace("$", "$$")  # Kubernetes reads $$ as $, and $(NAME) as a variable


# ---- the script for several processes here


@pytest.mark.parametrize("rounds, final, starts", [([0], 0, 1), ([75, 0], 0, 2), ([75, 75, 75], 75, 3), ([3], 3, 1)])
def test_the_local_script_starts_all_again_together(rounds, final, starts, tmp_path, capsys):
    assert main(["--target=local", "--dry_run", "--processes=2", "--restarts=2", *RUN]) == 0
    # Process 1 always ends well; process 0 as it is told for its n-th start.
    body = f"""[ $OPENDEEP_PROCESS_ID = 1 ] && exit 0
echo $OPENDEEP_COORDINATOR_ADDRESS >>{tmp_path}/starts
all=({" ".join(map(str, rounds))}); exit "${{all[$(wc -l <{tmp_path}/starts) - 1]}}" """
    done = bash(capsys.readouterr().out, programs(tmp_path, opendeep=body), tmp_path)
    assert done.returncode == final, done.stderr
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    assert len((tmp_path / "opendeep.log").read_text().splitlines()) == 2 * starts


def test_the_local_script_does_not_start_again_what_one_process_says_is_final(tmp_path, capsys):
    """The others lose that one, and end with 75."""
    assert main(["--target=local", "--dry_run", "--processes=2", *RUN]) == 0
    body = "[ $OPENDEEP_PROCESS_ID = 0 ] && exit 2; exit 75"
    done = bash(capsys.readouterr().out, programs(tmp_path, opendeep=body), tmp_path)
    assert done.returncode == 2 and len((tmp_path / "opendeep.log").read_text().splitlines()) == 2


# ---- docs/launch.md

PAGE = (template_directory().parent / "docs/launch.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ opendeep launch (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command, capsys):
    assert main([*shlex.split(command.removesuffix(" --dry_run")), "--dry_run"]) == 0
    assert "opendeep" in capsys.readouterr().out


def test_the_page_names_every_target_and_template():
    assert len(COMMANDS) == 5
    assert all(f"`{target}`" in PAGE and f"../launch/{TARGETS[target].template}" in PAGE for target in TARGETS)
    assert {file.name for file in template_directory().iterdir()} == set(re.findall(r"\.\./launch/([\w.]+)", PAGE))
