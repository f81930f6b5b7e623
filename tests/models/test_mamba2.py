"""Mamba-2 is its recurrence, token by token, in documents and over chunks of any size; and hybrids of it train."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import (
    NEMOTRON_H,
    compiled,
    measured_and_gradients,
    packed_batch,
    random_arrays,
    random_model,
    run_config,
)

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import (
    MambaConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
    RematConfig,
)
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.models.mamba2 import Mamba2
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.ops.state_space import causal_convolution, document_numbers, state_space
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.train.objective import pretraining
from opendeep_jax.train.state import TrainState, state_shardings
from opendeep_jax.train.step import make_train_step

B, H, P, G, N = 2, 6, 4, 3, 5


def arrays(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "x": normal(B, length, H, P),
        "step": random.uniform(0, 0.8, (B, length, H)).astype(np.float32),
        "decay": -random.uniform(0.1, 2, H).astype(np.float32),
        "b": normal(B, length, G, N),
        "c": normal(B, length, G, N),
        "state": normal(B, H, P, N),
    }


def segments_of(length: int) -> np.ndarray:
    """A row of documents that begin at odd places, one of them a single token, padding in the middle; a whole one."""
    row = np.repeat([1, 2, 3, 0, 3, 4], [3, 1, 7, 2, 5, 100])[:length]
    return np.stack([row, np.ones_like(row)]).astype(np.int32)


def by_recurrence(x, step, decay, b, c, state, segments):
    """Token by token, as the equations have it."""
    xp = jnp if isinstance(x, jax.Array) else np
    b, c = (xp.repeat(y, H // G, axis=2) for y in (b, c))
    outs = []
    for t in range(x.shape[1]):
        if t:
            same = (segments[:, t] == segments[:, t - 1]).astype(x.dtype)
            state = state * same[:, None, None, None]
        forgotten = xp.exp(step[:, t] * decay)[..., None, None]
        state = forgotten * state + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outs.append(xp.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return xp.stack(outs, 1), state


@pytest.mark.parametrize("length, chunk", [(1, 4), (5, 8), (8, 4), (19, 4), (19, 7), (19, 1), (40, 16)])
def test_chunks_of_any_size_give_what_the_recurrence_gives(length, chunk):
    parts, segments = arrays(length), segments_of(length)
    want = by_recurrence(**{name: y.astype(np.float64) for name, y in parts.items()}, segments=segments)
    documents = document_numbers(jnp.asarray(segments))
    out, state = jax.jit(lambda parts: state_space(**parts, documents=documents, chunk_size=chunk))(parts)
    np.testing.assert_allclose(out, want[0], atol=3e-5)
    np.testing.assert_allclose(state, want[1], atol=3e-5)


@pytest.mark.parametrize("chunk", [5, 32])
def test_gradients_are_those_of_the_recurrence(chunk):
    length = 13
    parts = {name: jnp.asarray(y) for name, y in arrays(length, seed=1).items()}
    segments = segments_of(length)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(B, length, H, P)), jnp.float32)
    documents = document_numbers(jnp.asarray(segments))

    def loss(out, state):
        return jnp.sum(out * weights) + jnp.sum(state**2)

    ours = jax.jit(jax.grad(lambda p: loss(*state_space(**p, documents=documents, chunk_size=chunk))))(parts)
    want = jax.jit(jax.grad(lambda p: loss(*by_recurrence(**p, segments=segments))))(parts)
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, want[name], atol=2e-4, rtol=1e-4, err_msg=name)


def test_gradients_are_numbers_where_a_head_forgets_everything_at_once():
    parts = {name: jnp.asarray(y) for name, y in arrays(12).items()} | {"decay": jnp.full(H, -1e4, jnp.float32)}
    documents = document_numbers(jnp.asarray(segments_of(12)))
    run = lambda p: state_space(**p, documents=documents, chunk_size=4)  # noqa: E731
    gradients = jax.jit(jax.grad(lambda p: sum(map(jnp.sum, run(p)))))(parts)
    assert all(np.isfinite(y).all() for y in (*run(parts), *gradients.values()))


def test_a_document_may_begin_with_the_number_of_one_before_its_neighbor():
    numbers = document_numbers(jnp.asarray([[1, 1, 2, 1, 0, 0], [0, 0, 0, 0, 0, 0]]))
    np.testing.assert_array_equal(numbers, [[0, 0, 1, 2, 3, 3], [0] * 6])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_convolution_sees_the_last_positions_of_its_document_only(size):
    random, length, channels = np.random.default_rng(0), 15, 3
    x, before = random.normal(size=(2, length, channels)), random.normal(size=(2, size - 1, channels))
    kernel, bias = random.normal(size=(channels, size)), random.normal(size=channels)
    segments = segments_of(length)
    documents = np.asarray(document_numbers(jnp.asarray(segments)))
    want = np.broadcast_to(bias, x.shape).copy()
    for row, t, back in np.ndindex(2, length, size):
        if t - back >= 0:
            seen = documents[row, t - back] == documents[row, t]
            value = x[row, t - back]
        else:
            seen, value = documents[row, t] == 0, before[row, size - 1 + t - back]
        want[row, t] += seen * value * kernel[:, size - 1 - back]
    got = causal_convolution(*map(jnp.asarray, (x, kernel, bias, documents, before)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def mixer(**changes):
    """A hybrid's first mixer, with random weights."""
    config = dataclasses.replace(NEMOTRON_H, num_layers=1, layer_pattern="M", moe=MoEConfig())
    config = dataclasses.replace(config, mamba=dataclasses.replace(config.mamba, **changes))
    definition = model_definition(config)
    params, _ = random_arrays(definition)
    params = {name: y[0] if name.startswith("mamba_layers") else y for name, y in params.items()}
    made = Mamba2(config, rngs=nnx.Rngs(0))
    nnx.update(
        made,
        nnx.from_flat_state(
            [(tuple(name.split(".")[2:]), nnx.Param(y)) for name, y in params.items() if ".mamba." in name]
        ),
    )
    return made


