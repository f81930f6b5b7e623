"""The pipeline's loss and gradients are those of the model in one piece, whatever the schedule and the layout.

The model is a small residual network with everything a real one has: an embedding and an output of its own, weights
divided over fsdp and gathered inside a layer, a loss and integer counts in each layer, an array without gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.collectives import all_gather
from opendeep_jax.parallel.pipeline import (
    PipelineResult,
    StageFunctions,
    from_stages,
    pipelined_value_and_grad,
    to_stages,
)
from opendeep_jax.parallel.schedule import IDLE, make_schedule, stage_layout
from opendeep_jax.parallel.shares import Max, Sum, is_share, over_devices

ROWS, WIDTH, HIDDEN, VOCABULARY = 4, 8, 12, 11


def embed(shared, microbatch):
    x = jnp.tanh(all_gather(shared["embedding"], "fsdp", 1)[microbatch["tokens"]])
    return x, {"largest": Max(jnp.max(x) - 2), "least token": Max(jnp.max(-1 - microbatch["tokens"]))}


def layer(weights, bias, x, microbatch):
    up, down = all_gather(weights["up"], "fsdp", 0), all_gather(weights["down"], "fsdp", 1)
    hidden = jnp.tanh(x @ up + bias) * microbatch["scale"][:, None]
    shares = {"positive": Sum(jnp.sum(hidden > 0, dtype=jnp.int32)), "largest": Max(jnp.max(hidden) - 5)}
    return x + hidden @ down, 0.01 * jnp.sum(hidden**2), shares


def output(shared, x, microbatch):
    # The embedding is used at both ends, as by MTP modules and tied heads.
    logits = x @ all_gather(shared["head"], "fsdp", 0) + x @ all_gather(shared["embedding"], "fsdp", 1).T
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), microbatch["tokens"][:, None], axis=1)
    return jnp.sum(each), {"rows": Sum(jnp.int32(len(each))), "worst": Max(jnp.max(each) - 9)}


PIECES = StageFunctions(embed, layer, output)


def arrays(num_layers, microbatches):
    """Weights, constants and microbatches of the toy model in one piece."""
    random = np.random.default_rng(num_layers)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) / np.sqrt(WIDTH), jnp.float32)

    shared = {"embedding": normal(VOCABULARY, WIDTH), "head": normal(WIDTH, VOCABULARY)}
    layers = {"up": normal(num_layers, WIDTH, HIDDEN), "down": normal(num_layers, HIDDEN, WIDTH)}
    tokens = jnp.asarray(random.integers(VOCABULARY, size=(microbatches, ROWS)))
    return shared, layers, normal(num_layers, HIDDEN), {"tokens": tokens, "scale": normal(microbatches, ROWS)}


def in_one_piece(shared, layers, constants, microbatches) -> PipelineResult:
    """The same sums and gradients by plain autodiff."""

    def total(shared, layers):
        def one(microbatch):
            def step(carry, weights):
                x, more, shares = layer(*weights, carry, microbatch)
                return x, (more, shares)

            x, embed_shares = embed(shared, microbatch)
            x, (losses, layer_shares) = jax.lax.scan(step, x, (layers, constants))
            loss, shares = output(shared, x, microbatch)
            return loss + jnp.sum(losses), (embed_shares, shares, layer_shares)

        losses, shares = jax.lax.map(one, microbatches)
        return jnp.sum(losses), jax.tree.map(together, shares, is_leaf=is_share)

    def together(share):
        reduce = jnp.max if isinstance(share, Max) else jnp.sum
        return share._make(reduce(x, 0) for x in share)

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (loss, shares), gradients = jax.jit(gradient)(shared, layers)
    return PipelineResult(loss, *gradients, *shares)


def pipelined(shared, layers, constants, microbatches, stages, chunks, fsdp, layout, keep="layers", pieces=PIECES):
    """The pipeline over stages x fsdp devices, all of it brought together; layers in the model's order."""
    devices = jax.devices()[: stages * fsdp]
    mesh = jax.make_mesh((stages, fsdp), ("stage", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    count = len(microbatches["tokens"])
    layers, constants = jax.tree.map(lambda x: to_stages(layout, x), (layers, constants))
    shared_spec = {"embedding": P(None, "fsdp"), "head": P("fsdp")}
    layers_spec = {"up": P("stage", "fsdp"), "down": P("stage", None, "fsdp")}
    rows = P(None, "fsdp")

    def program(*arguments):
        schedule = make_schedule(stages, count, chunks)
        result = pipelined_value_and_grad(pieces, schedule, layout, *arguments, keep=keep)
        whole = ("stage", "fsdp")
        return result._replace(
            loss=jax.lax.psum(result.loss, whole),
            shared_gradients=jax.lax.psum(result.shared_gradients, "stage"),
            embed_shares=over_devices(result.embed_shares, whole),
            output_shares=over_devices(result.output_shares, whole),
            layer_shares=over_devices(result.layer_shares, "fsdp"),
        )

    program = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(shared_spec, layers_spec, P("stage"), rows),
        out_specs=PipelineResult(P(), shared_spec, layers_spec, P(), P(), P("stage")),
        check_vma=False,
    )
    result = jax.jit(program)(shared, layers, constants, microbatches)
    in_order = {name: from_stages(layout, x) for name, x in result.layer_gradients.items()}
    shares = jax.tree.map(lambda x: from_stages(layout, x), result.layer_shares)
    return result._replace(layer_gradients=in_order, layer_shares=shares)


def assert_same(result: PipelineResult, expected: PipelineResult, tolerance=1e-6):
    for got, wanted in zip(result[3:], expected[3:], strict=True):  # counts exactly, numbers to rounding
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0 if x.dtype == jnp.int32 else 1e-5), got, wanted
        )
    np.testing.assert_allclose(result.loss, expected.loss, rtol=tolerance)
    got = result.shared_gradients, result.layer_gradients
    wanted = expected.shared_gradients, expected.layer_gradients
    for gradient, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(gradient, right, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(right))))


