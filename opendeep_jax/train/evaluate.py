"""Held-out bits per byte: comparable between tokenizers, and with gzip and xz."""

import gzip
import lzma
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.pipeline import open_data
from opendeep_jax.models.parameters import Arrays, Skeleton, split
from opendeep_jax.ops.losses import chunked_cross_entropy
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.train.checkpoint import load_model

Evaluator = Callable[[Arrays, Arrays, Iterable[Batch]], dict[str, float]]


def make_evaluator(config: RunConfig, skeleton: Skeleton, token_bytes: np.ndarray, mesh: Mesh) -> Evaluator:
    """A function of params, router biases and batches that measures the main model's loss on the batches.

    It gives `held_out_loss` in nats per token and `held_out_bits_per_byte`: all tokens' cross-entropy in bits, over
    the UTF-8 bytes that they stand for. An end of text costs its bits and stands for no byte.

    Args:
        token_bytes: int32 [tokenizer's vocabulary], the bytes of each token.
    """
    sizes = jnp.asarray(np.pad(token_bytes, (0, config.model.vocab_size - len(token_bytes))))

    @jax.jit
    def sums(params, router_bias, batch):
        model = skeleton.model(params, router_bias)
        hidden = model.forward(batch.tokens, batch.segment_ids, batch.positions).hidden
        nats, _ = chunked_cross_entropy(
            hidden, model.head_kernel(), batch.targets, batch.loss_mask, config.train.loss_chunk
        )
        num_bytes = jnp.sum(jnp.where(batch.loss_mask, sizes[batch.targets], 0))
        return nats, jnp.sum(batch.loss_mask), num_bytes

    def evaluate(params: Arrays, router_bias: Arrays, batches: Iterable[Batch]) -> dict[str, float]:
        with jax.set_mesh(mesh):
            parts = [sums(params, router_bias, put_batch(batch, mesh)) for batch in batches]
        nats, tokens, num_bytes = (math.fsum(float(part[i]) for part in parts) for i in range(3))
        return {
            "held_out_loss": nats / max(tokens, 1),
            "held_out_bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
        }

    return evaluate


def compressors(text: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9` make of the text, in bits per byte."""
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {f"{name}_bits_per_byte": 8 * len(data) / max(len(text), 1) for name, data in packed.items()}


def evaluation_batch_size(config: RunConfig) -> int:
    """Rows in an evaluation batch."""
    return config.evaluation.batch_size or config.train.batch_size


def evaluate_workdir(workdir: str | Path, step: int | None = None) -> dict[str, float]:
    """Measures a checkpoint of a run (the newest, or that of `step`) on all held-out text.

    Raises:
        ConfigError: where there is no run or no such checkpoint.
    """
    mesh = make_mesh(load_run_config(workdir).parallel)
    model, config = load_model(workdir, step, mesh)
    skeleton, params, router_bias = split(model)
    data = open_data(config)
    evaluate = make_evaluator(config, skeleton, data.tokenizer.token_bytes, mesh)
    batches = data.held_out(evaluation_batch_size(config), config.evaluation.final_batches)
    return evaluate(params, router_bias, batches) | compressors(data.held_out_text)
