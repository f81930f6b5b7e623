"""Every file that `opendeep launch` writes is what its engine reads, and does what it says when something ends."""

import contextlib
import copy
import importlib.util
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

from opendeep_jax.cli.launch import SETTINGS, main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.jobs.launch import TARGETS, fill, job_name, template_directory

RUN = ["--config=quickstart", "--workdir=/shared/runs/a", "--data.directory=/shared/data", "--train.batch_size=512"]
NEEDS = {
    "slurm": ["--topology=h100:2x8", "--image=images.example/opendeep:1"],
    "gke-tpu": ["--topology=v5p:2x4x4", "--image=images.example/opendeep:1", "--volume=shared"],
    "gke-gpu": ["--topology=h200:4x8", "--image=images.example/opendeep:1", "--volume=shared"],
    "tpu-vm": [
        "--topology=v6e:4x4",
        "--image=images.example/opendeep:1",
        "--project=p1",
        "--zone=us-east5-b",
        "--nfs=10.0.0.2:/share",
    ],
    "skypilot": ["--topology=h100:2x8", "--image=images.example/opendeep:1", "--volume=shared"],
}
MORE = {
    "slurm": ["--time=7-00:00:00", "--account=lab", "--partition=gpu"],
    "gke-tpu": ["--topology=2*v6e:16x16", "--queue=team", "--namespace=research", "--spot=true"],
    "gke-gpu": ["--topology=b200:1x8", "--queue=team", "--spot=true", "--namespace=2024"],
    "tpu-vm": ["--topology=2*v5p:2x2x2", "--spot=true"],
    "skypilot": ["--topology=b200:1x8", "--spot=true"],
}
BOTH = [(target, more) for target in TARGETS for more in ([], MORE[target])]
HOSTILE = """it's "$(touch gone)" `touch gone` $HOME \\ {{name}} é"""


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    monkeypatch.delenv("OPENDEEP_LAUNCH", raising=False)


def rendered(target: str, *more: str) -> str:
    """What `--dry_run` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([f"--target={target}", "--dry_run", *NEEDS[target], *RUN, *more]) == 0
    return out.getvalue()


def read_yaml(text: str):
    return pytest.importorskip("yaml").safe_load(text)


def programs(directory: Path, **bodies: str) -> dict[str, str]:
    """An environment in which commands of these names are these bash scripts; each logs its arguments to NAME.log."""
    directory.mkdir(exist_ok=True)
    for name, body in bodies.items():
        path = directory / name
        log = shlex.quote(str(directory / f"{name}.log"))
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{log}\n{body}\n')
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}


def bash(text: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", text], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


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
        ("/shared/runs/learning_rate=3e-4,seed=1", "opendeep-learning-rate-3e-4-seed-1"),
        ("/shared/" + "x" * 80, "opendeep-" + "x" * 31),
        ("/shared/ÄÖ", "opendeep"),
        ("/shared/runs/" + "ab-" * 30, "opendeep-ab-ab-ab-ab-ab-ab-ab-ab-ab-ab-a"),
    ],
)
def test_a_job_has_a_name_that_every_engine_takes(workdir, name):
    assert job_name(workdir) == name
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40


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
        (["--target=slurm", *NEEDS["slurm"], *RUN, "--restarts=-1"], "--restarts=-1"),
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


# ---- Slurm


def slurm_options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("more", [[], MORE["slurm"]])
def test_slurm_knows_every_option(more):
    package = pytest.importorskip("simple_slurm")  # which brings the list of sbatch's options
    listed = Path(package.__file__).with_name("arguments.txt").read_text().split()
    known = {"--" + name.split(",")[0].replace("_", "-") for name in listed}
    options = slurm_options(rendered("slurm", *more))
    assert len(options) >= 10
    assert [option for option in options if option.partition("=")[0] not in known] == []


def test_sbatch_itself_reads_the_file(tmp_path):
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch is not installed")
    lines = ["ClusterName=a", "SlurmctldHost=localhost", "AuthType=auth/none", "CredType=cred/none"]
    (tmp_path / "slurm.conf").write_text(
        "\n".join([*lines, "GresTypes=gpu", "NodeName=localhost Gres=gpu:8", "PartitionName=a Nodes=ALL"]) + "\n"
    )
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}

    def refused(text: str) -> str:
        """What sbatch says of options; it reads them before it looks for a controller, which there isn't."""
        command = ["timeout", "2", "sbatch", "--test-only"]
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
        said = done.stderr.splitlines()
        return "\n".join(line for line in said if re.search("option|nvalid|argument|signal", line))

    for more in ([], MORE["slurm"]):
        assert refused(rendered("slurm", *more)) == ""
    assert "unrecognized option" in refused(rendered("slurm").replace("--requeue", "--requeued"))
    assert refused(rendered("slurm").replace("--signal=TERM@300", "--signal=TREM@300")) != ""


