"""Routing against a reference that goes token by token, as the reports write it."""

import dataclasses
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import compiled

from opendeep_jax.config.schema import MoEConfig
from opendeep_jax.ops.routing import SCORES, expert_counts, route, sequence_balance_loss, updated_bias

V3 = MoEConfig(
    num_experts=12, experts_per_token=3, num_groups=4, groups_per_token=2, routed_scaling_factor=2.5, expert_size=1
)
CASES = {
    "v3": V3,
    "ungrouped": dataclasses.replace(V3, num_groups=1, groups_per_token=1),
    "v2": dataclasses.replace(
        V3, scoring="softmax", group_score="max", normalize_weights=False, routed_scaling_factor=16.0
    ),
    "max of sigmoids": dataclasses.replace(V3, group_score="max"),
    "every expert": dataclasses.replace(V3, experts_per_token=12, groups_per_token=4),
}


def route_one(logits, bias, moe):
    """Weights by expert {expert: weight} of one token, with sorts and loops."""
    if moe.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits) / np.exp(logits).sum()
    biased = scores + bias
    size = moe.num_experts // moe.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(moe.num_groups)]

    def group_score(group):
        best = sorted((biased[e] for e in group), reverse=True)
        return best[0] + best[1] if moe.group_score == "top2_sum" else best[0]

    kept = sorted(groups, key=group_score, reverse=True)[: moe.groups_per_token]
    candidates = [expert for group in kept for expert in group]
    chosen = sorted(candidates, key=lambda e: biased[e], reverse=True)[: moe.experts_per_token]
    total = sum(scores[e] for e in chosen) if moe.normalize_weights else 1
    return {e: scores[e] / total * moe.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("biased", [True, False])
def test_choice_and_weights_are_those_of_the_reports(case, biased):
    moe, random = CASES[case], np.random.default_rng(1)
    logits = random.normal(size=(3, 5, 12)) * 2
    bias = random.normal(size=12) * biased
    weights, indices, scores = compiled(
        partial(route, moe=moe), jnp.float32(logits), jnp.float32(bias) if biased else None
    )
    assert weights.dtype == scores.dtype == jnp.float32 and scores.shape == (3, 5, 12)
    for at in np.ndindex(3, 5):
        want = route_one(logits[at], bias, moe)
        got = dict(zip(indices[at].tolist(), weights[at].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)


def test_every_score_that_a_configuration_can_name_has_its_function():
    assert set(get_args(get_type_hints(MoEConfig)["scoring"])) == SCORES.keys()


def test_the_bias_selects_and_does_not_weigh():
    moe = dataclasses.replace(CASES["ungrouped"], experts_per_token=2)
    logits = jnp.zeros((1, 1, 12)).at[0, 0, 0].set(2.0)
    weights, indices, _ = route(logits, jnp.zeros(12).at[7].set(5.0), moe)
    weight = dict(zip(indices[0, 0].tolist(), weights[0, 0].tolist(), strict=True))
    score = 1 / (1 + np.exp(-2.0))
    assert weight == pytest.approx({7: 2.5 * 0.5 / (score + 0.5), 0: 2.5 * score / (score + 0.5)})


def test_weights_carry_a_gradient_and_the_bias_none():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 12)), jnp.float32)
    by_logits, by_bias = compiled(
        jax.grad(lambda logits, bias: jnp.sum(route(logits, bias, V3)[0] ** 2), argnums=(0, 1)), logits, jnp.zeros(12)
    )
    assert np.abs(by_logits).max() > 1e-3 and not np.any(by_bias)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_no_token_uses_more_groups_than_it_may_keep_and_no_expert_twice(seed):
    random = np.random.default_rng(seed)
    logits, bias = random.normal(size=(2, 8, 12)) * 3, random.normal(size=12)
    weights, indices, _ = map(np.asarray, route(jnp.float32(logits), jnp.float32(bias), V3))
    for chosen in indices.reshape(-1, 3):
        assert len(set(chosen // 3)) <= V3.groups_per_token and len(set(chosen)) == 3
    np.testing.assert_allclose(weights.sum(-1), V3.routed_scaling_factor, rtol=1e-5)


def test_counts_leave_out_padding():
    indices = jnp.array([[[0, 1], [1, 2], [3, 0]], [[2, 3], [2, 3], [2, 3]]])
    valid = jnp.array([[True, True, False], [False, True, True]])
    counts = expert_counts(indices, valid, 5)
    assert counts.dtype == jnp.int32
    assert counts.tolist() == [[1, 2, 1, 0, 0], [0, 0, 2, 2, 0]]


def numpy_balance(scores, indices, valid):
    """Equations 17 to 20 of the V3 report for one row."""
    tokens, experts, chosen = valid.sum(), scores.shape[-1], indices.shape[-1]
    loss = 0.0
    for e in range(experts):
        fraction = experts / (chosen * tokens) * sum(e in indices[t] for t in range(len(valid)) if valid[t])
        share = sum(scores[t, e] / scores[t].sum() for t in range(len(valid)) if valid[t]) / tokens
        loss += fraction * share
    return loss


def test_the_balance_loss_is_the_reports_over_the_valid_tokens_of_each_row():
    random = np.random.default_rng(2)
    scores = random.uniform(size=(3, 7, 6)).astype(np.float32)
    indices = np.argsort(-scores, axis=-1)[..., :2]
    valid = np.arange(7) < np.array([[7], [4], [1]])
    counts = expert_counts(jnp.asarray(indices), jnp.asarray(valid), 6)
    loss = sequence_balance_loss(jnp.asarray(scores), counts, jnp.asarray(valid), 2)
    want = [numpy_balance(scores[b], indices[b], valid[b]) for b in range(3)]
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_the_balance_loss_is_1_in_balance_and_experts_over_chosen_at_worst():
    valid = jnp.ones((1, 8), bool)
    balanced = sequence_balance_loss(jnp.ones((1, 8, 4)), jnp.full((1, 4), 4), valid, 2)
    one_hot = jnp.zeros((1, 8, 4)).at[..., 0].set(1.0)
    worst = sequence_balance_loss(one_hot, jnp.array([[8, 0, 0, 0]]), valid, 1)
    np.testing.assert_allclose([balanced[0], worst[0]], [1.0, 4.0], rtol=1e-6)


def test_a_row_of_padding_has_no_balance_loss():
    none = jnp.zeros((1, 8), bool)
    assert sequence_balance_loss(jnp.ones((1, 8, 4)), jnp.zeros((1, 4), jnp.int32), none, 2).tolist() == [0.0]


def test_the_balance_loss_pushes_scores_of_crowded_experts_down():
    counts, valid = jnp.array([[8, 0]]), jnp.ones((1, 8), bool)
    slope = compiled(jax.grad(lambda scores: sequence_balance_loss(scores, counts, valid, 1)[0]), jnp.ones((1, 8, 2)))
    assert np.all(slope[..., 0] > 0) and np.all(slope[..., 1] < 0)


def test_biases_move_by_the_speed_against_the_load():
    bias = jnp.array([[0.5, 0.0, -0.25, 0.0]])
    moved = updated_bias(bias, jnp.array([[10, 2, 6, 6]]), 0.125)
    assert moved.tolist() == [[0.375, 0.125, -0.25, 0.0]]
    assert updated_bias(bias, jnp.array([[10, 2, 6, 6]]), 0.0).tolist() == bias.tolist()
