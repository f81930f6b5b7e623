"""What a job's machines can't see is refused when the job is written, and what they need reaches them."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rendered_jobs import NEEDS, RUN, bash, container, programs, read_yaml, rendered, startup_script

from opendeep_jax.cli.launch import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe, save_run_config
from opendeep_jax.config.paths import PATHS, paths
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.jobs.launch.paths import check_paths
from opendeep_jax.jobs.launch.render import TARGETS, template_directory

NO_PATHS = {
    *("name", "data.sources.name", "data.sources.license", "data.sources.citation", "data.phases.name"),
    *("data.sources.text_field", "data.sources.id_field", "data.sources.url_field", "data.sources.license_field"),
    *("data.sources.text_url", "data.sources.keep", "data.curation.languages"),
    *("data.sources.encoding", "data.sources.separator"),
    *("train.sample_prompts", "train.compiler_options", "faults.drill", "tracking.project"),
}
"""Text fields that name no file, beside all of the model's. `text_url` is an address."""


def text_fields(kind, name: str = ""):
    """Dotted names of all fields of a dataclass that hold free text, or tuples of it."""
    for field in dataclasses.fields(kind):
        dotted = f"{name}.{field.name}".lstrip(".")
        element = getattr(field.type, "__args__", (field.type,))[0]
        if field.type in (str, tuple[str, ...]):
            yield dotted
        elif dataclasses.is_dataclass(element):
            yield from text_fields(element, dotted)


def test_every_text_field_of_the_schema_is_known_as_a_path_or_as_none():
    found = {name for name in text_fields(RunConfig) if not name.startswith("model.")}
    assert found - NO_PATHS == set(PATHS)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("data.sources.0.path", "corpus/**/*.jsonl"),
        ("data.sources.0.path", "/home/me/corpus"),
        ("data.sources.0.path", "~/corpus"),
        ("data.sources.0.path", "/shared/../corpus"),
        ("data.tokenizer", "corpus/tokenizer.json"),
        ("data.curation.language_model", "lid.176.bin"),
        ("data.curation.evaluation_sets", "gsm8k.jsonl"),
        ("data.directory", "runs/data"),
        ("train.compilation_cache", "/tmp/cache"),
        ("checkpoint.local_directory", "scratch"),
    ],
)
def test_a_path_that_the_machines_do_not_see_is_refused(flag, value):
    for target in TARGETS:
        with pytest.raises(ConfigError, match=f"--{re.escape(flag)}(.0)?={re.escape(value)}: "):
            rendered(target, f"--{flag}={value}")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("data.sources.0.path", "hf://datasets/a/b/*.parquet"),
        ("data.sources.0.path", "gs://bucket/a"),
        ("data.sources.0.path", "datasets:wikitext?split=train"),
        ("data.sources.0.path", "/shared/corpus/**/*.jsonl"),
        ("data.tokenizer", "bytes"),
        ("data.tokenizer", "/shared/tokenizer.json"),
        ("train.compilation_cache", ""),
        ("train.compilation_cache", "/shared/cache"),
    ],
)
def test_what_the_machines_can_read_is_taken(flag, value):
    assert f"--{flag}={value}" in rendered("gke-tpu", f"--{flag}={value}")


def test_several_paths_are_refused_at_once():
    with pytest.raises(ConfigError) as error:
        rendered("slurm", "--data.sources.0.path=a", "--data.tokenizer=b.json")
    assert len(str(error.value).splitlines()) == 2


def test_the_compilation_cache_does_not_go_with_the_container():
    for target in TARGETS:
        assert "--train.compilation_cache=/shared/runs/xla_cache" in rendered(target)


def check(shared: Path, *command: str, **data) -> list[str]:
    config = RunConfig()
    source = dataclasses.replace(config.data.sources[0], **data)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=(source,), directory=f"{shared}/data")
    )
    return check_paths(config, ("opendeep", "train", *command), f"{shared}/run", str(shared))


@pytest.mark.parametrize(
    "given", ["--from=runs/a@100", "--from=/home/me/run", "--config=mine.py", "--config=/a/mine.py:7b"]
)
def test_a_run_or_recipe_that_a_command_names_must_be_seen_too(given, tmp_path):
    with pytest.raises(ConfigError, match="every machine of the job has to see it"):
        check(tmp_path, given)
    with pytest.raises(ConfigError, match="every machine of the job has to see it"):
        check(tmp_path, *given.split("=", 1))


