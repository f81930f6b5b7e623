"""One training step: the same on any devices and in any number of micro-batches, and what each number means."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import shapes_in
from small_models import DENSE, GQA, V3, packed_batch, random_arrays, run_config

from opendeep_jax.config.schema import (
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
    RampStage,
    TrainConfig,
)
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.train.objective import pretraining
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import TrainState, state_shardings
from opendeep_jax.train.step import make_train_step

MODEL = dataclasses.replace(V3, num_layers=2, num_dense_layers=0, mtp=MTPConfig(depth=1, loss_weight=0.3))
BATCH = packed_batch(rows=16, length=16, seed=5)


def gradients_as_state():
    """An update rule that changes nothing and keeps the gradients it was given as its state."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(params), grads))


def mesh_of(parallel: ParallelConfig, device_count: int):
    """The mesh of a configuration over the first devices."""
    return make_mesh(parallel, jax.devices()[:device_count])


@functools.cache
def program(config):
    """The model, the update rule and the jitted step of a configuration."""
    definition, rule = model_definition(config.model), gradients_as_state()
    return definition, rule, jax.jit(make_train_step(config, definition, rule, pretraining(config)))


def run_step(
    model=MODEL, batch=BATCH, devices=1, accumulation=1, clip_norm=0.0, z_loss_weight=0.01, execution=None, **parallel
):
    """One step from random parameters: (state before, state after with the gradients as opt_state, output)."""
    model = dataclasses.replace(model, execution=dataclasses.replace(model.execution, **execution or {}))
    config = run_config(
        model,
        optimizer=OptimizerConfig(warmup_steps=0, clip_norm=clip_norm),
        train=TrainConfig(
            steps=10, batch_size=16, loss_chunk=24, accumulation_steps=accumulation, z_loss_weight=z_loss_weight
        ),
    )
    definition, rule, step = program(config)
    params, router_bias = random_arrays(definition)
    mesh = mesh_of(ParallelConfig(**{"fsdp": 1} | parallel), devices)
    state = TrainState(jnp.int32(0), params, rule.init(params), router_bias, new_health())
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(state, definition, mesh))
        return state, *step(state, put_batch(batch, mesh))


@pytest.fixture(scope="module")
def reference():
    """The step on one device, the batch in one piece."""
    return run_step()


CUTS = {
    "2 micro-batches": {"accumulation": 2},
    "fsdp 8": {"devices": 8, "fsdp": 8},
    "data 2 x fsdp 4, 2 micro-batches": {"devices": 8, "data": 2, "fsdp": 4, "accumulation": 2},
    "expert 8, two parts": {"devices": 8, "expert": 8, "execution": {"batch_parts": 2}},
    "fsdp 2 x expert 4, small buffers": {"devices": 8, "fsdp": 2, "expert": 4, "execution": {"exchange_buffer": 0.3}},
    "fsdp 2 x context 4": {"devices": 8, "fsdp": 2, "context": 4},
}
SLOW_CUTS = {
    "data 8": {"devices": 8, "data": 8},
    "fsdp 4 x expert 2": {"devices": 8, "fsdp": 4, "expert": 2, "execution": {"expert_exchange": "gather"}},
}
"""Beside those of `test_layouts.py`."""


@functools.cache
def cut_step(cut: str):
    """The step with its batch cut over devices or micro-batches."""
    return run_step(**(CUTS | SLOW_CUTS)[cut])


def check_cut(cut, reference):
    """Compare a cut's step with the reference's."""
    (_, whole, (whole_metrics, _, whole_loads, _)), (_, parts, (metrics, _, loads, _)) = reference, cut_step(cut)
    assert metrics.keys() == whole_metrics.keys()
    for name in metrics.keys() - {"grad_norm"}:
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["grad_norm"], whole_metrics["grad_norm"], rtol=1e-4)
    for name, grad in whole.opt_state.items():
        scale = np.abs(grad).max()
        np.testing.assert_allclose(parts.opt_state[name], grad, rtol=1e-4, atol=1e-4 * scale, err_msg=name)

    jax.tree.map(np.testing.assert_array_equal, loads, whole_loads)
    jax.tree.map(np.testing.assert_array_equal, parts.router_bias, whole.router_bias)


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_batch_has_the_loss_and_gradients_of_the_whole_one(cut, reference):
    """To rounding; its loads and router biases exactly."""
    check_cut(cut, reference)


@pytest.mark.slow
@pytest.mark.parametrize("cut", SLOW_CUTS)
def test_other_cuts_have_the_loss_and_gradients_of_the_whole_batch(cut, reference):
    check_cut(cut, reference)


def test_a_stage_of_the_ramp_is_cut_into_its_own_micro_batches():
    ramp = (RampStage(8, 100, accumulation_steps=2), RampStage(12, 100))
    train = TrainConfig(steps=10, batch_size=16, accumulation_steps=4, batch_ramp=ramp)
    config = run_config(dataclasses.replace(DENSE, num_layers=1), train=train)
    mesh = mesh_of(ParallelConfig(), 1)
    with jax.set_mesh(mesh):
        programs = assemble(config, mesh).programs
        for rows, micros in ((8, 2), (12, 4), (16, 4)):
            shapes = set(shapes_in(programs.trace(rows, 16).jaxpr))
            assert (micros, rows // micros, 16) in shapes


def test_a_step_in_bfloat16_stays_close_to_one_in_float32(reference):
    """Also on a CPU, whose XLA lacks some of the products that a backward pass has in bfloat16."""
    _, exact, (exact_metrics, *_) = reference
    _, rounded, (metrics, *_) = run_step(dataclasses.replace(MODEL, dtype="bfloat16"))
    np.testing.assert_allclose(metrics["lm_loss"], exact_metrics["lm_loss"], rtol=5e-3)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.opt_state)]) for s in (exact, rounded)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine > 0.99


