"""Experiment trackers besides TensorBoard: Weights & Biases, MLflow and trackio get every logged number too.

A run never waits for a service and never ends because of one. Each service has a thread with a bounded queue: what
does not fit is dropped, and a service that fails gets no more; both are said once. What a service is told where, and
as whom, it reads from its own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...).

    trackers = open_trackers(config, workdir)
    trackers.log(10, "train", {"loss": 3.2})     # arrives as train/loss
    trackers.close()
"""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.schema import RunConfig, to_dict
from opendeep_jax.record.files import dotted, number, read_object

RUN_IDS = "trackers.json"
"""File of a work directory with the run's id at each service, so that a resumed run goes on there as the same."""
QUEUE_SIZE = 4096
"""Records that wait for a slow service before more are dropped."""
CLOSE_SECONDS = 30.0
"""The longest that the end of a run waits for all services together."""

logger = logging.getLogger("opendeep_jax")


class Service(NamedTuple):
    """An open run at a service; both functions may take long and may raise."""

    log: Callable[[int, dict[str, float]], None]
    """Takes a step and its numbers, named `group/name`."""
    close: Callable[[], None]


class Trackers:
    """The services of one run. No method raises, and none waits for a service but `close`, for CLOSE_SECONDS.

    Args:
        openers: {name of a service: what opens the run there}; each is called in that service's own thread.
    """

    def __init__(self, openers: dict[str, Callable[[], Service]]):
        self._threads = [_ServiceThread(name, opener) for name, opener in openers.items()]

    def log(self, step: int, group: str, record: dict) -> None:
        """Hand on the finite numbers of a record. `step` is the optimizer step, `group` such as `train`."""
        numbers = {f"{group}/{name}": value for name, value in _numbers(record) if name != "step"}
        for thread in self._threads if numbers else ():
            thread.put((int(step), numbers))

    def close(self) -> None:
        """Let the services finish, for a limited time; a second call does nothing."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.finish(deadline)


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError, naming the extra, for a tracker whose package is not installed."""
    for name in config.tracking.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers has {name}, whose package is not installed: pip install 'opendeep-jax[{name}]', or "
                "leave it out."
            )


def open_trackers(config: RunConfig, workdir: str | Path) -> Trackers:
    """The services of config.tracking for the run in `workdir`. Only the process that writes the logs opens them.

    A run that goes on from a checkpoint goes on as the same run at each service. Steps that it does again, because
    they were lost, are there twice: none of the services can take back what it was told.

    Raises:
        ConfigError: for a tracker whose package is not installed.
    """
    check_trackers(config)
    workdir = Path(workdir)
    return Trackers({name: lambda name=name: OPENERS[name](config, workdir) for name in config.tracking.trackers})


def open_wandb(config: RunConfig, workdir: Path) -> Service:
    """Return a run at Weights & Biases; kept in the work directory, for `wandb sync`, where nobody is logged in."""
    import wandb

    def start(mode: str):
        return wandb.init(
            project=config.tracking.project,
            name=config.name,
            id=_run_id(workdir, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(workdir),
            config=to_dict(config),
            mode=mode,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=60, finish_timeout=CLOSE_SECONDS, disable_git=True
            ),
        )

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")  # it would ask for a key
    try:
        run = start(mode)
    except wandb.Error as error:
        if mode == "offline":
            raise
        _warn("wandb", f"cannot be reached ({error}); numbers are kept in {workdir / 'wandb'} for `wandb sync`")
        run = start("offline")
    # W&B's own step may not go back, as ours does after a rewind: it is a number like the others, and the x-axis.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return Service(lambda step, numbers: run.log({"step": step, **numbers}), run.finish)


def open_mlflow(config: RunConfig, workdir: Path) -> Service:
    """Return a run at the MLflow server, or in the file or database, that MLFLOW_TRACKING_URI names."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()

    def create() -> str:
        experiment = client.get_experiment_by_name(config.tracking.project)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(config.tracking.project)
        run_id = client.create_run(experiment_id, run_name=config.name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in dotted(to_dict(config))]
        for first in range(0, len(params), 100):  # as many as a request may have
            client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    run_id = _run_id(workdir, "mlflow", create)
    client.update_run(run_id, status="RUNNING")

    def log(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    return Service(log, lambda: client.set_terminated(run_id))


def open_trackio(config: RunConfig, workdir: Path) -> Service:
    """Return a run in trackio's local database, or the Space or server that its environment variables name."""
    import trackio

    # trackio knows runs by their names, and two work directories may hold runs of one name.
    name = _run_id(workdir, "trackio", lambda: f"{config.name}-{uuid.uuid4().hex[:6]}")
    run = trackio.init(
        project=config.tracking.project,
        name=name,
        config=to_dict(config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return Service(lambda step, numbers: run.log(numbers, step=step), run.finish)


OPENERS = {"wandb": open_wandb, "mlflow": open_mlflow, "trackio": open_trackio}


class _ServiceThread:
    """A service's queue and the thread that empties it. It does not keep the process from ending."""

    def __init__(self, name: str, opener: Callable[[], Service]):
        self.name, self._opener = name, opener
        self._queue: queue.Queue = queue.Queue(QUEUE_SIZE)
        self._full = self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, entry: tuple[int, dict[str, float]] | None) -> None:
        """Queue a record, or the end."""
        if self._failed:
            return
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            if not self._full:
                self._full = True
                _warn(self.name, f"is {QUEUE_SIZE:,} records behind; what it cannot take is left out there")

    def finish(self, deadline: float) -> None:
        """Wait until the end was reached, or the deadline, on the clock of `time.monotonic`."""
        with contextlib.suppress(queue.Full):  # in case `put` found no room for it
            if not self._failed:  # else nobody makes room
                self._queue.put(None, timeout=max(deadline - time.monotonic(), 0.0))
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            _warn(self.name, "did not finish in time; its last numbers may be missing there")

    def _work(self) -> None:
        try:
            service = self._opener()
            while (entry := self._queue.get()) is not None:
                service.log(*entry)
            service.close()
        except BaseException as error:  # also SystemExit: a library's own way out is not the run's
            self._failed = True
            _warn(self.name, f"gets no more numbers: {type(error).__name__}: {error}")


def _warn(name: str, what: str) -> None:
    logger.warning("tracker %s %s. The run goes on, and the work directory has every number.", name, what)


def _numbers(record: dict) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        plain = value.item() if getattr(value, "size", 0) == 1 else value
        if number(plain) is not None:
            yield name, float(plain)


_ids_lock = threading.Lock()


def _run_id(workdir: Path, service: str, create: Callable[[], str]) -> str:
    """The run's id at a service, as RUN_IDS remembers it; made with `create` and written there the first time."""
    path = workdir / RUN_IDS
    if found := read_object(path).get(service):
        return found
    made = create()
    with _ids_lock:
        write_atomically(path, json.dumps(read_object(path) | {service: made}, indent=2) + "\n")
    return made
