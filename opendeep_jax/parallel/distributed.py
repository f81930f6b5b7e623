"""Several processes as one job: its start, and the few words that processes exchange beside their arrays.

Words go through the key-value store of JAX's coordination service, which process 0 runs; one process has them in a
dictionary, so that callers are the same code. Arrays go through collectives, on the main thread alone.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import jax
from jax._src import cloud_tpu_init, clusters, distributed

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import BUG, MEND, STOPPED, PeerEnded, Resume
from opendeep_jax.parallel.cluster import Cluster
from opendeep_jax.parallel.roll_call import roll_call

Result = TypeVar("Result")

_words: dict[str, str] = {}  # of a job of one process
_FOREVER = 7 * 86_400.0
FAREWELL_SECONDS = {BUG: 10.0, MEND: 10.0, STOPPED: 10.0}
"""Process 0 waits so long for the others to end with it; a process that hangs is not to keep it for ever."""


class AlreadySaid(ConfigError):
    """A ConfigError that process 0 prints: the others end with it in silence."""

    already_said = True


def start(cluster: Cluster | None, timeout: float = 300.0) -> None:
    """Join the job, if any; afterwards `jax.devices()` are those of all processes.

    Raises:
        Resume: where the others can't be reached within `timeout` seconds.
        ConfigError: where they are not parts of one job.
    """
    if distributed.global_state.client is not None or (cluster is None and not _on_tpu_pod()):
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: faults/interrupt.py
    # Who is missing is found, and said, by faults/watchdog.py; JAX itself, which only aborts, comes long after it.
    patience = {"heartbeat_timeout_seconds": 3600, "initialization_timeout": max(int(timeout), 60)}
    where = cluster or _tpu_pod(timeout)
    if where.num_processes > 1:
        roll_call(where, timeout)
    try:
        if where.num_processes:
            jax.distributed.initialize(
                where.coordinator_address,
                where.num_processes,
                where.process_id,
                local_device_ids=where.local_device_ids,
                cluster_detection_method="deactivate",
                **patience,
            )
        else:
            jax.distributed.initialize(**patience)
    except (RuntimeError, ValueError) as error:
        raise Resume(
            f"process {where.process_id} of {where.num_processes} ({where.found_by}) did not join the job at "
            f"{where.coordinator_address} within {timeout:g} seconds: {str(error).splitlines()[0]}. See whether all "
            "processes were started with the same command, and whether that address can be reached; then start the "
            "same command again"
        ) from error
    put_value(f"host/{jax.process_index()}", socket.gethostname())


def _on_tpu_pod() -> bool:
    """Return whether this is a TPU machine, whose pod's other hosts JAX finds by itself."""
    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def _tpu_pod(timeout: float) -> Cluster:
    """Return this process's place among the hosts of a TPU pod as JAX finds it; no processes if it finds none."""
    with contextlib.suppress(RuntimeError, ValueError, AttributeError, TypeError):
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
        address, count, process, local = found
        if address and count and process is not None:
            return Cluster("TPU pod", address, count, process, tuple(local) if local else None)
    return Cluster("TPU pod", "", 0, 0)


def in_job() -> bool:
    """Return whether this process has joined a job of several."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def is_primary() -> bool:
    """Return whether this is the process that prints and writes shared files."""
    return jax.process_index() == 0


def put_value(name: str, text: str) -> None:
    """Publish a value to all processes."""
    client = distributed.global_state.client
    if client is None:
        _words[name] = text
    else:
        client.key_value_set(f"opendeep/{name}", text, allow_overwrite=True)


def get_value(name: str) -> str | None:
    """Return a shared value, or None if it is not published yet."""
    client = distributed.global_state.client
    if client is None:
        return _words.get(name)
    try:
        return client.key_value_try_get(f"opendeep/{name}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def put_first(name: str, text: str) -> str:
    """Return the value that all processes agree on under this name: the first proposed."""
    client = distributed.global_state.client
    if client is None:
        return _words.setdefault(name, text)
    try:
        client.key_value_set(f"opendeep/{name}", text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
    return get_value(name)


def get_values(prefix: str) -> dict[str, str]:
    """Return the shared values whose names begin with `prefix/`, by the rest of their names."""
    client = distributed.global_state.client
    if client is None:
        return {key[len(prefix) + 1 :]: text for key, text in _words.items() if key.startswith(f"{prefix}/")}
    return {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(f"opendeep/{prefix}/")}


def wait_for(name: str, timeout: float = _FOREVER) -> str:
    """Wait for a shared value. Raises TimeoutError, or PeerEnded when no process will publish it any more."""
    end, looked = time.monotonic() + timeout, time.monotonic()
    while (text := get_value(name)) is None:
        now = time.monotonic()
        if now > end:
            raise TimeoutError(name)
        if now - looked > 1.0:
            looked = now
            if ended := ended_peer():
                raise ended
        time.sleep(0.05)
    return text


def ended_peer() -> PeerEnded | None:
    """Return another process that exited with a status that all must exit with: a bug, a user error, a diagnosis."""
    for process, word in get_values("ended").items():
        status, _, text = word.partition(" ")
        if int(status) in (BUG, MEND, STOPPED) and int(process) != jax.process_index():
            where = f"process {process} on {host_of(int(process))} has ended with status {status}, and so does"
            return PeerEnded(int(status), f"{where} process {jax.process_index()}. It said: {text.strip()}")
    return None


def announce_end(status: int, text: str = "") -> None:
    """Announce to the others that this process is about to exit, and with which status."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # where process 0 is gone
        put_value(f"ended/{jax.process_index()}", f"{status} {text}")
        put_value(f"left/{jax.process_index()}", "")


def leave_together(status: int, text: str = "") -> None:
    """Leave the job, as the last call of a process that exits with `status`, `text` being what it said. The first one
    waits for the others, for a while: with it goes the coordination service, and JAX aborts whoever still listens to
    that."""
    seconds = FAREWELL_SECONDS.get(status, 3.0)

    def leave() -> None:
        announce_end(status, text)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while is_primary() and len(get_values("left")) < jax.process_count():
                time.sleep(0.05)

    # A thread, as the service never answers where process 0 is stopped.
    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(seconds)
    if is_primary():
        time.sleep(0.3)


def host_of(process: int) -> str:
    """Return the host name of a process of the job."""
    here = socket.gethostname() if process == jax.process_index() else "an unknown host"
    return get_value(f"host/{process}") or here


def primary_first(name: str, action: Callable[[], Result]) -> Result:
    """Run `action` on process 0, then on all others, which find its results.

    What process 0 refuses with a ConfigError, all refuse.

    Args:
        name: of this occasion, used once in the life of a process.
    """
    if jax.process_count() == 1:
        return action()
    if not is_primary():
        if verdict := wait_for(f"first/{name}"):
            raise AlreadySaid(verdict)
        return action()
    try:
        result = action()
    except ConfigError as error:
        put_value(f"first/{name}", str(error))
        raise
    put_value(f"first/{name}", "")
    return result
