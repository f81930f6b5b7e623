"""All processes of a job meet before JAX starts: JAX aborts where one comes late, and does not say which.

Process 0 listens at the coordinator's address; each other one connects and tells its number and machine. When all are
there, or the time is up, process 0 answers everyone with one line, and the port is free for JAX. Standard library only.
"""

import contextlib
import errno
import json
import select
import socket
import time

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import Resume
from opendeep_jax.parallel.cluster import Cluster

GREETING = "opendeep roll call"
ATTEMPT_SECONDS = 5.0
"""Time limit of one connection attempt."""
PAUSE_SECONDS = 0.1
"""Between two of them, and so often process 0 looks for newcomers."""
BUSY_SECONDS = 10.0
"""An earlier start of the job may take so long to give up the port."""
LONGEST_LINE = 65_536


def roll_call(cluster: Cluster, seconds: float) -> None:
    """Wait until all processes of the job are present.

    Raises:
        Resume: after so many seconds; who is missing is in the message, in every process that reached process 0.
        ConfigError: where processes were started as parts of different jobs, or process 0 cannot listen.
    """
    end = time.monotonic() + seconds
    if cluster.process_id == 0:
        _call(cluster, seconds, end)
    else:
        _answer(cluster, seconds, end)


def _call(cluster: Cluster, seconds: float, end: float) -> None:
    port = int(cluster.coordinator_address.rpartition(":")[2])
    present: dict[int, socket.socket] = {}
    hosts = {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(cluster, port))
        verdict, wrong = "", False
        while len(hosts) < cluster.num_processes and not verdict:
            left = end - time.monotonic()
            if left <= 0:
                verdict = _missing(cluster, seconds, hosts)
                break
            if not select.select([listener], [], [], min(left, 1.0))[0]:
                continue
            connection = stack.enter_context(listener.accept()[0])
            hello = _hello(connection)
            if hello is None:  # a port scanner, or JAX of a start before this one
                connection.close()
                continue
            process, count, host = hello
            wrong = count != cluster.num_processes or not 0 < process < cluster.num_processes
            if wrong:
                verdict = (
                    f"process {process} on {host} was started as one of {count}, and process 0 on {hosts[0]} as one of "
                    f"{cluster.num_processes}, which has them numbered from 0 to {cluster.num_processes - 1}. Start "
                    "all with the same number of processes."
                )
            present[process], hosts[process] = connection, host
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"wrong": wrong, "verdict": verdict}).encode() + b"\n")
        for connection in present.values():  # whoever closes first keeps the port in TIME_WAIT, and JAX needs it here
            with contextlib.suppress(OSError):
                connection.settimeout(1.0)
                connection.recv(1)
    if verdict:
        raise (ConfigError if wrong else Resume)(verdict)


def _answer(cluster: Cluster, seconds: float, end: float) -> None:
    host, _, port = cluster.coordinator_address.rpartition(":")
    reason = "it did not answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, ATTEMPT_SECONDS)) as wire:
                hello = [GREETING, cluster.process_id, cluster.num_processes, socket.gethostname()]
                wire.sendall(json.dumps(hello).encode() + b"\n")
                # Process 0 may have begun to wait later than this one: its answer, within its own time, is the better.
                wire.settimeout(max(left, 0.1) + seconds)
                line = wire.makefile("rb").readline(LONGEST_LINE)
            answer = json.loads(line)
        except (OSError, ValueError) as error:  # also a name that is not known yet, as of a pod that is starting
            reason = str(error) or reason
            time.sleep(min(PAUSE_SECONDS, max(left, 0)))
            continue
        if answer["verdict"]:
            raise (ConfigError if answer["wrong"] else Resume)(answer["verdict"])
        return
    raise Resume(
        f"process {cluster.process_id} of {cluster.num_processes} ({cluster.found_by}) on {socket.gethostname()} did "
        f"not reach process 0 at {cluster.coordinator_address} within {seconds:g} seconds (faults.join_seconds): "
        f"{reason}. See whether process 0 was started, and whether that address can be reached from here; then start "
        "the same command again"
    )


def _listener(cluster: Cluster, port: int) -> socket.socket:
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < end:
                time.sleep(PAUSE_SECONDS)
                continue
            raise ConfigError(
                f"process 0 of {cluster.num_processes} ({cluster.found_by}) cannot listen at port {port} of "
                f"{socket.gethostname()}, where {cluster.coordinator_address} is expected ({error.strerror}). "
                "Something else listens there, perhaps an earlier start of this job: end it, or give another port."
            ) from error


def _hello(connection: socket.socket) -> tuple[int, int, str] | None:
    """Read a connecting process's index, process count and host; None if it is not of this job."""
    try:
        connection.settimeout(ATTEMPT_SECONDS)
        greeting, process, count, host = json.loads(connection.makefile("rb").readline(1024))
        return (int(process), int(count), str(host)) if greeting == GREETING else None
    except (OSError, ValueError, TypeError):
        return None


def _missing(cluster: Cluster, seconds: float, hosts: dict[int, str]) -> str:
    missing = [process for process in range(cluster.num_processes) if process not in hosts]
    names = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
    came = ", ".join(f"process {process} on {hosts[process]}" for process in sorted(hosts)[:8])
    return (
        f"process{'es' * (len(missing) > 1)} {names} of {cluster.num_processes} ({cluster.found_by}) did not come "
        f"within {seconds:g} seconds (faults.join_seconds). There {'is' if len(hosts) == 1 else 'are'} {came}"
        f"{' and others' * (len(hosts) > 8)}. See whether all were started, with the same command, and whether "
        f"{cluster.coordinator_address} can be reached from there; then start the same command again"
    )
