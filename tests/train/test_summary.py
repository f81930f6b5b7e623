"""What a run says of itself before its first step."""

import dataclasses
import json
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import named_sizes
from small_models import FAMILIES, V3, random_arrays, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe, load_run_config
from opendeep_jax.config.schema import RematConfig
from opendeep_jax.models.accounting import layer_kinds
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train import summary
from opendeep_jax.train.setup import assemble


def state_of(config):
    """The abstract state of a run over the devices here, and their number."""
    mesh = make_mesh(config.parallel)
    return assemble(config, mesh).template, mesh.size


def test_671b_parameters_on_one_host_are_refused_before_anything_is_made():
    config = load_recipe("deepseek_v3")
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data=1, fsdp=-1))
    with pytest.raises(ConfigError, match=r"deepseek_v3: .* on each of 8 devices.* Use at least [\d,]+ such devices"):
        summary.check_memory(config, *state_of(config))


def test_a_small_model_fits_and_its_estimate_counts_weights_exactly():
    config = run_config(V3)
    state, devices = state_of(config)
    summary.check_memory(config, state, devices)
    memory = summary.memory_estimate(config, state, devices)
    shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.params)]
    assert memory["weights"] == memory["gradients"] == 4 * sum(map(math.prod, shards))
    assert memory["moments"] >= 2 * memory["weights"]


def test_saving_fewer_activations_is_estimated_as_less_memory():
    def activations(policy):
        remat = dataclasses.replace(V3.remat, dense=policy, moe=policy)
        config = run_config(dataclasses.replace(V3, remat=remat))
        return summary.memory_estimate(config, *state_of(config))["activations"]

    assert activations("full") < activations("named") < activations("none")


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_as_wide_as_the_layers_name_them(family):
    model, tokens = dataclasses.replace(FAMILIES[family], remat=RematConfig(dense="none", moe="none")), 8
    text = np.ones((1, tokens), np.int32)

    def total(params, router_bias):
        out = model_definition(model).model(params, router_bias).forward(text, mtp_tokens=[text] * model.mtp.depth)
        return sum(jnp.sum(hidden) for hidden in (out.hidden, *out.mtp_hidden))

    arrays = jax.eval_shape(lambda: random_arrays(model_definition(model)))
    named = named_sizes(jax.make_jaxpr(jax.grad(total))(*arrays).jaxpr)
    expected = Counter()
    for kind, layers in layer_kinds(model):
        for name, width in {"block_input": model.hidden_size, **summary.activation_widths(model, kind)}.items():
            expected[name] += layers * width * tokens
        if "E" in kind:
            expected["routing"] += layers * model.moe.num_experts  # rows of each expert, not of each token
    assert named == +expected  # without what has no width


@pytest.mark.parametrize("kind, name", [("*-", "expert_gate"), ("*E", "expert_gate")])
def test_only_blocks_with_experts_keep_their_activations(kind, name):
    assert (name in summary.activation_widths(V3, kind)) == ("E" in kind)


@pytest.mark.parametrize(
    "tokenizer, tokens, rows, said",
    [
        ("bpe:8192", 8192, 8192, "8,192 tokens, 8,192 rows"),
        ("bytes", 262, 512, "262 tokens, 512 rows; 250 rows (49%) belong to no token and learn nothing"),
        ("bpe:8192", 1203, 8192, "1,203 tokens, 8,192 rows: the text has no more of them than that for bpe:8192; 6"),
        ("bpe:1024", 1024, 8192, "1,024 tokens, 8,192 rows; 7,168 rows (88%) belong to no token"),
        ("a/tokenizer.json", 151_669, 151_936, "151,669 tokens, 151,936 rows; 267 rows (0%) belong to no token"),
    ],
)
def test_rows_of_the_embedding_without_a_token_are_counted_at_the_start(tokenizer, tokens, rows, said):
    assert summary.vocabulary(tokenizer, tokens, rows).startswith(said)


def test_the_vocabulary_stands_in_the_summary_of_the_start(small_run):
    config, data = load_run_config(small_run), json.loads((small_run / "data.json").read_text())
    rows = dict(summary.data_rows(config, data))
    assert rows["vocabulary"].startswith(f"{data['vocab_size']:,} tokens, {config.model.vocab_size:,} rows")
