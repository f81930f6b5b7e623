"""Held-out bits per byte: what it measures, counted by hand."""

import gzip
import json
import lzma
import math

import jax
import numpy as np
import pytest

from opendeep_jax.checkpoint.checkpoints import load_model
from opendeep_jax.data.held_out import compressors
from opendeep_jax.data.opening import open_data
from opendeep_jax.models.parameters import split
from opendeep_jax.train.evaluate import evaluate_workdir


@pytest.fixture(scope="module")
def summary(small_run):
    return json.loads((small_run / "summary.json").read_text())


def test_bits_per_byte_are_all_bits_over_all_held_out_bytes(small_run, summary):
    model, config = load_model(small_run)
    data = open_data(config, progress=False)
    definition, *arrays = split(model)
    forward = jax.jit(lambda params, bias, *batch: definition.model(params, bias)(*batch))
    nats = tokens = 0
    for batch in data.held_out(8):
        logits = np.asarray(forward(*arrays, batch.tokens, batch.segment_ids, batch.positions), np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        each = log_z - np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        nats += each[batch.loss_mask].sum()
        tokens += batch.loss_mask.sum()
    # Every byte is predicted once: a document's first after the beginning mark. So are the ends, which are no bytes.
    text = data.held_out_text()
    assert tokens > len(text)
    assert summary["held_out_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_evaluating_the_last_checkpoint_gives_the_runs_own_numbers(small_run, summary):
    result = evaluate_workdir(small_run)
    for name in ("held_out_bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte"):
        assert result[name] == pytest.approx(summary[name], rel=1e-6), name
    earlier = evaluate_workdir(small_run, step=16)
    assert earlier["held_out_bits_per_byte"] != result["held_out_bits_per_byte"]


def test_compressors_are_at_their_best():
    text = b"def f(x):\n    return x\n" * 50 + bytes(range(256))
    assert compressors(text) == {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    assert compressors(b"")["gzip_bits_per_byte"] > 0  # no text, and no error
