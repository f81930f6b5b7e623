"""Sizes and FLOPs from the configuration alone agree with the model that is built."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxprs import matmul_flops
from small_models import DENSE, FAMILIES, GQA, NEMOTRON_H, OLMO, V2, V3, dense_attention

from kernels_pallas.cross_entropy import fused_cross_entropy
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schema import ExecutionConfig, MTPConfig, RematConfig
from opendeep_jax.models import attention
from opendeep_jax.models.accounting import count_parameters, flops_per_token
from opendeep_jax.models.parameters import model_definition

MORE = {
    "v3 with two MTP modules": dataclasses.replace(V3, mtp=MTPConfig(depth=2)),
    "v3 without q compression": dataclasses.replace(V3, attention=dataclasses.replace(V3.attention, q_lora_rank=0)),
    "all layers MoE": dataclasses.replace(V2, num_dense_layers=0),
    "no shared experts": dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, num_shared_experts=0)),
    # In one chunk nothing is computed twice; small states, as none comes before the first chunk and none is used after.
    "nemotron-h in one chunk": dataclasses.replace(
        NEMOTRON_H, mamba=dataclasses.replace(NEMOTRON_H.mamba, chunk_size=32, state_size=2)
    ),
    "tied MoE": dataclasses.replace(GQA, tie_embeddings=True),
    "dense, untied, with MTP": dataclasses.replace(DENSE, tie_embeddings=False, mtp=MTPConfig(depth=1)),
}


def built_sizes(config):
    """(main model, MTP modules) parameters of the built model; no array is made."""
    sizes = {name: math.prod(shape.shape) for name, shape in model_definition(config).shapes(nnx.Param).items()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    return sum(sizes.values()) - mtp, mtp


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_parameters_are_those_of_the_built_model(name):
    config = (FAMILIES | MORE)[name]
    count = count_parameters(config)
    assert (count.total, count.mtp) == built_sizes(config)
    unused = config.moe.num_experts - config.moe.experts_per_token if config.moe.num_experts else 0
    expert = (3 if config.gated_mlp else 2) * config.hidden_size * config.moe.expert_size
    if config.moe.expert_bias:
        expert += 2 * config.moe.expert_size + config.hidden_size
    assert count.total - count.active == config.num_moe_layers * unused * expert


@pytest.mark.parametrize(
    "recipe, total, active",
    [("deepseek_v3", 671.03e9, 37.55e9), ("deepseek_v2_lite", 15.71e9, 2.66e9), ("moe_1b", None, None)],
)
def test_recipes_have_the_published_sizes(recipe, total, active):
    config = load_recipe(recipe).model
    count = count_parameters(config)
    assert (count.total, count.mtp) == built_sizes(config)
    if total:
        assert count.total == pytest.approx(total, abs=5e6)
        assert count.active == pytest.approx(active, abs=5e6)


def test_benchmark_model_has_the_size_that_the_issue_states():
    config = dataclasses.replace(
        V3,
        vocab_size=8192,
        hidden_size=256,
        num_layers=4,
        mlp_size=1024,
        attention=dataclasses.replace(
            V3.attention,
            num_heads=8,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
        moe=dataclasses.replace(V3.moe, num_experts=16, experts_per_token=4, expert_size=256),
        mtp=MTPConfig(),
    )
    assert count_parameters(config).total == 15_825_920


ROWS, LENGTH = 2, 32


def counted_flops(config, backward: bool) -> float:
    """FLOPs per token of all matmuls in the jaxpr of the loss (and its gradient), MTP modules included."""
    definition = model_definition(config)
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)

    def loss(params, router_bias):
        model = definition.model(params, router_bias)
        out = model.forward(tokens, mtp_tokens=[tokens] * config.mtp.depth)
        head, mask = model.head_kernel(), tokens == 0
        # One chunk: a length that no chunk divides is padded, and padding is no work of the model.
        outputs = (out.hidden, *out.mtp_hidden)
        flat = [x.reshape(ROWS * LENGTH, -1) for x in outputs]
        tokens_and_mask = tokens.reshape(-1), mask.reshape(-1)
        return sum(fused_cross_entropy(x, head, *tokens_and_mask, chunk=ROWS * LENGTH)[0] for x in flat)

    shapes = definition.shapes(nnx.Param), {n: s for n, s in definition.shapes().items() if n.endswith("router_bias")}
    return matmul_flops(jax.make_jaxpr(jax.grad(loss) if backward else loss)(*shapes)) / (ROWS * LENGTH)


def counts_alone(family: str) -> bool:
    """Whether all of a family's matmuls are work of the model: no masked scores, no states computed twice."""
    config = FAMILIES[family]
    a = config.attention
    return not (a.sliding_layers or a.sinks or a.logit_softcap or "M" in config.layer_pattern)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    "name",
    [*filter(counts_alone, FAMILIES), "v3 with two MTP modules", "dense, untied, with MTP", "nemotron-h in one chunk"],
)
def test_flops_are_those_that_the_jaxpr_counts(name, backward, monkeypatch):
    # What is computed twice to save memory is no work of the model: no remat, and attention as autodiff has it.
    # XLA's own ragged matmul is one operation, whose work can be read off its shapes.
    def dense(query, key, value, query_segments, key_segments, query_order, key_order, scale, *plain):
        assert plain == (None, None, 0.0)
        return dense_attention(query, key, value, query_segments, scale)

    monkeypatch.setattr(attention, "causal_attention", dense)
    config = dataclasses.replace(
        (FAMILIES | MORE)[name],
        remat=RematConfig(dense="none", moe="none"),
        execution=ExecutionConfig(attention="reference", grouped_matmul="ragged_dot"),
    )
    flops = flops_per_token(config, LENGTH, backward=backward, causal=False)
    assert flops.total == pytest.approx(counted_flops(config, backward), rel=0.02)


def test_flops_of_a_sliding_layer_count_its_window():
    config = OLMO  # one of three layers sees 4 tokens
    assert flops_per_token(config, 127, backward=False, causal=False).attention == 2 * (2 * 127 + 4) * 4 * (4 + 4)
    seen = (1 + 2 + 3 + 124 * 4) / 127
    assert flops_per_token(config, 127, backward=False).attention == pytest.approx(2 * (2 * 64 + seen) * 4 * (4 + 4))
    assert flops_per_token(config, 3).attention == 3 * 2 * 3 * 2 * 4 * (4 + 4)  # a row shorter than the window


def test_causal_flops_count_the_keys_that_a_query_sees():
    full, causal = (flops_per_token(V3, 127, causal=causal) for causal in (False, True))
    assert causal.weights == full.weights
    assert causal.attention == pytest.approx(full.attention * np.mean(np.arange(1, 128)) / 127)
    assert full.total == full.weights + full.attention