@pytest.mark.parametrize(
    "image, written",
    [
        ("images.example/team/opendeep:1", "images.example#team/opendeep:1"),
        ("localhost:5000/opendeep", "localhost:5000#opendeep"),
        ("images.example#opendeep", "images.example#opendeep"),
        ("team/opendeep:1.2", "team/opendeep:1.2"),
        ("/shared/images/opendeep-1.2.sqsh", "/shared/images/opendeep-1.2.sqsh"),
        ("./opendeep.sqsh", "./opendeep.sqsh"),
    ],
)
def test_pyxis_is_told_which_part_of_an_image_is_its_registry(image, written):
    assert f"--container-image={written} " in rendered("slurm", f"--image={image}")


@pytest.mark.parametrize(
    "status, restarted, requeued, ends",
    [
        (0, "0", False, 0),
        (2, "0", False, 2),
        (3, "0", False, 3),
        (130, "0", False, 130),
        (75, "", True, 0),
        (75, "99", True, 0),
        (75, "100", False, 75),
        (137, "5", True, 0),
        (1, "0", True, 0),
    ],
)
def test_slurm_queues_again_what_that_can_help(status, restarted, requeued, ends, tmp_path):
    environment = programs(tmp_path, srun=f"exit {status}", scontrol="exit 0")
    environment |= {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": restarted}
    done = bash(rendered("slurm"), environment, tmp_path)
    assert done.returncode == ends, done.stderr
    assert ((tmp_path / "scontrol.log").exists()) == requeued
    if requeued:
        assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"


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


def test_a_hostile_setting_reaches_the_run_unchanged_through_kubernetes():
    setting = f"--name={HOSTILE}"
    for target, field in (("gke-tpu", "command"), ("gke-gpu", "args")):
        words = container(read_yaml(rendered(target, setting)))[field]
        assert words[:2] == ["opendeep", "train"]
        assert words[-1] == setting.replace("$", "$$")  # Kubernetes reads $$ as $, and $(NAME) as a variable


# ---- Kubernetes


def container(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    (only,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return only


def schema_problems(jobset: dict) -> list[str]:
    """What JobSet's and Kubernetes' own OpenAPI models, generated into a package, find wrong with a document."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    try:
        read = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset)).to_dict()
    except ValueError as error:
        return [str(error)]
    # A field that the models do not know is dropped, one that is missing has another value.
    return [] if read == jobset else [f"fields are unknown or missing: {read} != {jobset}"]


@pytest.mark.parametrize("target, more", [one for one in BOTH if one[0].startswith("gke")])
def test_a_jobset_is_valid_by_the_schemas_of_jobset_and_kubernetes(target, more):
    jobset = read_yaml(rendered(target, *more))
    assert schema_problems(jobset) == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(failurePolicie=spec.pop("failurePolicy")),
        lambda spec: spec["failurePolicy"].update(maxRestarts="many"),
        lambda spec: spec["failurePolicy"]["rules"][0].pop("action"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(backofLimit=0),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(hostNetwok=True),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].pop("name"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].update(
            command="opendeep"
        ),
    ],
)
def test_the_schemas_see_a_wrong_field(change):
    jobset = read_yaml(rendered("gke-tpu"))
    change(jobset["spec"])
    assert schema_problems(jobset)


@pytest.mark.parametrize("target, more", [one for one in BOTH if one[0].startswith("gke")])
def test_a_jobset_keeps_the_rules_that_its_controller_adds_to_the_schema(target, more):
    jobset = read_yaml(rendered(target, *more))
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    (exit_codes,) = [rule["onExitCodes"] for rule in job["template"]["spec"]["podFailurePolicy"]["rules"]]
    assert exit_codes["containerName"] == container(jobset)["name"]
    assert exit_codes["values"] == [2, 3]  # 75 and all others start the set again
    pods = f"{jobset['metadata']['name']}-{job['name']}-{job['replicas'] - 1}-{job['template']['spec']['completions']}"
    assert len(f"{pods}-abcde") <= 63
    mounted = {mount["name"] for mount in container(jobset)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    labels = {**jobset["metadata"]["labels"], **pod["nodeSelector"]}
    assert all(isinstance(value, str) for value in labels.values())
    assert isinstance(jobset["metadata"]["namespace"], str)


@pytest.mark.parametrize(
    "topology, replicas, hosts, chips, accelerator, shape",
    [
        ("v5p:4x4x4", 1, 16, 4, "tpu-v5p-slice", "4x4x4"),
        ("v5p:2x2x1", 1, 1, 4, "tpu-v5p-slice", "2x2x1"),
        ("v6e:4x4", 1, 4, 4, "tpu-v6e-slice", "4x4"),
        ("v5e:2x4", 1, 1, 8, "tpu-v5-lite-podslice", "2x4"),
        ("2*v6e:16x16", 2, 64, 4, "tpu-v6e-slice", "16x16"),
        ("v7x:4x4x4", 1, 16, 4, "tpu7x", "4x4x4"),
    ],
)
def test_a_slice_has_the_hosts_that_google_gives_it(topology, replicas, hosts, chips, accelerator, shape):
    (job,) = (jobset := read_yaml(rendered("gke-tpu", f"--topology={topology}")))["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (replicas, hosts, hosts)
    assert container(jobset)["resources"]["limits"] == {"google.com/tpu": str(chips)}
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == shape


def test_pods_of_a_gpu_jobset_are_told_their_place_as_the_run_reads_it():
    cluster = pytest.importorskip("opendeep_jax.parallel.cluster")
    jobset = read_yaml(rendered("gke-gpu"))
    environment = {entry["name"]: entry["value"] for entry in container(jobset)["env"]}
    found = cluster.find_cluster({**environment, "JOB_COMPLETION_INDEX": "3"})
    assert (found.num_processes, found.process_id) == (4, 3)
    assert found.coordinator_address.startswith("opendeep-a-train-0-0.opendeep-a:")


# ---- Cloud TPU VMs


def startup_script(text: str, directory: Path) -> str:
    """The part that each machine executes, its status file put into `directory`."""
    (script,) = re.findall(r"<<'END_OF_STARTUP'\n(.*?)^END_OF_STARTUP$", text, flags=re.DOTALL | re.MULTILINE)
    return script.replace("/var/tmp/opendeep.status", str(directory / "status"))


@pytest.mark.parametrize("target", ["slurm", "tpu-vm"])
def test_a_script_is_bash(target):
    for more in ([], MORE[target]):
        subprocess.run(["bash", "-n"], input=rendered(target, *more), text=True, check=True)


@pytest.mark.parametrize("statuses, final", [([0], "0"), ([75, 75, 0], "0"), ([137, 3], "3"), ([75, 75, 75], "75")])
def test_a_tpu_machine_starts_the_run_until_its_end(statuses, final, tmp_path):
    numbers = " ".join(map(str, statuses))
    body = f'all=({numbers}); n=$(wc -l <{tmp_path}/docker.log); exit "${{all[n - 1]}}"'
    environment = programs(tmp_path, docker=body, mountpoint="exit 0", mkdir="exit 0", sleep="exit 0")
    done = bash(startup_script(rendered("tpu-vm", "--restarts=2"), tmp_path), environment, tmp_path)
    assert (tmp_path / "status").read_text().strip() == final, done.stderr
    assert len((tmp_path / "docker.log").read_text().splitlines()) == len(statuses)


def test_tpu_machines_are_asked_for_again_when_taken_away_and_given_back_at_the_end(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "", "ACTIVE"]
    gcloud = f"""
cd {tmp_path}
case "$*" in
  *describe*) all=({" ".join(shlex.quote(state) for state in states)})
    n=$(grep -c describe gcloud.log); echo "${{all[n - 1]}}" ;;
  *ssh*) [ "$(grep -c describe gcloud.log)" = {len(states)} ] && echo 3 ;;
  *create*) cp "$(sed 's/.*startup-script=//' <<<"$*")" startup ;;
