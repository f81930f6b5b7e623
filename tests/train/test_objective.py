"""What a step minimizes is an argument: any loss over a batch's extras, on any devices, beside frozen weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import DENSE, V3, packed_batch, random_arrays, run_config

from kernels_pallas.cross_entropy import token_logprobs
from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import CheckpointConfig, OptimizerConfig, ParallelConfig, TrainConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.parallel.shares import Sum
from opendeep_jax.train.objective import Objective, make_inputs, pretraining, summed_cross_entropy, target_counts
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import BASE, state_shardings

MODEL = dataclasses.replace(V3, num_layers=2, num_dense_layers=0)
ROWS, LENGTH = 8, 16
WEIGHTS = np.random.default_rng(3).uniform(0, 2, (ROWS, LENGTH)).astype(np.float32)
PLAIN = packed_batch(ROWS, LENGTH, seed=5)
BATCH = dataclasses.replace(PLAIN, extras={"weights": WEIGHTS, "parts": np.stack([WEIGHTS, -WEIGHTS], axis=-1)})


def weighted_next_token() -> Objective:
    """The mean over targets of a weighted cross-entropy, in ten lines, and a number of extras of several values."""

    def normalizers(batch):
        return jnp.sum(batch.extras["weights"] * batch.loss_mask)

    def loss(hidden, *, head, batch, normalizers, **_):
        logprobs, _ = token_logprobs(hidden, head, batch.targets, mask=batch.loss_mask)
        share = -jnp.sum(logprobs * batch.extras["weights"]) / normalizers
        parts = jnp.sum(batch.extras["parts"] * jnp.array([3.0, 2.0])) / normalizers  # [B, L, 2]
        return share, {"weighted_loss": Sum(share), "parts": Sum(parts)}

    extras = {"weights": "float32", "parts": ("float32", 2)}
    return Objective(loss, normalizers, extras, judged="weighted_loss")


def run_of(model=MODEL, micros=1, **parallel):
    train = TrainConfig(steps=10, batch_size=ROWS, loss_chunk=24, accumulation_steps=micros, compilation_cache="")
    optimizer = OptimizerConfig(warmup_steps=0, clip_norm=0.0)
    parallel = ParallelConfig(**{"fsdp": 1} | parallel)
    return run_config(model, LENGTH, ROWS, train=train, optimizer=optimizer, parallel=parallel)


def kept_gradients(config, axes):
    """An update rule that changes nothing and keeps its gradients as its state."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(params), grads))


def step_of(config, batch, devices=1, objective=None, frozen=()):
    """A compiled step from random weights on a batch: (setup, state before, state after, output)."""
    mesh = make_mesh(config.parallel, jax.devices()[:devices])
    definition = model_definition(config.model)
    params, router_bias = random_arrays(definition)
    with jax.set_mesh(mesh):
        state = assemble(config, mesh, objective).template
        state = state._replace(step=jnp.int32(0), params=params, router_bias=router_bias, health=new_health())
        placed = jax.device_put(params, state_shardings(state, definition, mesh).params)
        base = {name: placed[name] for name in frozen}
        setup = assemble(config, mesh, objective, {BASE: base} if base else None)
        trained = {name: array for name, array in params.items() if name not in base}
        state = state._replace(params=trained, opt_state=setup.optimizer.init(trained))
        shardings = jax.tree.map(lambda x: x.sharding, setup.template._replace(frozen={}))
        state = jax.device_put(state, shardings)._replace(frozen=setup.template.frozen)
        before = jax.device_get(state)
        after, output = setup.programs.of(ROWS, LENGTH)(state, put_batch(batch, mesh))
    return setup, before, after, output


@pytest.fixture(scope="module")
def rule():
    """Steps keep their gradients in place of an optimizer's state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opendeep_jax.train.setup.make_optimizer", kept_gradients)
        yield


@pytest.fixture(scope="module")
def weighted(rule):
    """The objective's step on one device."""
    return step_of(run_of(), BATCH, objective=weighted_next_token())


def logprobs_of(before, batch, model):
    """Log-probabilities of a batch's targets, by all logits at once."""
    arrays = before.params, before.router_bias
    logits = jax.jit(
        lambda *arrays: model_definition(model).model(*arrays)(batch.tokens, batch.segment_ids, batch.positions)
    )
    logits = np.asarray(logits(*arrays), np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]


