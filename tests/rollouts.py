"""Reinforcement learning in miniature: an objective and a feed that samples with the state it trains.

    python tests/rollouts.py WORKDIR [flag=value …]

trains five steps, alone or as one process of a job.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from small_models import V3, run_config

from kernels_pallas.cross_entropy import token_logprobs
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.config.schema import CheckpointConfig, ParallelConfig, RunConfig, TrainConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.generation.engine import Engine
from opendeep_jax.generation.requests import EngineConfig, SamplingParams
from opendeep_jax.parallel.shares import Sum
from opendeep_jax.record.workdir import check_workdir
from opendeep_jax.train.feed import Feed
from opendeep_jax.train.objective import Objective

STEPS, ROWS, GROUP, LENGTH, NEW = 5, 16, 2, 16, 6


def policy_gradient() -> Objective:
    """Next tokens, each weighed by its advantage."""

    def loss(hidden, *, head, batch, normalizers, **_):
        logprobs, _ = token_logprobs(hidden, head, batch.targets, mask=batch.loss_mask)
        share = -jnp.sum(jnp.where(batch.loss_mask, logprobs * batch.extras["advantages"], 0)) / normalizers
        return share, {"policy_loss": Sum(jax.lax.stop_gradient(share))}

    def sampled_tokens(batch):
        return jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.float32), 1)

    return Objective(loss, sampled_tokens, extras={"advantages": "float32"}, judged=None)


class Rollouts(Feed):
    """Feed that samples a group of answers to each of its prompts; the reward is for even tokens.

    Each process samples the prompts of its own rows with an engine of its own, and keeps them beside the run.
    """

    engine: Engine | None = None

    def batch(self, step: int, state) -> Batch:
        kept = self.workdir / "rollouts" / f"{step}.{jax.process_index()}.npy"
        if not kept.exists():  # after a kill: the same batch again
            samples = self.sample_with(state).sample(
                self.prompts(step),
                SamplingParams(max_tokens=NEW, seed=1000 * step + int(self.rows_here(ROWS)[0])),
                GROUP,
            )
            kept.parent.mkdir(exist_ok=True)
            with open(kept.with_suffix(".part"), "wb") as file:
                np.save(file, samples.ids)
            kept.with_suffix(".part").rename(kept)
        return self.pack(self.prompts(step), np.load(kept))

    def sample_with(self, state) -> Engine:
        """Return the engine with the state's weights; it is made once."""
        if self.engine is None:
            model = self.setup.definition.model(state.params, state.router_bias)
            self.engine = Engine(model, EngineConfig(slots=8, max_length=LENGTH, page_size=16))
        else:
            self.engine.load(state.params, state.router_bias)
        return self.engine

    def prompts(self, step: int) -> list[list[int]]:
        """Return this process's prompts: a group has one, and none is divided between processes."""
        return [[1, 2 + row % 7, 3 + step] for row in self.rows_here(ROWS)[::GROUP]]

    def pack(self, prompts: list[list[int]], ids: np.ndarray) -> Batch:
        """Return prompts and answers as a batch, each answer's advantage over its group's mean on its tokens."""
        texts = np.array(
            [
                [*prompt, *answer]
                for prompt, group in zip(prompts, ids.reshape(-1, GROUP, NEW), strict=True)
                for answer in group
            ]
        )
        size, places = texts.shape[1] - 1, np.arange(LENGTH)
        tokens, targets = np.zeros((2, len(texts), LENGTH), np.int32)
        tokens[:, :size], targets[:, :size] = texts[:, :-1], texts[:, 1:]
        rewards = np.mean(ids % 2 == 0, axis=1).reshape(-1, GROUP)
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1, 1).astype(np.float32)
        inside = np.broadcast_to(places < size, tokens.shape)
        answer = inside & (places >= len(prompts[0]) - 1)
        return Batch(
            tokens=tokens,
            targets=targets,
            loss_mask=answer,
            segment_ids=inside.astype(np.int32),
            positions=np.where(inside, places, 0).astype(np.int32),
            extras={"advantages": np.where(answer, advantages, 0).astype(np.float32)},
        )


def config(parallel: ParallelConfig = ParallelConfig(), **faults) -> RunConfig:  # noqa: B008
    """Return a run of five steps of a small V3 that is saved every two."""
    model = dataclasses.replace(V3, num_layers=2, context_length=LENGTH, mtp=dataclasses.replace(V3.mtp, depth=0))
    return run_config(
        model,
        length=LENGTH,
        name="rollouts",
        parallel=parallel,
        train=TrainConfig(
            steps=STEPS, batch_size=ROWS, loss_chunk=12, log_every=1, sample_every=0, compilation_cache=""
        ),
        checkpoint=CheckpointConfig(every=2, keep=0),
        faults=FaultsConfig(**faults),
    )


def main(workdir: str, *faults: str) -> None:
    """Train in `workdir`, in this process of a job."""
    import os

    from opendeep_jax.parallel.cluster import find_cluster
    from opendeep_jax.parallel.distributed import start
    from opendeep_jax.train.loop import train

    start(find_cluster(os.environ))
    run = config(ParallelConfig(fsdp=jax.device_count()), **dict(fault.split("=") for fault in faults))
    check_workdir(run, workdir)
    train(run, workdir, Rollouts(run, workdir), policy_gradient())


if __name__ == "__main__":
    main(*sys.argv[1:])