CASES = [
    # stages, chunks, microbatches, layers, fsdp, keep
    (4, 1, 13, 4, 2, "layers"),
    (4, 2, 6, 13, 2, "chunk"),  # uneven in layers and microbatches
    (2, 2, 5, 4, 4, "layers"),
    (2, 1, 1, 3, 2, "chunk"),  # fewer microbatches than stages
    (1, 2, 3, 5, 1, "layers"),
]


@pytest.mark.parametrize("stages, chunks, microbatches, num_layers, fsdp, keep", CASES)
def test_loss_gradients_and_sums_are_those_of_the_model_in_one_piece(
    stages, chunks, microbatches, num_layers, fsdp, keep
):
    layout = stage_layout(num_layers, stages, chunks, last=1.5)
    model = arrays(num_layers, microbatches)
    assert_same(pipelined(*model, stages, chunks, fsdp, layout, keep), in_one_piece(*model))


@given(stages=st.integers(1, 4), chunks=st.integers(1, 3), more=st.integers(0, 9))
def test_layers_come_back_from_the_stages_in_their_order(stages, chunks, more):
    layers = np.random.default_rng(0).normal(size=(stages * chunks + more, 2)).astype(np.float32)
    layout = stage_layout(len(layers), stages, chunks, first=1.0, last=2.0)
    at_rest = to_stages(layout, jnp.asarray(layers))
    np.testing.assert_array_equal(from_stages(layout, at_rest), layers)
    np.testing.assert_array_equal(np.asarray(at_rest)[layout.source == IDLE], 0)
    np.testing.assert_array_equal(
        np.asarray(at_rest)[layout.source != IDLE], layers[layout.source[layout.source != IDLE]]
    )


@pytest.mark.parametrize(
    "stages, chunks, places, microbatches, message",
    [
        (2, 1, 2, 3, "schedule for 2 stages on a mesh whose axis 'stage' has 1 devices"),
        (1, 2, 2, 3, "schedule for 1 stages x 2 chunks with a layout for 1 x 1"),
        (1, 1, 3, 3, r"layers with leading sizes \[\(3,\)\] in a pipeline: must be 4"),
        (1, 1, 4, 2, r"microbatches with leading sizes \[\(2,\)\] in a pipeline: must be 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(stages, chunks, places, microbatches, message):
    shared, layers, constants, batch = arrays(places, microbatches)
    schedule, layout = make_schedule(stages, 3, chunks), stage_layout(4, 1)
    with pytest.raises(ConfigError, match=message):
        pipelined_value_and_grad(PIECES, schedule, layout, shared, layers, constants, batch)
