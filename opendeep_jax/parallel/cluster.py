"""Detection of this process's job from its flags or its environment, without JAX.

The first that matches decides: flags, OPENDEEP_* variables (our launcher and templates), Slurm, Open MPI, JobSet,
SkyPilot. TPU pods are left to JAX, which asks their metadata (`distributed.start`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from opendeep_jax.config.checks import ConfigError

PORT = 12_400
"""Port of process 0 when none is given: the first of a range, so that jobs on one host differ."""
PORTS = 4096


@dataclass(frozen=True)
class Cluster:
    """A process's place in its job, for example Cluster("Slurm", "node001:12417", 16, 3, (3,))."""

    found_by: str
    """Source of these values, for messages."""
    coordinator_address: str
    """host:port of process 0."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """Devices of this host that are this process's; None takes all."""


def find_cluster(
    environ: Mapping[str, str], coordinator_address: str = "", num_processes: int = 0, process_id: int = -1
) -> Cluster | None:
    """The job that flags or environment describe; None where they describe none, or one of a single process.

    Raises:
        ConfigError: where they say half of it, or contradict themselves.
    """
    if coordinator_address or num_processes or process_id >= 0:
        given = ("--coordinator_address", "--num_processes", "--process_id")
        cluster = _spelled_out("flags", given, coordinator_address, num_processes, process_id)
        return cluster if cluster.num_processes > 1 else None
    for find in (_opendeep, _slurm, _open_mpi, _job_set, _sky_pilot):
        if (cluster := find(environ)) is not None:
            return cluster if cluster.num_processes > 1 else None
    return None


def _spelled_out(found_by: str, names: tuple[str, str, str], address: str, count: int, index: int) -> Cluster:
    missing = [name for name, there in zip(names, (address, count > 0, index >= 0), strict=True) if not there]
    if missing:
        raise ConfigError(
            f"{found_by}: a job of several processes needs {', '.join(names)}, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Give all three, as in --coordinator_address=node0:12400 "
            "--num_processes=2 --process_id=0, or none."
        )
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ConfigError(f"{found_by}: {names[0]} = {address!r} must be host:port of process 0, such as node0:12400.")
    if index >= count:
        raise ConfigError(f"{found_by}: {names[2]} = {index} must be from 0 to {names[1]} - 1, which is {count - 1}.")
    return Cluster(found_by, address, count, index)


def _opendeep(environ: Mapping[str, str]) -> Cluster | None:
    names = ("OPENDEEP_COORDINATOR_ADDRESS", "OPENDEEP_NUM_PROCESSES", "OPENDEEP_PROCESS_ID")
    if not any(environ.get(name) for name in names):
        return None
    address, count, index = (environ.get(name, "") for name in names)
    return _spelled_out("environment", names, address, _number(names[1], count, 0), _number(names[2], index, -1))


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """One process for each task of the step; with several tasks on a node, each has the device of its local number."""
    if "SLURM_PROCID" not in environ or int(environ.get("SLURM_NTASKS", 1)) < 2:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    port = PORT + int(environ.get("SLURM_JOB_ID", 0)) % PORTS
    on_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    several = int(re.match(r"\d+", on_node)[0]) > 1
    local = (int(environ["SLURM_LOCALID"]),) if several and "SLURM_LOCALID" in environ else None
    count, index = int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"])
    return Cluster("Slurm", f"{first_host(nodes)}:{port}", count, index, local)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: `node[003-007,012],login` gives `node003`."""
    prefix, bracket, rest = nodes.split(",")[0].partition("[")
    return prefix + re.match(r"\d*", rest)[0] if bracket else prefix


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """The coordinator is MASTER_ADDR if it is set, else the host where mpirun was given (Open MPI 4 and 5)."""
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) < 2 or "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    several = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
    local = (int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),) if several else None
    host = environ.get("MASTER_ADDR")
    if not host and (uri := environ.get("OMPI_MCA_orte_hnp_uri")):  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
        host = (re.search(r"tcp://([^,:]+)", uri) or [None, None])[1]
    if not host and (space := environ.get("PMIX_NAMESPACE")):  # prterun-node001-12345@1
        host = (re.match(r"prterun-(.+)-\d+@", space) or [None, None])[1]
    if not host:
        raise ConfigError(
            "Open MPI: nothing says on which host process 0 runs. Set MASTER_ADDR to it: mpirun -x MASTER_ADDR=node0 …"
        )
    port = environ.get("MASTER_PORT", PORT)
    count, index = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
    return Cluster("Open MPI", f"{host}:{port}", count, index, local)


def _job_set(environ: Mapping[str, str]) -> Cluster | None:
    """Pods of a JobSet (launch/gke_*.yaml hand these variables to them). A TPU's own variables come before."""
    if "JOBSET_NAME" not in environ or "JOB_COMPLETION_INDEX" not in environ or "TPU_WORKER_ID" in environ:
        return None
    names = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "PODS_PER_JOB")
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"JobSet: the pod lacks {', '.join(missing)}; `opendeep launch --target=gke-gpu --dry_run` shows how."
        )
    name, pods, jobs = environ["JOBSET_NAME"], int(environ["PODS_PER_JOB"]), int(environ.get("NUM_JOBS", 1))
    index = int(environ.get("JOB_INDEX", 0)) * pods + int(environ["JOB_COMPLETION_INDEX"])
    host = f"{name}-{environ['REPLICATED_JOB_NAME']}-0-0.{name}"
    return Cluster("JobSet", f"{host}:{PORT}", pods * jobs, index)


def _sky_pilot(environ: Mapping[str, str]) -> Cluster | None:
    hosts = environ.get("SKYPILOT_NODE_IPS", "").split()
    if len(hosts) < 2 or "TPU_WORKER_ID" in environ:
        return None
    return Cluster("SkyPilot", f"{hosts[0]}:{PORT}", len(hosts), int(environ["SKYPILOT_NODE_RANK"]))


def _number(name: str, text: str, otherwise: int) -> int:
    try:
        return int(text) if text else otherwise
    except ValueError as error:
        raise ConfigError(f"environment: {name} = {text!r} must be a whole number.") from error
