"""What a run tells the world: numbers, evaluations, samples, the summary."""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.schedule import length_at, tokens_before
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.pipeline import Data
from opendeep_jax.generation.sampler import continue_prompts, make_next_tokens
from opendeep_jax.models.accounting import count_parameters, flops_per_token
from opendeep_jax.models.parameters import Skeleton
from opendeep_jax.parallel.distributed import is_primary
from opendeep_jax.record.clocks import WallClock
from opendeep_jax.record.goodput import Clock, InputWatch, read_goodput
from opendeep_jax.record.metrics import EVALUATION, SCALARS, MetricsWriter, read_jsonl
from opendeep_jax.record.trackers import open_trackers
from opendeep_jax.train.evaluate import compressors, held_out_batches, make_evaluator
from opendeep_jax.train.run_directory import SUMMARY
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import StepOutput
from opendeep_jax.train.summary import peak_memory_bytes


class Observer:
    """Measures and writes; it changes nothing of the run.

    Args:
        peak: FLOP/s of one device, for MFU; 0 if it isn't known.
        step: the step that training goes on from.
        begun: when the program was started, on the clock of `time.perf_counter`.
        clock: what this start's time went into; speeds are of its steps and their data.

    In a job of several processes all compute, and the first one writes.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        data: Data,
        bones: Skeleton,
        mesh: Mesh,
        peak: float,
        step: int,
        begun: float,
        clock: Clock,
    ):
        self.config, self.workdir, self.data, self.mesh = config, workdir, data, mesh
        self.clock, self.begun = clock, begun
        self.clock.default = "step"
        self.stalls: list[float] = []
        self.wall_clock, self._noticed = WallClock(), []
        self.trackers = open_trackers(config, workdir) if is_primary() else None
        self.first_step = step + 1
        self._begin(step)
        lines = read_jsonl(workdir / SCALARS)
        self.seconds_before = lines[-1].get("seconds", 0.0) if lines else 0.0
        self.peak = peak * mesh.size
        self.evaluator = make_evaluator(config, bones, data.tokenizer, mesh)
        self.next_tokens = make_next_tokens(bones, data.tokenizer.vocab_size, temperature=0.8, top_k=50)

    def _begin(self, step: int) -> None:
        self.writer = MetricsWriter(self.workdir, step, is_primary(), self.trackers)
        self.step = step
        self.inputs, self.measured = InputWatch(), (0, None)
        self.logged = step, self._training_seconds(), self.clock.total("data")
        self._left_out = 0, 0

    def _training_seconds(self) -> float:
        return self.clock.total("step", "data")

    def go_back(self, step: int) -> None:
        """The run goes on from the state after `step`: what was logged later is dropped."""
        self.writer.close()
        self.clock.went_back(self.step, step)
        self.first_step = step  # whose time is known: nothing is compiled again
        self._begin(step)

    def leave_out(self, step: int) -> None:
        """Notes that nothing was trained on the batch of `step`: it counts for no speed."""
        steps, tokens = self._left_out
        self._left_out = steps + 1, tokens + tokens_before(self.config, step) - tokens_before(self.config, step - 1)

    @contextlib.contextmanager
    def aside(self, state: TrainState, kind: str) -> Iterator[None]:
        """What happens in here is not training, but of this kind (`goodput.MEASURED`): it counts for no speed."""
        jax.block_until_ready(state)
        with self.clock.counting(kind):
            yield

    def log(self, step: int, output: StepOutput) -> dict[str, float]:
        """Writes a step's numbers. Here the loop waits for the device."""
        dispatched = time.perf_counter()
        metrics, check, load, bias = jax.device_get(output)
        device_seconds = time.perf_counter() - dispatched
        previous, before, data_before = self.logged
        now, data = self._training_seconds(), self.clock.total("data")
        left_out, their_tokens = self._left_out
        steps = step - previous - left_out
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
        if jump := self.wall_clock.jumped():
            self._noticed.append(("clock_jump", jump))
        self.writer.scalars(record)
        self.step, self.logged, self._left_out = step, (step, now, data), (0, 0)
        return {name: record[name] for name in ("loss", "tokens_per_second", "mfu") if record.get(name) is not None}

    def noticed(self) -> list[tuple[str, str]]:
        """What the logs since the last call have shown, as (kind, text) of an event."""
        found, self._noticed = self._noticed, []
        return found

    def flops(self, step: int) -> float:
        """FLOPs per token of `step` (from 0)."""
        return flops_per_token(self.config.model, length_at(self.config, step)).total

    def evaluate(self, step: int, state: TrainState, max_batches: int) -> dict[str, float]:
        """Measures held-out text, all of it for 0 batches. Gives and writes nothing where no text is held out."""
        batches = held_out_batches(self.config, self.data, self.mesh, max_batches)
        if not len(batches):
            return {}
        with self.aside(state, "evaluation"):
            result = self.evaluator(state.params, state.router_bias, batches)
        self.writer.evaluation({"step": step, "tokens": tokens_before(self.config, step), **result})
        self.measured = step, result["held_out_bits_per_byte"]
        return {"held_out_bits_per_byte": result["held_out_bits_per_byte"]}

    def measure(self, step: int) -> float | None:
        """Held-out bits per byte, where they were measured at this very step."""
        return self.measured[1] if self.measured[0] == step else None

    def saved(self, step: int, report) -> None:
        """Notes what a save kept the loop from."""
        if report is not None:
            self.stalls.append(report.stall_seconds)
            self.writer.checkpoint({"step": step, "stall_seconds": report.stall_seconds, "bytes": report.bytes})

    def sample(self, step: int, state: TrainState) -> str:
        """Lets the model continue the sample prompts; returns what to print."""
        train, tokenizer = self.config.train, self.data.tokenizer
        prompts = [[tokenizer.bos_id, *map(int, tokenizer.encode(prompt))] for prompt in train.sample_prompts]
        with self.aside(state, "evaluation"):
            *_, texts = continue_prompts(
                self.next_tokens,
                state.params,
                state.router_bias,
                prompts,
                tokenizer.eos_id,
                self.config.data.sequence_length,
                train.sample_tokens,
                self.config.seed + step,
            )
        texts = [tokenizer.decode(text) for text in texts]
        for prompt, text in zip(train.sample_prompts, texts, strict=True):
            self.writer.sample(step, prompt, text)
        return "\n".join(f"  {prompt}{text}" for prompt, text in zip(train.sample_prompts, texts, strict=True))

    def seconds(self) -> float:
        """How long the run has taken, with all starts up to the step that the next one went on from."""
        return self.seconds_before + time.perf_counter() - self.begun

    def close(self) -> None:
        """Closes the files and the trackers; a second call does nothing."""
        self.writer.close()
        if self.trackers is not None:
            self.trackers.close()

    def finish(self, steps: int) -> dict:
        """Writes summary.json, over all starts of the run, and closes the files. Empty but for the first process."""
        self.close()
        if not is_primary():
            return {}
        lines, evaluations = (read_jsonl(self.workdir / name) for name in (SCALARS, EVALUATION))
        count, speed, text = count_parameters(self.config.model), training_speed(lines), self.data.held_out_text()
        names = ("held_out_bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte")
        held_out = compressors(text) | evaluations[-1] if text else {}
        summary = {
            "steps": steps,
            "tokens": tokens_before(self.config, steps),
            "seconds": self.seconds(),
            "final_loss": lines[-1]["loss"],
            **{name: held_out.get(name) for name in names},
            "tokens_per_second": speed,
            "mfu": speed * self.flops(steps - 1) / self.peak if speed and self.peak else None,
            "parameters": count.total + count.mtp,
            "active_parameters": count.active,
            "peak_memory_bytes": peak_memory_bytes(),
            "goodput": goodput.goodput if (goodput := read_goodput(self.workdir)) else None,
            "checkpoint_stall_seconds": statistics.mean(self.stalls) if self.stalls else None,
        }
        write_atomically(self.workdir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary


def training_speed(lines: list[dict]) -> float | None:
    """Mean tokens/s over the lines of metrics.jsonl, start-up, evaluations, samples and checkpoints left out.

    None where no line has a speed: a run of one step.
    """
    tokens = seconds = 0.0
    for previous, line in itertools.pairwise(lines):
        if line.get("step_seconds"):
            tokens += line["tokens"] - previous["tokens"]
            seconds += line["step_seconds"] * (line["step"] - previous["step"])
    return tokens / seconds if seconds else None
