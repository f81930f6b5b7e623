"""The decoder's promises: causality, packed documents, MTP, remat, and compile time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxprs import matmul_flops
from small_models import (
    FAMILIES,
    GQA,
    V3,
    compiled,
    measured_and_gradients,
    packed_batch,
    random_arrays,
    random_model,
    run_config,
)

from opendeep_jax.config.schema import MTPConfig, RematConfig, RopeConfig
from opendeep_jax.models.decoder import Decoder, shift_left
from opendeep_jax.models.parameters import model_definition, split
from opendeep_jax.train.objective import make_inputs, mtp_masks

LENGTH = 16


@pytest.fixture(scope="module")
def logits_of():
    """A function (family, tokens, segment_ids, positions) to logits; each family is compiled once."""
    functions = {}

    def logits_of(family, *arguments):
        if family not in functions:
            definition = model_definition(FAMILIES[family])
            arrays = random_arrays(definition)
            forward = jax.jit(lambda p, b, *x: definition.model(p, b)(*x))
            functions[family] = lambda *x: forward(*arrays, *x)
        return np.asarray(functions[family](*arguments))

    return logits_of


def random_tokens(rows=2, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(1, V3.vocab_size, (rows, length), dtype=np.int32)


def one_document(tokens):
    """The tokens, and the segment ids and positions of rows that are one document each."""
    return tokens, np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_never_changes_earlier_logits(family, logits_of):
    tokens = random_tokens()
    changed = tokens.copy()
    changed[:, 10:] = random_tokens(seed=1)[:, 10:]
    before, after = logits_of(family, *one_document(tokens)), logits_of(family, *one_document(changed))
    assert before.shape == (2, LENGTH, V3.vocab_size) and before.dtype == np.float32
    np.testing.assert_allclose(after[:, :10], before[:, :10], atol=1e-5)
    assert np.abs(after[:, 10:] - before[:, 10:]).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_packed_in_a_row_have_the_logits_that_each_has_alone(family, logits_of):
    first, second = random_tokens(2, LENGTH, seed=2)
    packed = np.concatenate([first[:9], second[:5], [0, 0]]).astype(np.int32)
    segment_ids = np.array([1] * 9 + [2] * 5 + [0] * 2, np.int32)
    positions = np.concatenate([np.arange(9), np.arange(5), [0, 0]]).astype(np.int32)
    together = logits_of(family, *(np.stack([x, x]) for x in (packed, segment_ids, positions)))[0]
    alone = logits_of(family, *one_document(np.stack([first, second])))
    np.testing.assert_allclose(together[:9], alone[0, :9], atol=1e-5)
    np.testing.assert_allclose(together[9:14], alone[1, :5], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_matter(family, logits_of):
    tokens, segment_ids, positions = one_document(random_tokens())
    shuffled = positions[:, ::-1]
    difference = logits_of(family, tokens, segment_ids, positions) - logits_of(family, tokens, segment_ids, shuffled)
    assert np.abs(difference).max() > 1e-2


def test_a_call_without_segments_takes_each_row_as_one_document():
    model = random_model(V3)
    tokens = random_tokens()
    without, given = (compiled(lambda *x: model(*x), *x) for x in ([tokens], one_document(tokens)))
    np.testing.assert_allclose(without, given, atol=1e-6)


def test_initial_weights_are_normal_of_the_configured_size_and_differ_between_layers():
    config = dataclasses.replace(V3, hidden_size=64, init_std=0.03)
    make = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(3)))[1:])
    params, router_bias = jax.device_get(make())
    for name, value in params.items():
        assert value.dtype == np.float32
        if name.endswith("scale"):
            assert (value == 1).all(), name
        elif value.size > 1000:
            assert value.std() == pytest.approx(0.03, rel=0.15), name
    gates = params["moe_layers.moe.gate"].reshape(-1, 64 * 8)
    assert len(np.unique(gates[:, 0])) == len(gates)  # no two layers or experts alike
    assert not any(bias.any() for bias in router_bias.values())


# ---- multi-token prediction

TWO_MODULES = dataclasses.replace(V3, mtp=MTPConfig(depth=2))


@pytest.fixture(scope="module")
def mtp_hidden():
    """A function of a Batch to each MTP module's output [2, B, L, D]."""
    definition = model_definition(TWO_MODULES)
    arrays = random_arrays(definition)

    def forward(params, router_bias, batch):
        model = definition.model(params, router_bias)
        following = [batch.targets, shift_left(batch.targets, 1)]
        return jnp.stack(model.forward(batch.tokens, batch.segment_ids, batch.positions, following).mtp_hidden)

    forward = jax.jit(forward)
    return lambda batch: np.asarray(forward(*arrays, batch))


def test_mtp_targets_lie_in_the_document_of_their_position():
    batch = packed_batch(rows=4)
    for k, mask in enumerate(mtp_masks(jnp.asarray(batch.loss_mask), 2), start=1):
        for row, place in np.ndindex(*batch.tokens.shape):
            # The target of module k is the token k + 1 after the position.
            end = place + k + 1
            segments = batch.segment_ids[row, place : end + 1]
            inside = len(segments) == k + 2 and segments[0] > 0 and (segments == segments[0]).all()
            assert bool(mask[row, place]) == inside, (k, row, place)