def test_an_objective_over_extras_is_what_numpy_makes_of_it(weighted):
    _, before, _, output = weighted
    each = -logprobs_of(before, BATCH, MODEL) * BATCH.loss_mask
    want = (each * WEIGHTS).sum() / (WEIGHTS * BATCH.loss_mask).sum()
    assert float(output.metrics["weighted_loss"]) == pytest.approx(want, rel=1e-5)
    balance = MODEL.moe.balance_loss_weight * output.metrics["balance_loss"]
    assert float(output.metrics["loss"]) == pytest.approx(want + float(balance), rel=1e-5)
    assert float(output.check.loss) == float(output.metrics["weighted_loss"])
    assert float(output.metrics["parts"]) == pytest.approx(WEIGHTS.sum() / (WEIGHTS * BATCH.loss_mask).sum(), rel=1e-5)
    assert set(output.metrics) == {"loss", "weighted_loss", "parts", "balance_loss", "grad_norm", "learning_rate"}


@pytest.mark.parametrize(
    "micros, parallel",
    [(2, {"fsdp": 2, "context": 2, "expert": 2}), (2, {"stage": 2, "fsdp": 2, "expert": 2})],
    ids=["context", "stage"],
)
def test_an_objective_is_the_same_however_the_batch_is_cut(micros, parallel, weighted):
    _, _, whole, want = weighted
    _, _, cut, output = step_of(run_of(micros=micros, **parallel), BATCH, 8, weighted_next_token())
    for name, value in want.metrics.items():
        np.testing.assert_allclose(output.metrics[name], value, rtol=1e-4, err_msg=name)
    for name, grad in whole.opt_state.items():
        np.testing.assert_allclose(cut.opt_state[name], grad, atol=1e-4 * max(np.abs(grad).max(), 1e-6), err_msg=name)


def test_modules_that_an_objective_does_not_run_get_no_gradient_and_keep_their_router_bias(weighted):
    _, before, after, output = weighted
    assert set(output.loads) == {"moe_layers.moe.router_bias"}
    for name, grad in after.opt_state.items():
        assert np.any(grad) != name.startswith("mtp."), name
    name = "mtp.0.block.moe.router_bias"
    np.testing.assert_array_equal(after.router_bias[name], before.router_bias[name])


def test_pretraining_weighs_targets_and_weights_of_one_change_nothing(rule):
    config = run_of(V3)
    _, _, plain, want = step_of(config, PLAIN)
    ones = dataclasses.replace(PLAIN, weights=np.ones_like(WEIGHTS))
    _, before, same, output = step_of(config, ones, objective=pretraining(config, weighted=True))
    for name, value in want.metrics.items():
        np.testing.assert_allclose(output.metrics[name], value, rtol=1e-5, err_msg=name)
    for name, grad in plain.opt_state.items():
        np.testing.assert_allclose(same.opt_state[name], grad, rtol=0, atol=1e-5 * np.abs(grad).max(), err_msg=name)
    half = dataclasses.replace(PLAIN, weights=WEIGHTS)
    *_, output = step_of(config, half, objective=pretraining(config, weighted=True))
    each = -logprobs_of(before, PLAIN, V3) * PLAIN.loss_mask * WEIGHTS
    assert float(output.metrics["lm_loss"]) == pytest.approx(each.sum() / (WEIGHTS * PLAIN.loss_mask).sum(), rel=1e-5)


def test_an_mtp_target_has_the_weight_of_its_token():
    batch = dataclasses.replace(PLAIN, weights=WEIGHTS)
    (module,) = make_inputs(batch, 1, jax.sharding.get_abstract_mesh()).mtp
    rows, places = np.nonzero(module.loss_mask)
    np.testing.assert_array_equal(module.targets[rows, places], PLAIN.targets[rows, places + 1])
    np.testing.assert_array_equal(module.weights[rows, places], WEIGHTS[rows, places + 1])
    (count,) = target_counts(batch, 1).mtp_targets
    assert float(count) == pytest.approx(WEIGHTS[rows, places + 1].sum(), rel=1e-5)


def test_weights_of_one_leave_a_soft_capped_loss_as_it_is():
    config = run_of(dataclasses.replace(MODEL, logit_softcap=2.0))
    random = np.random.default_rng(1)
    hidden = random.normal(size=(*PLAIN.targets.shape, 8)).astype(np.float32)
    head = random.normal(size=(8, MODEL.vocab_size)).astype(np.float32)
    given = config, hidden, head, PLAIN.targets, PLAIN.loss_mask
    plain, _ = summed_cross_entropy(*given)
    weighted, _ = summed_cross_entropy(*given, weights=np.ones_like(WEIGHTS))
    assert float(weighted) == pytest.approx(float(plain), rel=1e-5)


