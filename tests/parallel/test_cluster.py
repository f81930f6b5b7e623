"""A process finds its place in its job, whoever started it."""

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.cluster import PORT, Cluster, find_cluster, first_host

OPENDEEP = {
    "OPENDEEP_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "OPENDEEP_NUM_PROCESSES": "4",
    "OPENDEEP_PROCESS_ID": "2",
}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[007-008],login",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
JOB_SET = {
    "JOBSET_NAME": "v3",
    "REPLICATED_JOB_NAME": "workers",
    "PODS_PER_JOB": "8",
    "NUM_JOBS": "2",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "3",
}


@pytest.mark.parametrize(
    "environ, cluster",
    [
        ({}, None),
        (OPENDEEP, Cluster("environment", "10.0.0.1:1234", 4, 2)),
        (OPENDEEP | SLURM, Cluster("environment", "10.0.0.1:1234", 4, 2)),
        (OPENDEEP | {"OPENDEEP_NUM_PROCESSES": "1", "OPENDEEP_PROCESS_ID": "0"}, None),
        (SLURM, Cluster("Slurm", f"node007:{PORT + 5000 % 4096}", 16, 9, (1,))),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"},
            Cluster("Slurm", f"node007:{PORT + 5000 % 4096}", 16, 9),
        ),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (MPI | {"MASTER_ADDR": "head"}, Cluster("Open MPI", f"head:{PORT}", 2, 1)),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            Cluster("Open MPI", f"10.96.0.1:{PORT}", 2, 1),
        ),
        (
            MPI | {"PMIX_NAMESPACE": "prterun-node-3-1234@1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Cluster("Open MPI", f"node-3:{PORT}", 2, 1, (0,)),
        ),
        (JOB_SET, Cluster("JobSet", f"v3-workers-0-0.v3:{PORT}", 16, 11)),
        (JOB_SET | {"TPU_WORKER_ID": "0"}, None),
        (
            {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": "1"},
            Cluster("SkyPilot", f"10.0.0.4:{PORT}", 2, 1),
        ),
        ({"SKYPILOT_NODE_IPS": "10.0.0.4", "SKYPILOT_NODE_RANK": "0"}, None),
    ],
)
def test_the_environment_of_every_launcher_is_understood(environ, cluster):
    assert find_cluster(environ) == cluster


def test_flags_come_before_any_environment():
    assert find_cluster(SLURM, "a:1", 2, 1) == Cluster("flags", "a:1", 2, 1)
    assert find_cluster(SLURM, "a:1", 1, 0) is None


@pytest.mark.parametrize(
    "environ, flags, message",
    [
        ({}, ("a:1", 0, -1), "--num_processes, --process_id are missing"),
        ({}, ("", 2, 0), "--coordinator_address is missing"),
        ({}, ("nowhere", 2, 0), "'nowhere' must be host:port"),
        ({}, ("a:1", 2, 2), "--process_id = 2 must be from 0 to --num_processes - 1"),
        (OPENDEEP | {"OPENDEEP_PROCESS_ID": "two"}, (), "OPENDEEP_PROCESS_ID = 'two' must be a whole number"),
        ({"OPENDEEP_NUM_PROCESSES": "2"}, (), "OPENDEEP_COORDINATOR_ADDRESS, OPENDEEP_PROCESS_ID are missing"),
        (MPI, (), "mpirun -x MASTER_ADDR"),
        ({"JOBSET_NAME": "v3", "JOB_COMPLETION_INDEX": "0"}, (), "lacks REPLICATED_JOB_NAME, PODS_PER_JOB"),
    ],
)
def test_half_of_a_job_is_refused_with_what_is_missing(environ, flags, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(environ, *flags)


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node001", "node001"),
        ("a,b", "a"),
        ("node[003-007,012],x", "node003"),
        ("n[1,2]", "n1"),
        ("gpu-1-[08-09]", "gpu-1-08"),
    ],
)
def test_the_first_of_slurms_nodes_coordinates(nodes, host):
    assert first_host(nodes) == host
