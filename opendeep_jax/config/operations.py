"""Settings of checkpoints, fault handling and tracking, which do not change what a run computes without faults."""

from dataclasses import dataclass
from typing import Literal

from opendeep_jax.config.limits import Count, Natural, NonNegative, Positive

DRILL_KINDS = "nan_gradient loss_spike flipped_bit sigkill sigstop sigterm hang clock_jump".split()
DRILLS = rf"({'|'.join(DRILL_KINDS)})@([1-9]\d*)(?:-([1-9]\d*))?(?::(\d+))?"
"""Syntax of an injected fault: kind@step, kind@first-last, and :process behind it."""
SpikePolicy = Literal["ignore", "record", "skip", "rollback"]
Tracker = Literal["wandb", "mlflow", "trackio"]


@dataclass(frozen=True)
class CheckpointConfig:
    """Schedule and contents of checkpoints. Saving is asynchronous and atomic."""

    every: Natural = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep: Natural = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: Natural = 0
    """Checkpoints at multiples of so many steps are kept for ever; 0 for none."""
    keep_best: Natural = 0
    """Number of checkpoints with the fewest held-out bits per byte to keep besides."""
    local_directory: str = ""
    """A fast disk of each machine (or memory, such as /dev/shm) for more frequent checkpoints; empty for none."""
    local_every: Natural = 0
    """Steps between checkpoints in local_directory, of which the newest is kept; 0 for none."""


@dataclass(frozen=True)
class FaultsConfig:
    """Detection and handling of faults during a run. docs/faults.md describes each."""

    rollback_after: Natural = 8
    """So many skipped updates in a row (loss or gradient not finite) take the run back to a checkpoint from before
    them, and it skips their batches from then on; 0 never."""
    spike_policy: SpikePolicy = "record"
    """Action on a spike of loss or gradient besides recording it: none, skip its update on the device, or roll back
    and skip its batch; ignore does not even record it."""
    spike_zscore: Positive = 12.0
    """A loss or a gradient's norm is a spike so many robust standard deviations (1.4826 times the median absolute
    deviation) above the median of the last 128 finite ones, unless as high ones have come several times by now."""
    max_rollbacks: Count = 3
    """A run that had to go back to the same weights so often stops with a diagnosis."""
    check_replicas_every: Natural = 0
    """Steps between comparisons of all copies of weights and moments over devices; 0 compares before each save only."""
    replay_every: Natural = 0
    """Steps between replays, which compute a step's gradients again on the same devices and on others; 0 for none."""
    hang_seconds: NonNegative = 1800.0
    """A process whose step, save or evaluation takes longer writes all its stacks and exits; 0 waits for ever.
    Compilation may take ten times as long."""
    peer_seconds: NonNegative = 60.0
    """Seconds without a heartbeat after which all others name the process and exit; 0 waits forever."""
    join_seconds: NonNegative = 300.0
    """Seconds that the processes of a job wait, at the start, until all are there; then they say who is missing, and
    end with status 75."""
    drill: tuple[str, ...] = ()
    """Faults to inject, such as nan_gradient@12, sigkill@20:1 (a step, a process)."""


@dataclass(frozen=True)
class TrackingConfig:
    """Destinations of metrics besides the work directory and TensorBoard."""

    trackers: tuple[Tracker, ...] = ()
    """Services that get every logged number too; each is an extra: pip install 'opendeep-jax[wandb]'."""
    project: str = "opendeep"
    """Project (wandb, trackio) or experiment (mlflow) there."""


@dataclass(frozen=True)
class HardwareConfig:
    """Hardware figures that the report and the logs compare speed with."""

    peak_tflops: NonNegative = 0.0
    """Peak TFLOP/s of one device for MFU; 0 uses the table of known chips, or a measured matmul on a CPU."""