def test_weights_with_a_z_loss_are_refused():
    config = dataclasses.replace(run_of(), train=dataclasses.replace(run_of().train, z_loss_weight=0.1))
    with pytest.raises(ConfigError, match=r"train.z_loss_weight = 0.1: must be 0.*--train.z_loss_weight=0"):
        pretraining(config, weighted=True)


# ---- frozen weights


FROZEN = ("embedding.embedding", "moe_layers.moe.gate")
REST = {"context": {"fsdp": 2, "context": 2, "expert": 2}, "stage": {"stage": 2, "fsdp": 2, "expert": 2}}


@pytest.mark.parametrize("axis", REST)
def test_frozen_weights_of_the_model_are_computed_with_and_never_touched(axis, weighted):
    _, _, whole, want = weighted
    config = run_of(micros=2, **REST[axis])
    setup, before, after, output = step_of(config, BATCH, 8, weighted_next_token(), FROZEN)
    assert set(before.frozen[BASE]) == set(FROZEN) == set(whole.params) - set(after.params)
    assert set(after.opt_state) == set(after.params)
    assert after.frozen is setup.template.frozen and not any(x.is_deleted() for x in after.frozen[BASE].values())
    assert float(output.metrics["loss"]) == pytest.approx(float(want.metrics["loss"]), rel=1e-4)
    for name in after.params:
        grad = whole.opt_state[name]
        np.testing.assert_allclose(after.opt_state[name], grad, atol=1e-4 * max(np.abs(grad).max(), 1e-6), err_msg=name)


def test_a_checkpoint_holds_frozen_weights_by_their_digests_alone(tmp_path, rule):
    config = run_of(DENSE)
    setup, _, state, _ = step_of(config, PLAIN, frozen=("embedding.embedding",))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        record = checkpoints.directory / "1" / "digests" / "metadata"
        assert '"base.embedding.embedding"' in record.read_text()
        restored, notes = checkpoints.restore(setup.template)
        assert not notes and restored.frozen is setup.template.frozen
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    other = {BASE: {"embedding.embedding": state.frozen[BASE]["embedding.embedding"] + 1}}
    for frozen in (other, {}):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match="other frozen weights: base.embed"):
            checkpoints.restore(setup.template._replace(frozen=frozen))


def test_the_first_state_has_no_masters_and_no_moments_of_frozen_weights():
    config = run_of(DENSE)
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    whole = assemble(config, mesh).first_state()
    frozen = {BASE: {"embedding.embedding": whole.params["embedding.embedding"]}}
    state = assemble(config, mesh, frozen=frozen).first_state()
    assert set(whole.params) - set(state.params) == {"embedding.embedding"} and state.frozen is frozen
    moments = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert moments and not any("embedding.embedding" in name for name in moments)
    for name, value in state.params.items():
        np.testing.assert_array_equal(value, whole.params[name])


def test_another_model_for_the_objective_is_refused_in_a_pipeline_and_read_without():
    def loss(hidden, *, head, batch, normalizers, frozen, **_):
        theirs = model_definition(DENSE).model(frozen["reference"], {})
        other = theirs.forward(batch.tokens, batch.segment_ids, batch.positions).hidden
        share = jnp.sum((hidden - other) ** 2 * batch.loss_mask[..., None]) / normalizers
        return share, {"distance": Sum(share)}

    objective = Objective(loss, lambda batch: jnp.sum(batch.loss_mask), judged=None)
    params, _ = random_arrays(model_definition(DENSE))

    def traced(config, devices):
        mesh = make_mesh(config.parallel, jax.devices()[:devices])
        shapes = assemble(config, mesh).template.params
        with jax.set_mesh(mesh):
            return assemble(config, mesh, objective, {"reference": shapes}).programs.trace(ROWS, LENGTH)

    assert "distance" in traced(run_of(DENSE, fsdp=2), 2).out_info[1].metrics
    with pytest.raises(ConfigError, match="no place for the other model 'reference'.*--parallel.stage=1"):
        traced(run_of(DENSE, micros=2, stage=2), 2)