def test_where_the_shared_directory_is_here_what_is_read_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="there is nothing at that place"):
        check(tmp_path, path=f"{tmp_path}/corpus/*.jsonl")
    with pytest.raises(ConfigError, match="there is nothing at that place"):
        check(tmp_path, f"--from={tmp_path}/trunk@100")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.jsonl").write_text("{}")
    for name in ("trunk", "trunk@1"):
        (tmp_path / name).mkdir()
        assert check(tmp_path, f"--from={tmp_path}/{name}@100", path=f"{tmp_path}/corpus/*.jsonl")
        assert check(tmp_path, f"--from={tmp_path}/{name}", path=f"{tmp_path}/corpus/*.jsonl")


def test_a_checkpoint_to_branch_from_that_is_not_there_is_said_before_a_job_waits_for_it(tmp_path):
    config = load_recipe("quickstart")
    (tmp_path / "trunk" / "checkpoints" / "4").mkdir(parents=True)
    save_run_config(config, config, tmp_path / "trunk")
    command = ["--target=slurm", f"--from={tmp_path}/trunk@5", f"--workdir={tmp_path}/branch", "--image=a:1"]
    command += [f"--shared={tmp_path}", f"--data.directory={tmp_path}/data", "--topology=h100:2x8", "--dry_run"]
    with pytest.raises(ConfigError, match="has no checkpoint of step 5; there are: 4"):
        main([*command, "--parallel.fsdp=-1"])


def test_a_link_that_leads_out_of_the_shared_directory_is_seen(tmp_path):
    shared, home = tmp_path / "shared", tmp_path / "home"
    shared.mkdir()
    home.mkdir()
    (shared / "corpus").symlink_to(home)
    with pytest.raises(ConfigError, match="leads out of .* by a link"):
        check(shared, path=f"{shared}/corpus")


