"""A run as a job of a cluster: the template of its target (launch/), filled in and handed to the engine there.

    opendeep launch --target=slurm --topology=h100:4x8 ...  ->  launch/slurm.sh  ->  sbatch

A template is the file itself with `{{name}}` where a value goes; a line whose value is empty is left out. Everything
is checked before: the run's configuration against the cluster's devices, and every value that goes into a file.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from opendeep_jax.config.checks import ConfigError, check_devices
from opendeep_jax.config.load import did_you_mean, shipped_directory
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.config.synonyms import TARGETS as OTHER_TARGETS
from opendeep_jax.config.synonyms import known_synonym
from opendeep_jax.jobs.launch.environment import check_environment, check_sbatch, environment_values
from opendeep_jax.jobs.launch.hardware import (
    GKE_ACCELERATORS,
    SKYPILOT_ACCELERATORS,
    TPU_VM_TYPES,
    chips_per_host,
)
from opendeep_jax.jobs.launch.paths import check_paths
from opendeep_jax.parallel.chips import CHIPS
from opendeep_jax.plan.topology import Topology, parse_topology

NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
"""A job's name: what Kubernetes, Google Cloud and SkyPilot all take, with room for what they append."""
SAFE = r"[\w@%+=:,./-]+"
"""Characters of a value in a file: nothing that a shell, YAML or Slurm reads as more than itself."""


@dataclass(frozen=True)
class LaunchJob:
    """A run and where it is to go, before it is known to be possible."""

    target: str
    """One of TARGETS."""
    config: RunConfig
    """The run's configuration."""
    command: tuple[str, ...]
    """Command of each process: ("opendeep", "train", "--config=...", "--workdir=...", ...)."""
    workdir: str
    """The run's directory."""
    topology: str = ""
    """Name of the cluster, as `opendeep plan` takes it: v5p:4x4x4, 2*v6e:16x16, h100:4x8."""
    restarts: int = 100
    """Times that the job is started again."""
    settings: tuple[tuple[str, str], ...] = ()
    """The target's own settings that were given, by name; `Target` says which it takes."""
    env: tuple[str, ...] = ()
    """Environment variables of the run, as NAME=value, or NAME for those whose value is to be in no file."""
    sbatch: tuple[str, ...] = ()
    """Options of sbatch, as name=value."""


@dataclass(frozen=True)
class Target:
    """One kind of cluster."""

    template: str
    """File in launch/."""
    platform: str
    """`tpu` or `gpu`."""
    submit: tuple[str, ...]
    """The engine's command, to which the file is appended."""
    needs: tuple[str, ...]
    """Settings that must be given."""
    takes: tuple[str, ...]
    """Settings that may be given."""
    accelerators: dict[str, str] | None = None
    """Names of chips there; None where any will do."""


TARGETS = {
    "slurm": Target("slurm.sh", "gpu", ("sbatch",), ("image",), ("time", "account", "partition", "qos", "reservation")),
    "gke-tpu": Target(
        "gke_tpu.yaml",
        "tpu",
        ("kubectl", "create", "--filename"),
        ("image", "volume"),
        ("namespace", "queue", "spot", "secret"),
        GKE_ACCELERATORS,
    ),
    "gke-gpu": Target(
        "gke_gpu.yaml",
        "gpu",
        ("kubectl", "create", "--filename"),
        ("image", "volume"),
        ("namespace", "queue", "spot", "secret"),
        GKE_ACCELERATORS,
    ),
    "tpu-vm": Target(
        "tpu_vm.sh",
        "tpu",
        ("bash",),
        ("image", "nfs", "project", "zone"),
        ("spot", "secret"),
        {chip: kind for chip, (kind, *_) in TPU_VM_TYPES.items()},
    ),
    "skypilot": Target(
        "skypilot.yaml",
        "gpu",
        ("sky", "jobs", "launch", "--yes", "--detach-run"),
        ("image", "volume"),
        ("spot",),
        SKYPILOT_ACCELERATORS,
    ),
}
"""Every cluster that `opendeep launch` writes jobs for, beside `local`."""
COMMON = ("job_name", "shared", "grace_seconds")
"""Settings that every target takes."""


def template_directory() -> Path:
    """Return the directory of the templates."""
    return shipped_directory("launch", "launch")


