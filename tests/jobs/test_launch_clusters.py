"""Each cluster's file is what its engine reads, and does what it says when something ends."""

import copy
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rendered_jobs import BOTH, MORE, bash, container, programs, read_yaml, rendered, startup_script

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


# ---- Kubernetes


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


@pytest.mark.parametrize("word", ["null", "true", "yes", "on", "n"])
def test_a_word_that_yaml_reads_as_something_else_stays_a_name(word):
    for target in ("gke-tpu", "gke-gpu", "skypilot"):
        text = rendered(
            target, f"--job_name={word}", "--volume=null", *([] if target == "skypilot" else ["--queue=1e3"])
        )
        read = read_yaml(text)
        assert (read if target == "skypilot" else read["metadata"])["name"] == word
        assert target == "skypilot" or not schema_problems(read)


# ---- Cloud TPU VMs


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


def test_a_tpu_machine_that_cannot_mount_is_given_back(tmp_path):
    environment = programs(tmp_path, docker="exit 0", mountpoint="exit 1", mount="exit 32", mkdir="exit 0")
    bash(startup_script(rendered("tpu-vm"), tmp_path), environment, tmp_path)
    assert (tmp_path / "status").read_text().strip() == "2" and not (tmp_path / "docker.log").exists()


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
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 0}
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