def test_weights_and_optimizer_state_stay_divided_over_the_fsdp_axis():
    before, after, _ = cut_step("fsdp 8")
    for state in (before, after):
        for arrays in (state.params, state.opt_state):
            assert arrays["moe_layers.moe.gate"].sharding.shard_shape((2, 8, 16, 8)) == (2, 8, 2, 8)
            assert arrays["embedding.embedding"].sharding.shard_shape((64, 16)) == (64, 2)
    # What cannot be divided is whole everywhere, and that is little.
    whole = sum(x.size for x in before.params.values() if x.sharding.is_fully_replicated)
    assert whole < 0.1 * sum(x.size for x in before.params.values())


def test_the_first_state_is_made_in_its_place_and_is_the_same_on_any_mesh():
    config = run_config(dataclasses.replace(GQA, num_layers=1, num_dense_layers=0))
    one, eight = (assemble(config, mesh_of(ParallelConfig(), count)).first_state() for count in (1, 8))
    assert jax.tree.structure(one) == jax.tree.structure(eight)
    for name, value in one.params.items():
        np.testing.assert_array_equal(value, eight.params[name], err_msg=name)
    gate = eight.params["moe_layers.moe.gate"]
    assert gate.sharding.shard_shape(gate.shape) == (1, 8, 2, 8)
    placed = [leaf for leaf in jax.tree.leaves(eight.opt_state) if leaf.shape == gate.shape]
    assert placed and all(leaf.sharding == gate.sharding for leaf in placed)


# ---- what the numbers mean


def masked_mean(logits, targets, mask):
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    return each[mask].mean()


def test_losses_are_means_over_all_valid_targets_and_add_up(reference):
    before, _, (metrics, *_) = reference
    definition = model_definition(MODEL)

    @jax.jit
    def logits(params, router_bias, batch):
        model = definition.model(params, router_bias)
        out = model.forward(batch.tokens, batch.segment_ids, batch.positions, [batch.targets])
        return [hidden @ model.head_kernel() for hidden in (out.hidden, *out.mtp_hidden)]

    main, mtp = logits(before.params, before.router_bias, BATCH)
    lm_loss = masked_mean(main, BATCH.targets, BATCH.loss_mask)
    further = np.roll(BATCH.targets, -1, axis=1)
    mask = BATCH.loss_mask & np.roll(BATCH.loss_mask, -1, axis=1)
    mask[:, -1] = False
    mtp_loss = masked_mean(mtp, further, mask)
    z_loss = 0.01 * (np.asarray(jax.nn.logsumexp(main, axis=-1))[BATCH.loss_mask] ** 2).mean()
    mtp_z_loss = 0.01 * (np.asarray(jax.nn.logsumexp(mtp, axis=-1))[mask] ** 2).mean()
    np.testing.assert_allclose(metrics["lm_loss"], lm_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["mtp_loss"], mtp_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"], z_loss, rtol=1e-4)
    total = lm_loss + z_loss + 0.3 * (mtp_loss + mtp_z_loss) + 1e-2 * metrics["balance_loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_loads_count_every_valid_tokens_choices_and_biases_move_against_them(reference):
    before, after, output = reference
    valid = int((BATCH.segment_ids > 0).sum())
    for name, load in output.loads.items():
        load = np.asarray(load)
        assert load.dtype == np.int32 and (load.sum(-1) == valid * V3.moe.experts_per_token).all()
        moved = after.router_bias[name] - before.router_bias[name]
        want = 1e-3 * np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(moved, want, atol=1e-7)
    assert set(output.loads) == set(after.router_bias) == {"moe_layers.moe.router_bias", "mtp.0.block.moe.router_bias"}


def test_what_stands_in_padding_changes_nothing(reference):
    _, whole, (whole_metrics, _, whole_loads, _) = reference
    padding, noise = BATCH.segment_ids == 0, packed_batch(rows=16, seed=9)
    assert padding.any()
    batch = dataclasses.replace(
        BATCH,
        tokens=np.where(padding, noise.targets, BATCH.tokens),
        targets=np.where(padding, noise.targets, BATCH.targets),
    )
    _, state, (metrics, _, loads, _) = run_step(batch=batch)
    np.testing.assert_allclose(metrics["lm_loss"], whole_metrics["lm_loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["balance_loss"], whole_metrics["balance_loss"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, loads, whole_loads)


def test_gradients_are_cut_to_the_clip_norm_and_smaller_ones_left_alone():
    model = dataclasses.replace(DENSE, num_layers=1)
    norms = []
    for clip in (1000.0, 0.05):
        _, state, (metrics, *_) = run_step(model, clip_norm=clip)
        norms.append((float(metrics["grad_norm"]), float(optax.global_norm(state.opt_state))))
    (reported, plain), (reported_again, cut) = norms
    assert plain > 0.05 and cut == pytest.approx(0.05, rel=1e-5)
    assert (reported, reported_again) == pytest.approx((plain, plain), rel=1e-5)
