"""Memory by arithmetic: the state's part is exact, and each setting that is offered as a fix saves something."""

import dataclasses

import jax
import optax
import pytest
from small_models import FAMILIES, NEMOTRON_H, OPTIMIZERS, V3, run_config

from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schedule import ENDLESS
from opendeep_jax.config.schema import OptimizerConfig, ParallelConfig, RematConfig
from opendeep_jax.models.accounting import layer_kinds
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.plan.batch import largest_stage, with_batch
from opendeep_jax.plan.memory import axis_sizes, layer_weights, memory_by_component, memory_fixes, recomputed_share
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.setup import assemble
from opendeep_jax.train.state import bytes_on_each_device

ADAMW = OptimizerConfig(warmup_steps=1, first_moment_dtype="bfloat16")


def estimate(config, devices: int) -> dict[str, float]:
    return memory_by_component(config, largest_stage(config), axis_sizes(config, devices))


def state_of(config, devices: int):
    """The run's state as it would lie on the first devices; no array is made."""
    return assemble(config, make_mesh(config.parallel, jax.devices()[:devices])).template


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_moments_are_those_of_the_state(family):
    config = dataclasses.replace(run_config(FAMILIES[family]), optimizer=ADAMW)
    guess, state = estimate(config, 1), state_of(config, 1)
    assert guess["weights"] == pytest.approx(bytes_on_each_device(state.params), rel=0.01)
    assert guess["optimizer"] == bytes_on_each_device(state.opt_state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizers_state_is_counted_as_the_run_keeps_it_on_any_layout(kind, dtype):
    optimizer = OptimizerConfig(kind=kind, warmup_steps=1, first_moment_dtype=dtype, second_moment_dtype=dtype)
    for parallel in (
        ParallelConfig(),
        ParallelConfig(fsdp=2, expert=2, tensor=2),
        ParallelConfig(data=2, stage=2, fsdp=2, shard_optimizer_over_replicas=True),
    ):
        config = dataclasses.replace(run_config(V3), optimizer=optimizer, parallel=parallel)
        assert estimate(config, 8)["optimizer"] == bytes_on_each_device(state_of(config, 8).opt_state)


def test_what_an_optimizer_keeps_besides_is_counted(monkeypatch):
    """A rule with another moment, added as docs/architecture.md says."""

    def another(config, axes):
        return optax.chain(make_optimizer(config, axes), optax.trace(0.9))

    config = dataclasses.replace(run_config(V3), seed=7)  # no other test has counted it
    before = estimate(dataclasses.replace(config, seed=8), 1)
    monkeypatch.setattr("opendeep_jax.train.optimizer.make_optimizer", another)
    assert estimate(config, 1)["optimizer"] == before["optimizer"] + before["weights"]


def test_experts_are_divided_over_both_axes_and_the_rest_over_fsdp():
    config = dataclasses.replace(run_config(V3), parallel=ParallelConfig(fsdp=2, expert=4))
    whole = estimate(dataclasses.replace(config, parallel=ParallelConfig()), 1)["weights"]
    experts = 3 * 8 * 3 * 16 * 8 * 4  # three MoE blocks, MTP's included
    assert estimate(config, 8)["weights"] == pytest.approx((whole - experts) / 2 + experts / 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_of_all_layers_are_counted_once(family):
    model = FAMILIES[family]
    layers = [layer_weights(model, kind) for kind, count in layer_kinds(model) for _ in range(count)]
    shapes = model_definition(model).shapes()
    inside = [name for name in shapes if "_layers." in name or name.startswith("mtp.")]
    experts = [name for name in inside if name.endswith(("moe.gate", "moe.up", "moe.down"))]
    assert sum(layer.experts for layer in layers) == sum(shapes[name].size for name in experts)
    small = ("norm.scale", "bias", "sinks", "decay_log", "skip", "conv")
    matrices = [name for name in inside if not name.endswith(small + ("mtp.0.projection",))]
    assert sum(sum(layer) for layer in layers) == sum(shapes[name].size for name in matrices)


def test_a_hybrids_layers_keep_what_their_one_mixer_names():
    def kept(model) -> float:
        return estimate(run_config(model), 1)["activations"]

    alone = {letter: NEMOTRON_H.layer_pattern.count(letter) for letter in "M*-E"}
    assert all(alone.values())
    model = dataclasses.replace(NEMOTRON_H, remat=RematConfig(dense="named", moe="named", names=("mamba_input",)))
    without = dataclasses.replace(model, remat=RematConfig(names=()))
    mamba = model.mamba
    tokens = kept(without) / (len(model.layer_pattern) * model.hidden_size)
    assert kept(model) - kept(without) == tokens * alone["M"] * (mamba.size + mamba.conv_size + mamba.num_heads)


def test_less_is_kept_the_more_is_recomputed():
    kept, again = {}, {}
    for policy in ("none", "named", "full"):
        model = dataclasses.replace(V3, remat=RematConfig(dense=policy, moe=policy))
        kept[policy], again[policy] = estimate(run_config(model), 1)["activations"], recomputed_share(model)
    assert kept["none"] > kept["named"] > kept["full"] > 0
    assert again["none"] == again["named"] == 0 and again["full"] == 1


def test_cures_save_memory_and_the_best_comes_first():
    config = with_batch(load_recipe("moe_1b"), 64)
    found = memory_fixes(config, largest_stage(config), axis_sizes(config, 8))
    assert len(found) > 3 and [fix.saves for fix in found] == sorted((fix.saves for fix in found), reverse=True)
    assert min(fix.saves for fix in found) > 0
    assert any(fix.setting.startswith("--train.accumulation_steps=") for fix in found)


def test_micro_batches_halve_what_rows_take():
    config = run_config(V3)
    two = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=2))
    assert estimate(two, 1)["activations"] == estimate(config, 1)["activations"] / 2
    assert estimate(two, 1)["weights"] == estimate(config, 1)["weights"]


@pytest.mark.parametrize("chips, rows", [(512, 4), (64, 1)])
def test_a_chosen_batch_replaces_ramp_and_phases(chips, rows):
    config = with_batch(load_recipe("deepseek_v3"), rows * chips)
    assert largest_stage(config)[1:] == (0, ENDLESS, rows * chips, 4096)