def test_addresses_and_words_are_no_paths():
    assert [name for name, *_ in paths(RunConfig())] == ["data.directory", "train.compilation_cache"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_machines_own_checkpoint_directory_reaches_the_container(target, tmp_path):
    if target == "skypilot":  # where the container is the machine
        return
    text = rendered(target, "--checkpoint.local_directory=/mnt/fast", "--checkpoint.local_every=10")
    if target.startswith("gke"):
        (job,) = (jobset := read_yaml(text))["spec"]["replicatedJobs"]
        (volume,) = [v for v in job["template"]["spec"]["template"]["spec"]["volumes"] if v["name"] == "local"]
        assert volume["hostPath"]["path"] == "/mnt/fast"
        assert {"name": "local", "mountPath": "/mnt/fast"} in container(jobset)["volumeMounts"]
    else:
        assert "/mnt/fast:/mnt/fast" in text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


# ---- environment variables and options of sbatch


def test_variables_reach_the_container_of_slurm_before_the_images_own_and_keys_are_in_no_file(tmp_path):
    text = rendered("slurm", "--env", "WANDB_PROJECT=it's $HOME", "MY_TOKEN", "--env=OTHER")
    environment = programs(tmp_path, srun='printf "%s|" "$@" "$WANDB_PROJECT"') | {"SLURM_JOB_ID": "7"}
    said = bash(text, environment, tmp_path)
    assert said.returncode != 0 and "MY_TOKEN: export it where sbatch is typed" in said.stderr
    secret = {"MY_TOKEN": "s3cret", "OTHER": "x", "HF_TOKEN": "hf_s3cret", "NCCL_SOCKET_IFNAME": "ib0"}
    done = bash(text, environment | secret, tmp_path)
    assert done.returncode == 0, done.stderr
    (option,) = re.findall(r"--container-env=([^|]*)", done.stdout)
    wanted = "WANDB_PROJECT MY_TOKEN OTHER HF_TOKEN NCCL_DEBUG NCCL_SOCKET_IFNAME XLA_FLAGS OPENDEEP_JOB"
    assert set(wanted.split()) <= set(option.split(","))
    assert "it's $HOME" in done.stdout and "s3cret" not in text


@pytest.mark.parametrize("target", ["gke-tpu", "gke-gpu"])
def test_variables_reach_pods(target):
    pod = container(read_yaml(rendered(target, '--env=A=$(B) "c"', "--env=WANDB_API_KEY", "--secret=keys")))
    assert {"name": "A", "value": '$$(B) "c"'} in pod["env"]
    assert pod["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_variables_reach_tpu_machines(tmp_path):
    text = rendered("tpu-vm", "--env=A=it's $HOME", "--env=HF_TOKEN", "--secret=/shared/keys.env")
    environment = programs(tmp_path, docker='printf "%s\\n" "$@"', mountpoint="exit 0", mkdir="exit 0")
    said = bash(startup_script(text, tmp_path), environment, tmp_path).stdout.splitlines()
    assert "--env=A=it's $HOME" in said and "--env-file=/shared/keys.env" in said


def test_variables_reach_skypilots_tasks_and_keys_go_by_name(tmp_path, monkeypatch):
    task = read_yaml(rendered("skypilot", "--env=A=b: c", "--env=HF_TOKEN"))
    assert task["envs"]["A"] == "b: c" and task["secrets"] == {"HF_TOKEN": None}
    monkeypatch.setenv("PATH", programs(tmp_path, sky="exit 0")["PATH"])
    assert main(["--target=skypilot", *NEEDS["skypilot"], *RUN, "--env=HF_TOKEN"]) == 0
    assert "--secret HF_TOKEN" in (tmp_path / "sky.log").read_text()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["slurm", "--env=HF_TOKEN=abc"], "--env=HF_TOKEN=…: its value would be written"),
        (["slurm", "--env=A B=c"], "must be NAME or NAME=value"),
        (["gke-tpu", "--env=HF_TOKEN"], "by --secret"),
        (["tpu-vm", "--env=HF_TOKEN", "--secret=/home/keys"], "--secret=/home/keys: must be a file under /shared"),
        (["gke-gpu", "--tracking.trackers=wandb"], "the machines need WANDB_API_KEY"),
        (["slurm", "--sbatch=nodes=4"], "the file has that option already"),
        (["slurm", "--sbatch=qos=high"], "Give --qos"),
        (["slurm", "--sbatch=constraint=a b"], "without spaces"),
        (["gke-gpu", "--sbatch=constraint=a"], "is for --target=slurm"),
        (["slurm", "--topology=h100:2x6"], "a node of h100 has 4 or 8 GPUs"),
        (["slurm", "--topology=gb200:2x8"], "gb200:4x4"),
        (["gke-gpu", "--topology=h200:2x4"], "nodes of eight GPUs"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(argv, words):
    with pytest.raises(ConfigError) as error:
        rendered(argv[0], *argv[1:])
    assert words in str(error.value) and "abc" not in str(error.value)


def test_sbatch_gets_any_other_option():
    text = rendered(
        "slurm", "--qos=high", "--reservation=week", "--sbatch", "constraint=a&b", "mail-type=END", "--sbatch=x11"
    )
    for line in ("--qos=high", "--reservation=week", "--constraint=a&b", "--mail-type=END", "--x11"):
        assert f"\n#SBATCH {line}\n" in text
    assert text.index("#SBATCH --x11") < text.index("\nexport ")


@pytest.mark.parametrize(
    "target, topology, nodes, gpus",
    [
        ("slurm", "a100:2x8", 2, 8),
        ("slurm", "h100:4x4", 4, 4),
        ("slurm", "gb200:18x4", 18, 4),
        ("skypilot", "a100:2x4", 2, 4),
    ],
)
def test_nodes_of_other_sizes_and_chips(target, topology, nodes, gpus):
    text = rendered(target, f"--topology={topology}", "--train.batch_size=144")
    assert (f"--nodes={nodes}\n" if target == "slurm" else f"num_nodes: {nodes}\n") in text
    assert (f"--gpus-per-node={gpus}\n" if target == "slurm" else f"A100-80GB:{gpus}\n") in text


# ---- the image

DOCKERFILE = template_directory() / "Dockerfile"
ROOT = template_directory().parent


def test_the_dockerfile_copies_what_there_is_and_installs_what_the_project_asks_for():
    text = DOCKERFILE.read_text()
    copies = [line.split() for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE)]
    copied = [name for names in copies for name in names[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    # A directory's content is copied, not the directory.
    assert all(names[-1] == f"./{names[0]}" for names in copies if (ROOT / names[0]).is_dir())
    project = (ROOT / "pyproject.toml").read_text()
    (included,) = re.findall(r"only-include = \[(.*)\]", project)
    assert set(re.findall(r'"(.*?)"', included)) <= set(copied)
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(copied)  # which building needs
    (least,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (python,) = re.findall(r"^FROM python:([\d.]+)", text, flags=re.MULTILINE)
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))
    extras = set(re.findall(r"^(\w+) = \[", project, flags=re.MULTILINE))
    (asked,) = re.findall(r"\.\[([\w,]+)\]", text)
    assert set(asked.split(",")) <= extras
    (jax,) = re.findall(r'"jax>=([\d.]+,<[\d.]+)"', project)
    assert f"jax[${{ACCELERATOR}}]>={jax}" in text and re.search(r"^ARG ACCELERATOR=(cuda13|tpu)$", text, re.MULTILINE)


def test_a_linter_finds_nothing_in_the_dockerfile():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_launch_file_travels_in_the_wheel():
    project = (ROOT / "pyproject.toml").read_text()
    assert '"launch" = "opendeep_jax/launch"' in project