def test_a_mtp_module_is_given_the_token_before_its_target():
    batch = jax.tree.map(jnp.asarray, packed_batch(rows=2))
    for k, module in enumerate(make_inputs(batch, 2, jax.sharding.get_abstract_mesh()).mtp, start=1):
        length = batch.tokens.shape[1] - k
        np.testing.assert_array_equal(module.tokens[:, : length + 1], batch.targets[:, k - 1 :])
        np.testing.assert_array_equal(module.targets[:, :length], batch.targets[:, k:])


def test_mtp_outputs_with_a_target_see_nothing_of_other_documents(mtp_hidden):
    batch = packed_batch(rows=4, seed=3)
    other = packed_batch(rows=4, seed=4)
    in_second = batch.segment_ids >= 2
    tokens = np.where(in_second, other.tokens + 1, batch.tokens) % V3.vocab_size
    # A target is the next position's token: those that lie in the changed documents change too.
    shifted = np.pad(in_second, ((0, 0), (0, 1)))[:, 1:]
    targets = np.where(shifted, np.pad(tokens, ((0, 0), (0, 1)))[:, 1:], batch.targets)
    changed = dataclasses.replace(batch, tokens=tokens, targets=targets)
    before, after = mtp_hidden(batch), mtp_hidden(changed)
    seen = 0
    for k, mask in enumerate(mtp_masks(jnp.asarray(batch.loss_mask), 2)):
        first = np.asarray(mask) & (batch.segment_ids == 1)
        np.testing.assert_allclose(after[k][first], before[k][first], atol=1e-5)
        seen += first.sum()
    assert seen > 4 and np.abs(after - before).max() > 1e-2


def test_a_mtp_module_reads_the_next_token_and_none_after_it(mtp_hidden):
    tokens, segment_ids, positions = one_document(random_tokens(1))
    batch = dataclasses.replace(packed_batch(rows=1), tokens=tokens, segment_ids=segment_ids, positions=positions)
    targets = np.roll(tokens, -1, axis=1)
    changed = targets.copy()
    changed[0, 9] += 1  # the token after position 9, as it is embedded; the main model doesn't see it here
    before, after = (mtp_hidden(dataclasses.replace(batch, targets=t)) for t in (targets, changed % V3.vocab_size))
    moved = np.abs(after - before).max(axis=(1, 3)) > 1e-4
    assert not moved[0, :9].any() and moved[0, 9]  # module 1 embeds the token 1 further on
    assert not moved[1, :8].any() and moved[1, 8]  # module 2 the one 2 further on


# ---- rematerialization and compilation


def loss_and_gradients(model_config):
    """A function of params, and its arguments: the loss of a batch, as the training step computes it."""
    config = run_config(model_config)
    definition = model_definition(model_config)
    params, router_bias = random_arrays(definition)
    of_params = measured_and_gradients(config, definition, router_bias, packed_batch(rows=2))

    def loss(params):
        (value, _), gradients = of_params(params)
        return value, gradients

    return loss, params


def with_remat(policy, **names):
    """A stacked MoE layer and a MTP module under a policy."""
    remat = RematConfig(dense=policy, moe=policy, **names)
    return dataclasses.replace(V3, num_layers=1, num_dense_layers=0, remat=remat)


@pytest.fixture(scope="module")
def without_remat():
    function, params = loss_and_gradients(with_remat("none"))
    return compiled(function, params)


@pytest.mark.parametrize("policy", ["full", "named"])
def test_recomputing_activations_changes_no_loss_and_no_gradient(policy, without_remat):
    function, params = loss_and_gradients(with_remat(policy))
    loss, grads = compiled(function, params)
    assert loss == pytest.approx(float(without_remat[0]), rel=1e-6)
    assert grads.keys() == without_remat[1].keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, without_remat[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_full_remat_recomputes_the_matmuls_that_named_saves():
    none, named, nothing_named, full = (
        matmul_flops(jax.make_jaxpr(function)(params))
        for function, params in map(
            loss_and_gradients,
            (with_remat("none"), with_remat("named"), with_remat("named", names=()), with_remat("full")),
        )
    )
    assert none <= named < full
    assert nothing_named == full


@pytest.mark.parametrize("config", [V3, GQA], ids=["v3", "gqa"])
def test_the_program_does_not_grow_with_depth(config):
    def operations(layers):
        function, params = loss_and_gradients(dataclasses.replace(config, num_layers=layers))
        return jax.jit(function).lower(params).as_text().count("\n")

    assert operations(3) == operations(9)


def test_yarn_stretches_the_context_of_the_same_weights():
    rope = RopeConfig(yarn_factor=8.0, yarn_original_length=8)
    stretched = dataclasses.replace(V3, attention=dataclasses.replace(V3.attention, rope=rope))
    tokens = random_tokens(1)
    plain, longer = (compiled(lambda model: model(tokens), random_model(config)) for config in (V3, stretched))
    assert np.abs(plain - longer).max() > 1e-3
