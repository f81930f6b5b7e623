"""Observation of a run: metrics, evaluations, samples, the summary."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opendeep_jax.config.schedule import tokens_before
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.faults.watchdog import Watchdog
from opendeep_jax.models.accounting import count_parameters, flops_per_token
from opendeep_jax.record.files import EVALUATION, METRICS, SUMMARY, last_record, read_jsonl
from opendeep_jax.record.goodput import GoodputClock, InputWatch, read_goodput
from opendeep_jax.record.metrics import MetricsWriter
from opendeep_jax.record.record import Record
from opendeep_jax.record.trackers import open_trackers
from opendeep_jax.train.feed import Feed
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import StepOutput
from opendeep_jax.train.summary import peak_memory_bytes


class Observer:
    """Observer that measures a run and writes the results, without effect on the run.

    Args:
        record: of the run; in a job of several processes all compute, and the first one writes.
        peak: FLOP/s of one device, for MFU; 0 if it isn't known.
        step: the step that training goes on from.
        begun: when the program was started, on the clock of `time.perf_counter`.
        clock: of this start's time; speeds are of its steps and their data.
    """

    def __init__(
        self,
        config: RunConfig,
        record: Record,
        feed: Feed,
        mesh: Mesh,
        peak: float,
        step: int,
        begun: float,
        clock: GoodputClock,
        watchdog: Watchdog,
    ):
        self.config, self.record, self.feed = config, record, feed
        self.clock, self.begun, self.watchdog = clock, begun, watchdog
        self.clock.default = "step"
        self.stalls: list[float] = []
        self._noticed: list[tuple[str, str]] = []
        self.trackers = open_trackers(config, record.workdir) if record.writes else None
        self.first_step = step + 1
        self._begin(step)
        self.seconds_before = (last_record(record.workdir / METRICS) or {}).get("seconds", 0.0)
        self.peak = peak * mesh.size

    def _begin(self, step: int) -> None:
        self.record.rewind(step)
        self.writer = MetricsWriter(self.record, step, self.trackers)
        self.step = step
        self.inputs, self.measured = InputWatch(), (0, None)
        self.logged = step, self._training_seconds(), self.clock.total("data")
        self._skipped = 0, 0

    def _training_seconds(self) -> float:
        return self.clock.total("step", "data")

    def rollback(self, step: int) -> None:
        """Go on from the state after `step`; what was logged later is cut."""
        self.writer.close()
        self.clock.rollback(self.step, step)
        self.first_step = step  # whose time is known: nothing is compiled again
        self._begin(step)

    def skip(self, step: int) -> None:
        """Record that the batch of `step` was skipped: it does not count for speeds."""
        steps, tokens = self._skipped
        self._skipped = steps + 1, tokens + tokens_before(self.config, step) - tokens_before(self.config, step - 1)

    @contextlib.contextmanager
    def aside(self, state: TrainState, kind: str, doing: str = "", step: int | None = None) -> Iterator[None]:
        """Count the time of a block that is not training as of this kind (`record.time_kinds`): for no speed.

        Args:
            doing: what the watchdog is told; by default the kind.
        """
        self.watchdog.doing(doing or kind, step)
        jax.block_until_ready(state)
        with self.clock.counting(kind):
            yield

    def log(self, step: int, output: StepOutput) -> dict[str, float]:
        """Write a step's numbers, and return those for the terminal. Here the loop waits for the device."""
        dispatched = time.perf_counter()
        metrics, check, load, bias = jax.device_get(output)
        device_seconds = time.perf_counter() - dispatched
        previous, before, data_before = self.logged
        now, data = self._training_seconds(), self.clock.total("data")
        skipped, their_tokens = self._skipped
        steps = step - previous - skipped
        tokens = tokens_before(self.config, step) - tokens_before(self.config, previous) - their_tokens
        seconds = now - before
        record: dict[str, Any] = {"step": step, "tokens": tokens_before(self.config, step), "seconds": self.seconds()}
        record |= {name: float(value) for name, value in {**check._asdict(), **metrics}.items()}
        if load:
            layers = np.concatenate([np.atleast_2d(value) for value in load.values()])
            peaks = layers.max(axis=1) / np.maximum(layers.mean(axis=1), 1e-9)
            record["expert_load_max_over_mean"] = float(peaks.max())
            record["expert_load_max_over_mean_by_layer"] = [round(float(peak), 4) for peak in peaks]
            biases = np.concatenate([np.atleast_2d(bias[name]) for name in load]) if bias else None
            self.writer.experts(step, layers, biases)
            if biases is not None:
                record |= {"router_bias_min": float(biases.min()), "router_bias_max": float(biases.max())}
        if step > self.first_step:
            speed = tokens / seconds
            record |= {"tokens_per_second": speed, "step_seconds": seconds / steps}
            record["mfu"] = speed * self.flops(step - 1) / self.peak if self.peak else None
            record["data_seconds"] = (data - data_before) / steps
            change = self.inputs.window(steps, seconds, data - data_before, device_seconds)
            if change:
                self._noticed.append(change)
        else:
            record["first_step_seconds"] = time.perf_counter() - self.begun  # of the program, compilation and all
        self.writer.scalars(record)
        self.step, self.logged, self._skipped = step, (step, now, data), (0, 0)
        return {name: record[name] for name in ("loss", "tokens_per_second", "mfu") if record.get(name) is not None}

    def noticed(self) -> list[tuple[str, str]]:
        """Return what the logs since the last call have shown, as (kind, text) of an event."""
        found, self._noticed = self._noticed, []
        return found

    def flops(self, step: int) -> float:
        """Return FLOPs per token of `step` (from 0)."""
        return flops_per_token(self.config.model, self.feed.shape(step)[1]).total

    def evaluate(self, step: int, state: TrainState, max_batches: int) -> dict[str, float]:
        """Evaluate the state with the feed, on all data for 0 batches; write the results and return the measure."""
        with self.aside(state, "evaluation", step=step):
            found = self.feed.evaluate(step, state, max_batches)
        if not found:
            return {}
        self.writer.evaluation({"step": step, "tokens": tokens_before(self.config, step), **found})
        self.measured = step, found.get(self.feed.measure)
        return {name: value for name, value in found.items() if name == self.feed.measure}

    def measure(self, step: int) -> float | None:
        """Return the feed's measure, where it was taken at this very step."""
        return self.measured[1] if self.measured[0] == step else None

    def saved(self, step: int, report) -> None:
        """Record the time that a save blocked the loop."""
        if report is not None:
            self.stalls.append(report.stall_seconds)
            self.writer.checkpoint({"step": step, "stall_seconds": report.stall_seconds, "bytes": report.bytes})

    def sample(self, step: int, state: TrainState) -> str:
        """Sample continuations of the prompts from the feed; return the text to print."""
        with self.aside(state, "evaluation"):
            samples = self.feed.sample(step, state)
        for prompt, text in samples:
            self.writer.sample(step, prompt, text)
        return "\n".join(f"  {prompt}{text}" for prompt, text in samples)

    def seconds(self) -> float:
        """Return how long the run has taken, with all starts up to the step that the next one went on from."""
        return self.seconds_before + time.perf_counter() - self.begun

    def close(self) -> None:
        """Close the files and the trackers; a second call does nothing."""
        self.writer.close()
        if self.trackers is not None:
            self.trackers.close()

    def finish(self, steps: int) -> dict[str, Any]:
        """Write summary.json, over all starts of the run, and close the files. Empty but for the first process."""
        self.close()
        if not self.record.writes:
            return {}
        workdir = self.record.workdir
        lines, goodput = read_jsonl(workdir / METRICS), read_goodput(workdir)
        count, speed = count_parameters(self.config.model), training_speed(lines)
        summary = {
            "steps": steps,
            "tokens": tokens_before(self.config, steps),
            "seconds": self.seconds(),
            "final_loss": lines[-1]["loss"],
            **self.feed.summary(read_jsonl(workdir / EVALUATION)),
            "tokens_per_second": speed,
            "mfu": speed * self.flops(steps - 1) / self.peak if speed and self.peak else None,
            "parameters": count.total + count.mtp,
            "active_parameters": count.active,
            "peak_memory_bytes": peak_memory_bytes(),
            "goodput": goodput.goodput if goodput else None,
            "checkpoint_stall_seconds": statistics.mean(self.stalls) if self.stalls else None,
        }
        self.record.write(SUMMARY, summary)
        return summary


def training_speed(lines: list[dict]) -> float | None:
    """Return the mean tokens/s over the lines of metrics.jsonl, without start-up, evaluations, samples and saves.

    None where no line has a speed: a run of one step.
    """
    tokens = seconds = 0.0
    for previous, line in itertools.pairwise(lines):
        if line.get("step_seconds"):
            tokens += line["tokens"] - previous["tokens"]
            seconds += line["step_seconds"] * (line["step"] - previous["step"])
    return tokens / seconds if seconds else None