esac"""
    environment = programs(tmp_path, gcloud=gcloud) | {"POLL_SECONDS": "0"}
    done = bash(rendered("tpu-vm"), environment, tmp_path)
    assert done.returncode == 3, done.stderr
    log = (tmp_path / "gcloud.log").read_text().splitlines()
    verbs = [re.search("describe|create|delete|ssh", line)[0] for line in log]
    asked = ["describe", "create", "describe", "describe", "ssh", "describe", "delete", "describe", "create"]
    assert verbs == [*asked, "describe", "ssh", "delete"]
    assert "docker run" in (tmp_path / "startup").read_text()
    (create, _) = (line for line in log if " create " in line)
    assert "--accelerator-type=v6e-16" in create and "--node-id=opendeep-a" in create and "--spot" not in create


@pytest.mark.parametrize(
    "topology, words",
    [
        ("v5e:4x4", "v5litepod-16 v2-alpha-tpuv5-lite"),
        ("v5p:4x4x4", "v5p-128 v2-alpha-tpuv5"),
        ("v6e:16x16", "v6e-256 v2-alpha-tpuv6e"),
    ],
)
def test_tpu_machines_are_called_what_google_calls_them(topology, words):
    text = rendered("tpu-vm", f"--topology={topology}")
    kind, runtime = words.split()
    assert f"--accelerator-type={kind} " in text and f"--runtime-version={runtime} " in text


def test_gcloud_itself_reads_its_commands(tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    real = shutil.which("gcloud")
    environment = programs(tmp_path, gcloud='[[ "$*" = *describe* ]] || exit 1')
    environment |= {"CLOUDSDK_CONFIG": str(tmp_path / "config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    bash(rendered("tpu-vm", *MORE["tpu-vm"]), environment, tmp_path)
    (create,) = [line for line in (tmp_path / "gcloud.log").read_text().splitlines() if " create " in line]
    words = [word for word in shlex.split(create) if not word.startswith("--metadata-from-file")]

    def said(*words: str) -> str:
        return subprocess.run([real, *words], env=environment, capture_output=True, text=True, timeout=60).stderr

    # It reads the arguments before it finds that nobody is logged in.
    assert re.fullmatch(r".*account.*", first := said(*words), flags=re.DOTALL) and "unrecognized" not in first
    assert "unrecognized arguments" in said(*words, "--sport")


# ---- SkyPilot


def test_a_skypilot_task_has_only_fields_that_there_are():
    task = read_yaml(rendered("skypilot"))
    assert set(task) <= {"name", "num_nodes", "resources", "volumes", "envs", "run"}
    assert set(task["resources"]) == {"accelerators", "image_id", "use_spot", "network_tier", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 3}
    assert task["resources"]["accelerators"] == "H100:8" and task["num_nodes"] == 2
    assert task["volumes"] == {"/shared": "shared"}
    assert all(isinstance(value, str) for value in task["envs"].values())


def test_a_skypilot_task_is_valid_by_skypilots_schema(tmp_path):
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed")
    program = """
import sys, yaml
from sky import Task
from sky.utils import schemas
from sky.utils.common_utils import validate_schema
for text in sys.stdin.read().split("=====")[:-1]:
    task = yaml.safe_load(text)
    validate_schema(task, schemas.get_task_schema(), "task: ")
    resources = dict(task["resources"])
    validate_schema(resources, schemas.get_resources_schema(), "resources: ")
"""
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [sys.executable, "-c", program]

    def status(*texts: str) -> int:
        given = "".join(f"{text}=====" for text in texts)
        return subprocess.run(command, input=given, env=environment, capture_output=True, text=True).returncode

    texts = [rendered("skypilot", *more) for more in ([], MORE["skypilot"])]
    assert status(*texts) == 0
    assert status(texts[0].replace("num_nodes:", "number_of_nodes:")) != 0


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
