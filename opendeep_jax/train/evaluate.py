"""Held-out bits per byte: comparable between tokenizers, and with gzip and xz."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from opendeep_jax.checkpoint.checkpoints import load_model
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.rules import LENGTH_AXES, ROW_AXES
from opendeep_jax.config.schema import ParallelConfig, RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.opening import open_data
from opendeep_jax.data.pipeline import Data, HeldOut
from opendeep_jax.data.recorded import check_same_data
from opendeep_jax.models.parameters import Arrays, ModelDefinition, split
from opendeep_jax.parallel.axes import BATCH_SPEC, row_shards, weight_specs
from opendeep_jax.parallel.collectives import per_device, psum
from opendeep_jax.parallel.mesh import make_mesh, put_batch, rows_here
from opendeep_jax.text.tokenizer import Tokenizer
from opendeep_jax.train.objective import make_inputs, summed_cross_entropy
from opendeep_jax.train.setup import use_compilation_cache

Evaluator = Callable[[Arrays, Arrays, Iterable[Batch]], dict[str, float]]


def make_evaluator(config: RunConfig, definition: ModelDefinition, tokenizer: Tokenizer, mesh: Mesh) -> Evaluator:
    """A function of params, router biases and batches that measures the main model's loss on the batches, of which it
    takes the rows that `held_out_batches` gives this process.

    It gives `held_out_loss` in nats per token and `held_out_bits_per_byte`: all tokens' cross-entropy in bits, over
    the UTF-8 bytes that they stand for. An end of text costs its bits and stands for no byte.

    Args:
        tokenizer: It says how many bytes each token stands for.
    """
    rest = (0, config.model.vocab_size - tokenizer.vocab_size)
    sizes, first_sizes = np.pad(tokenizer.token_bytes, rest), np.pad(tokenizer.first_bytes, rest)

    def device_sums(params, router_bias, inputs):
        model, batch = definition.model(params, router_bias), inputs.batch
        hidden = model.forward(batch.tokens, batch.segment_ids, batch.positions, order=inputs.order).hidden
        nats, _ = summed_cross_entropy(config, hidden, model.head_kernel(), batch.targets, batch.loss_mask)
        begins = batch.tokens == tokenizer.bos_id
        said = jnp.where(begins, jnp.asarray(first_sizes)[batch.targets], jnp.asarray(sizes)[batch.targets])
        num_bytes = jnp.sum(jnp.where(batch.loss_mask, said, 0))
        return psum((nats, jnp.sum(batch.loss_mask), num_bytes), ROW_AXES + LENGTH_AXES)

    whole, specs = PartitionSpec(), weight_specs(definition, mesh)
    rows = evaluation_rows(config, mesh)

    @jax.jit
    def sums(params, router_bias, batch):
        in_specs = ({name: specs[name] for name in params}, whole, BATCH_SPEC)
        return per_device(device_sums, in_specs, whole)(params, router_bias, make_inputs(batch, 0, mesh))

    def evaluate(params: Arrays, router_bias: Arrays, batches: Iterable[Batch]) -> dict[str, float]:
        with jax.set_mesh(mesh):
            parts = [sums(params, router_bias, put_batch(batch, mesh, rows)) for batch in batches]
        nats, tokens, num_bytes = (math.fsum(float(part[i]) for part in parts) for i in range(3))
        return {
            "held_out_loss": nats / max(tokens, 1),
            "held_out_bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
        }

    return evaluate


def evaluation_rows(config: RunConfig, mesh: Mesh) -> int:
    """Rows in an evaluation batch, with those of padding that let it divide over the devices."""
    shards = row_shards(mesh)
    return -(-evaluation_batch_size(config) // shards) * shards


def held_out_batches(config: RunConfig, data: Data, mesh: Mesh, max_batches: int) -> HeldOut:
    """Return this process's rows of the evaluation batches, for `make_evaluator`; all held-out text for 0 batches."""
    here = rows_here(mesh, evaluation_rows(config, mesh))
    return data.held_out(evaluation_batch_size(config), max_batches, here)


def evaluation_batch_size(config: RunConfig) -> int:
    """Rows in an evaluation batch: by default those of a micro-batch, which are known to fit."""
    return config.evaluation.batch_size or config.train.batch_size // config.train.accumulation_steps


def evaluate_workdir(workdir: str | Path, step: int | None = None) -> dict[str, float]:
    """Measure a checkpoint of a run (the newest, or that of `step`) as at the run's end, on the devices found here.

    It takes `evaluation.final_batches` of the held-out text, and the compressors all of it.

    Raises:
        ConfigError: where there is no run, no such checkpoint, no held-out text, or other text than the run's.
    """
    run = load_run_config(workdir)
    use_compilation_cache(run)
    if not run.data.held_out_fraction:
        raise ConfigError(
            f"--workdir={workdir}: data.held_out_fraction = 0, so this run held out no text to be measured on. "
            "Train with --data.held_out_fraction=0.05, or another share above 0."
        )
    mesh = make_mesh(ParallelConfig())
    model, config = load_model(workdir, step, mesh)
    definition, params, router_bias = split(model)
    data = open_data(config, workdir=workdir)
    check_same_data(data.describe(), workdir)
    evaluate = make_evaluator(config, definition, data.tokenizer, mesh)
    batches = held_out_batches(config, data, mesh, config.evaluation.final_batches)
    return evaluate(params, router_bias, batches) | data.compression()
