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
from jax._src import cloud_tpu_init, distributed

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.cluster import Cluster

Result = TypeVar("Result")

_words: dict[str, str] = {}  # of a job of one process
_FOREVER = 7 * 86_400.0


class AlreadySaid(ConfigError):
    """A ConfigError that process 0 prints: the others end with it in silence."""

    already_said = True


def start(cluster: Cluster | None, timeout: float = 300.0) -> None:
    """Joins the job, if there is one; then `jax.devices()` are those of all processes.

    Raises:
        ConfigError: where the others can't be reached within `timeout` seconds.
    """
    if distributed.global_state.client is not None or (cluster is None and not _on_tpu_pod()):
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: train/interrupt.py
    # Who is missing is found, and said, by train/watchdog.py; JAX itself, which only aborts, comes long after it.
    patience = {"heartbeat_timeout_seconds": 3600, "initialization_timeout": int(timeout)}
    where = cluster or Cluster("TPU pod", "", 0, 0)
    try:
        if cluster is None:
            jax.distributed.initialize(**patience)
        else:
            jax.distributed.initialize(
                cluster.coordinator_address,
                cluster.num_processes,
                cluster.process_id,
                local_device_ids=cluster.local_device_ids,
                cluster_detection_method="deactivate",
                **patience,
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"This is process {where.process_id} of {where.num_processes} ({where.found_by}), and the job did not come "
            f"together at {where.coordinator_address} within {timeout:.0f} seconds: {str(error).splitlines()[0]}. See "
            "whether all processes were started with the same command, and whether that address can be reached."
        ) from error
    share(f"host/{jax.process_index()}", socket.gethostname())


def _on_tpu_pod() -> bool:
    """Whether this is a TPU machine; JAX then finds the pod's other hosts by itself, also where there are none."""
    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def is_primary() -> bool:
    """Whether this process is the one that prints, and writes what is written once."""
    return jax.process_index() == 0


def share(name: str, text: str) -> None:
    """Puts a word where all processes can see it."""
    client = distributed.global_state.client
    if client is None:
        _words[name] = text
    else:
        client.key_value_set(f"opendeep/{name}", text, allow_overwrite=True)


def peek(name: str) -> str | None:
    """A shared word, or None where there is none yet."""
    client = distributed.global_state.client
    if client is None:
        return _words.get(name)
    try:
        return client.key_value_try_get(f"opendeep/{name}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def propose(name: str, text: str) -> str:
    """The word that all processes get under this name: the first that any of them proposes."""
    client = distributed.global_state.client
    if client is None:
        return _words.setdefault(name, text)
    try:
        client.key_value_set(f"opendeep/{name}", text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
    return peek(name)


def words(prefix: str) -> dict[str, str]:
    """All shared words whose names begin with `prefix/`, by the rest of their names."""
    client = distributed.global_state.client
    if client is None:
        return {key[len(prefix) + 1 :]: text for key, text in _words.items() if key.startswith(f"{prefix}/")}
    return {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(f"opendeep/{prefix}/")}


def wait_for(name: str, timeout: float = _FOREVER) -> str:
    """A shared word, as soon as it is there. Raises TimeoutError."""
    end = time.monotonic() + timeout
    while (text := peek(name)) is None:
        if time.monotonic() > end:
            raise TimeoutError(name)
        time.sleep(0.05)
    return text


def leave_together(seconds: float = 3.0) -> None:
    """Called last by a process that is about to exit. The first one waits for the others, for so long at most: with it
    goes the coordination service, and JAX aborts whoever still listens to that."""

    def leave() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # where process 0 is gone
            share(f"left/{jax.process_index()}", "")
            while is_primary() and len(words("left")) < jax.process_count():
                time.sleep(0.05)

    # A thread, as the service never answers where process 0 is stopped.
    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(seconds)
    if is_primary():
        time.sleep(0.3)


def host_of(process: int) -> str:
    """The name of the machine that a process of the job runs on."""
    here = socket.gethostname() if process == jax.process_index() else "an unknown host"
    return peek(f"host/{process}") or here


def primary_first(name: str, action: Callable[[], Result]) -> Result:
    """Process 0 does `action`, then all others do: what the first has made, they find.

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
        share(f"first/{name}", str(error))
        raise
    share(f"first/{name}", "")
    return result