@pytest.mark.parametrize("conv_kernel", [1, 4])
def test_a_text_taken_in_piece_by_piece_gives_what_it_gives_at_once(conv_kernel):
    mamba = mixer(conv_kernel=conv_kernel, time_step_min=0.3)
    length, width = 23, 6
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, length, NEMOTRON_H.hidden_size)), jnp.float32)
    memory, one = mamba.initial_state(2, x.dtype), jnp.zeros((2, width), jnp.int32)
    whole, end = mamba.continued(x, jnp.zeros((2, length), jnp.int32), jnp.ones((2, length), bool), memory)
    taken, outs = 0, []
    step = jax.jit(lambda x, present, memory: mamba.continued(x, one, present, memory))
    for count in (6, 1, 5, 6, 2, 3):  # each filled up with anything to the same width
        piece = jnp.full((2, width, x.shape[2]), 7.0).at[:, :count].set(x[:, taken : taken + count])
        present = jnp.broadcast_to(jnp.arange(width) < count, (2, width))
        out, memory = step(piece, present, memory)
        outs.append(out[:, :count])
        taken += count
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=1e-5)
    for got, want in zip(memory, end, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    unchanged = step(x[:, :width], jnp.zeros((2, width), bool), memory)[1]
    for got, want in zip(unchanged, memory, strict=True):
        np.testing.assert_array_equal(got, want)


def loss_and_gradients(policy: str):
    model = dataclasses.replace(NEMOTRON_H, remat=RematConfig(dense=policy, moe=policy))
    config, definition, batch = run_config(model), model_definition(model), packed_batch(rows=2)
    params, router_bias = random_arrays(definition)
    (value, measured), gradients = compiled(measured_and_gradients(config, definition, router_bias, batch), params)
    return value, measured, gradients


def test_recomputing_a_hybrids_activations_changes_no_loss_and_no_gradient():
    want, measured, gradients = loss_and_gradients("none")
    assert measured.loads["moe_layers.moe.router_bias"].value.shape == (2, 8)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    for policy in ("full", "named"):
        value, _, again = loss_and_gradients(policy)
        assert value == pytest.approx(float(want), rel=1e-6)
        for name, gradient in again.items():
            np.testing.assert_allclose(gradient, gradients[name], rtol=1e-4, atol=1e-6, err_msg=name)


def step_on(devices: int, **parallel):
    """Gradients and metrics of a training step on some devices."""
    config = run_config(NEMOTRON_H, optimizer=OptimizerConfig(warmup_steps=0, clip_norm=0.0))
    definition = model_definition(NEMOTRON_H)
    mesh = make_mesh(ParallelConfig(**{"fsdp": 1} | parallel), jax.devices()[:devices])
    params, router_bias = random_arrays(definition)
    rule = optax.GradientTransformation(lambda p: p, lambda grads, state, p: (jax.tree.map(jnp.zeros_like, p), grads))
    state = TrainState(jnp.int32(0), params, params, router_bias, new_health())
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(state, definition, mesh))
        step = jax.jit(make_train_step(config, definition, rule, pretraining(config)))
        state, output = step(state, put_batch(packed_batch(), mesh))
    return state.opt_state, output