def render(job: LaunchJob) -> str:
    """Return the job's file, complete.

    Raises:
        ConfigError: for settings that are missing, unknown to the target or of the wrong form, for a cluster that
            there isn't there, and for a run that does not fit its number of devices.
    """
    target = TARGETS[job.target]
    given = dict(job.settings)
    _check_settings(job, target, given)
    topology = _check_topology(job, target)
    shared = given.get("shared", "/shared")
    settings = {"shared": "/shared", "namespace": "default", "time": "24:00:00", "grace_seconds": "300", **given}
    settings.setdefault("job_name", job_name(job.workdir))
    _check_values(settings)
    if job.sbatch and job.target != "slurm":
        raise ConfigError(f"--sbatch={job.sbatch[0]}: is for --target=slurm. Leave it out.")
    check_sbatch(job.sbatch)
    check_environment(job.target, job.env, settings.get("secret", ""), job.config)
    if job.target == "tpu-vm" and "secret" in settings and not Path(settings["secret"]).is_relative_to(shared):
        raise ConfigError(f"--secret={settings['secret']}: must be a file under {shared}, with lines NAME=value.")
    extra = check_paths(job.config, job.command, job.workdir, shared)
    job = dataclasses.replace(job, command=(*job.command[:2], *extra, *job.command[2:]))
    if broken := [word for word in job.command if not word.isprintable()]:
        raise ConfigError(f"{broken[0]!r}: a setting that goes into a job's file must be one line. Put it in a recipe.")
    values = {
        **{name: settings.get(name, "") for name in (*COMMON, *target.needs, *target.takes)},
        "name": settings["job_name"],
        "restarts": str(job.restarts),
        "workdir": shlex.quote(job.workdir),
        "local": job.config.checkpoint.local_directory,
        "sbatch": "\n".join(f"#SBATCH --{option}" for option in job.sbatch),
        "chip": topology.chip.name.upper() if topology.chip.platform == "gpu" else f"TPU {topology.chip.name}",
        "topology": "x".join(map(str, topology.shape)),
        "accelerator": (target.accelerators or {}).get(topology.chip.name, ""),
        **(_of_slices(topology) if target.platform == "tpu" else _of_nodes(topology)),
        **environment_values(job.target, job.env, settings.get("secret", "")),
        **_of_target(job, target, topology, settings),
    }
    return fill(template_directory().joinpath(target.template).read_text(encoding="utf-8"), values)


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with each `{{name}}` replaced; lines with an empty value are left out."""
    lines = []
    for line in template.splitlines():
        names = re.findall(r"\{\{(\w+)\}\}", line)
        if all(values[name] for name in names):
            lines.append(re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], line))
    return "\n".join(lines) + "\n"


def submit(job: LaunchJob, text: str) -> int:
    """Hand `render`'s text to the target's engine and return its status. Raise ConfigError where it is missing."""
    target = TARGETS[job.target]
    check_engine(job.target)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / target.template
        file.write_text(text, encoding="utf-8")
        secrets = [name for name in job.env if "=" not in name] if job.target == "skypilot" else []
        by_name = [word for name in secrets for word in ("--secret", name)]
        return subprocess.run([*target.submit, *by_name, str(file)]).returncode


def check_target(name: str) -> None:
    """Raise ConfigError for a target that there is not."""
    targets = ["local", *TARGETS]
    if name not in targets:
        elsewhere = known_synonym(name, OTHER_TARGETS)
        hint = f" Did you mean {elsewhere}?" if elsewhere else did_you_mean(name, targets)
        raise ConfigError(f"--target={name}: there is no such target.{hint} Targets: {', '.join(targets)}.")


def check_engine(name: str) -> None:
    """Raise ConfigError where the command that takes jobs for a target is not installed."""
    program = "gcloud" if name == "tpu-vm" else TARGETS[name].submit[0]
    if shutil.which(program) is None:
        raise ConfigError(
            f"--target={name}: {program} is not installed here, and it is what takes the job. Give the command where "
            f"it is, or print the file with --dry_run and take it there."
        )


def job_name(workdir: str) -> str:
    """Return a name for the job of a run, from the end of its directory: `runs/Wide_1` gives `opendeep-wide-1`.

    Where more than that is lost, or cut off, some digits of the end's SHA-256 tell it from others: engines take a job
    of the same name for the same job.
    """
    end = Path(workdir).name
    plain = re.sub(r"[^a-z0-9]+", "-", end.lower()).strip("-")
    if plain == end.lower().replace("_", "-") and len(plain) <= 31:
        return f"opendeep-{plain}"
    return f"opendeep-{plain[:24]}".rstrip("-") + f"-{hashlib.sha256(end.encode()).hexdigest()[:6]}"


def _check_settings(job: LaunchJob, target: Target, given: dict[str, str]) -> None:
    known = (*COMMON, *target.needs, *target.takes)
    if strange := [name for name in given if name not in known]:
        raise ConfigError(
            f"--{strange[0]}={given[strange[0]]}: --target={job.target} has no use for it. Leave it out; it takes "
            f"{', '.join(f'--{name}' for name in known)}."
        )
    missing = [name for name in target.needs if not given.get(name)] + ["topology"] * (not job.topology)
    if missing:
        raise ConfigError(
            f"--target={job.target}: {', '.join(f'--{name}' for name in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. See opendeep launch --help for what to give."
        )


def _check_topology(job: LaunchJob, target: Target) -> Topology:
    topology = parse_topology(job.topology)
    chip = topology.chip
    if chip.platform != target.platform:
        fitting = [name for name, other in TARGETS.items() if other.platform == chip.platform]
        raise ConfigError(
            f"--topology={job.topology}: --target={job.target} is for {target.platform.upper()}s, and {chip.name} is "
            f"none. Use --target={' or '.join(fitting)}."
        )
    if target.accelerators is not None and chip.name not in target.accelerators:
        chips = [name for name in target.accelerators if CHIPS[name].platform == target.platform]
        raise ConfigError(
            f"--topology={job.topology}: --target={job.target} can't have {chip.name}. Chips there: {', '.join(chips)}."
        )
    if job.target == "gke-gpu" and topology.shape != (8,):
        raise ConfigError(f"--topology={job.topology}: --target=gke-gpu has nodes of eight GPUs.")
    try:
        check_devices(job.config, topology.device_count)
    except ConfigError as error:
        found = f"{topology.device_count} devices of {topology.name}"
        raise ConfigError(f"--topology={job.topology}: the run does not fit the {found}. {error}") from error
    return topology


def _check_values(settings: dict[str, str]) -> None:
    forms = {
        "job_name": (NAME, "small letters, digits and -, a letter first, at most 40"),
        "grace_seconds": (r"[1-9]\d{0,3}", "a whole number of seconds from 1 to 9999"),
        "time": (r"(\d+-)?\d+(:\d\d){0,2}|UNLIMITED", "a time as Slurm writes it, such as 24:00:00 or 7-00:00:00"),
        "image": (r"[\w@%+=:,./#-]+", "the name of an image"),
        "spot": ("|true|false", "true or false"),
        "shared": (r"/[\w@%+=./-]*[\w@%+=.-]", "the absolute path of a directory, without spaces"),
        "nfs": (r"[\w.-]+:/[\w./-]*", "host:/export"),
    }
    for name, value in settings.items():
        form, words = forms.get(name, (SAFE, "made of letters, digits and @%+=:,./_-"))
        if not re.fullmatch(form, value, flags=re.ASCII):
            raise ConfigError(f"--{name}={value}: must be {words}.")


def _of_slices(topology: Topology) -> dict[str, str]:
    here = chips_per_host(topology)
    hosts = topology.chips // topology.slices // here
    return {"slices": str(topology.slices), "hosts": str(hosts), "chips_per_host": str(here)}


def _of_nodes(topology: Topology) -> dict[str, str]:
    return {"nodes": str(topology.slices), "gpus": str(topology.chips // topology.slices)}


def _of_target(job: LaunchJob, target: Target, topology: Topology, settings: dict[str, str]) -> dict[str, str]:
    """Return what only this target's template has: the command as its language writes it, and values that follow."""
    name, spot = settings["job_name"], settings.get("spot") == "true"
    shell = shlex.join(job.command)
    if target.template.startswith("gke"):
        # Kubernetes would put a variable's value where it reads $(NAME); $$ is its way to write a $.
        return {"command": json.dumps([word.replace("$", "$$") for word in job.command]), "spot": '"true"' * spot}
    if job.target == "slurm":
        patience = max(int(job.config.faults.peer_seconds), 60) + int(settings["grace_seconds"])
        # Pyxis sets a registry off from the image's path by a #; paths of .sqsh files stay.
        image = re.sub(r"^([^/#]+[.:][^/#]+)/", r"\1#", settings["image"])
        local = job.config.checkpoint.local_directory
        mounts = ",".join(f"{path}:{path}" for path in (settings["shared"], local) if path)
        return {"command": shell, "wait_seconds": str(patience), "image": image, "mounts": mounts}
    if job.target == "skypilot":
        image = "docker:" + settings["image"].removeprefix("docker:")
        return {"command": shell, "use_spot": str(spot).lower(), "errors": str(min(job.restarts, 3)), "image": image}
    several = topology.slices > 1
    kind, runtime, counted = TPU_VM_TYPES[topology.chip.name]
    machines = [f"{name}-{index}" for index in range(topology.slices)] if several else [name]
    asked = repr((job.command, topology.name, job.env, sorted(settings.items()), job.restarts))
    return {
        "command": shell,
        "spot": "--spot" * spot,
        "accelerator": f"{kind}-{counted * topology.chips // topology.slices}",
        "runtime_version": runtime,
        "node_id": "" if several else name,
        "node_count": str(topology.slices) if several else "",
        "node_prefix": name if several else "",
        "machines": " ".join(machines),
        "request": hashlib.sha256(asked.encode()).hexdigest()[:12],
    }