def test_a_hybrid_learns_the_same_on_any_devices():
    want, output = step_on(1)
    got, same = step_on(8, data=2, fsdp=4)
    assert same.metrics["loss"] == pytest.approx(float(output.metrics["loss"]), rel=1e-5)
    for name, load in output.loads.items():
        np.testing.assert_array_equal(same.loads[name], load)
    for name, gradient in want.items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-3, atol=1e-5, err_msg=name)


def test_attention_without_rotation_sees_no_positions():
    attention = dataclasses.replace(NEMOTRON_H.attention, rotary_dim=0, rotated=False)
    model = random_model(dataclasses.replace(NEMOTRON_H, attention=attention))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, (1, 9)))
    run = jax.jit(lambda positions: model(tokens, jnp.ones_like(tokens), positions))
    np.testing.assert_array_equal(run(jnp.arange(9)[None]), run(jnp.arange(9)[None] * 7 + 3))


def test_a_hybrids_flops_grow_with_its_chunks_and_not_with_its_length():
    only = dataclasses.replace(NEMOTRON_H, num_layers=2, layer_pattern="MM", moe=MoEConfig())
    flops = [flops_per_token(only, length, backward=False).attention for length in (6, 600)]
    assert flops[0] == flops[1] == 2 * 2 * (6 * (3 * 5 + 6 * 4) + 2 * 6 * 4 * 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_pattern": "MX*-MEM"}, "model.layer_pattern = 'X': is the letter of no layer"),
        ({"layer_pattern": "ME*-M"}, "has 5 letters for model.num_layers = 7 layers"),
        ({"layer_pattern": "MM*-MMM"}, "Layers E and experts need each other"),
        ({"moe": MoEConfig()}, "Layers E and experts need each other"),
        ({"mtp": MTPConfig(depth=1)}, "model.mtp.depth = 1: must be 0 where layer_pattern is given"),
        ({"norm_placement": "both"}, "model.norm_placement = 'both': must be 'pre'"),
        ({"mamba": MambaConfig(num_heads=6, num_groups=4)}, "model.mamba.num_heads = 6: must be a multiple"),
        ({"mamba": MambaConfig(chunk_size=0)}, "model.mamba.chunk_size = 0: must be at least 1"),
    ],
)
def test_a_hybrid_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*").replace("(", r"\(")):
        dataclasses.replace(NEMOTRON_H, **changes)


@pytest.mark.parametrize("axis", ["stage", "context", "tensor", "expert"])
def test_a_hybrid_is_not_divided_where_a_state_needs_the_whole_row(axis):
    with pytest.raises(ConfigError, match=f"parallel.{axis} = 2"):
        run_config(NEMOTRON_H, parallel=ParallelConfig(**{axis: 2}))
    run_config(NEMOTRON_H, parallel=ParallelConfig(fsdp=2))


def test_a_hybrid_of_attention_and_feed_forwards_is_the_usual_decoder():
    usual = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_dense_layers=2,
        mlp_size=24,
        dtype="float32",
        attention=NEMOTRON_H.attention,
    )
    hybrid = dataclasses.replace(usual, num_layers=4, layer_pattern="*-*-")
    definition = model_definition(usual)
    params, _ = random_arrays(definition)
    renamed = {
        name.replace("dense_layers.attention_norm", "attention_layers.norm")
        .replace("dense_layers.attention.", "attention_layers.attention.")
        .replace("dense_layers.mlp_norm", "dense_layers.norm"): y
        for name, y in params.items()
    }
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, (2, 11)))
    want, got = (
        compiled(lambda model=m: model(tokens))
        for m in (definition.model(params, {}), model_definition(hybrid).model(renamed, {}))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
