"""Layouts: every one that is proposed keeps the rules, fits by arithmetic, and can be handed to `opendeep train`."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import V3, run_config

from opendeep_jax.config.checks import ConfigError, check_run
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.overrides import resolve
from opendeep_jax.config.rules import axis_sizes
from opendeep_jax.plan import search as module
from opendeep_jax.plan.arithmetic import estimate
from opendeep_jax.plan.batch import largest_stage, with_batch
from opendeep_jax.plan.estimate import check_mesh
from opendeep_jax.plan.search import candidates, divisors, flag_file, search
from opendeep_jax.plan.topology import parse_topology

SMALL = with_batch(load_recipe("moe_1b"), 256)
EIGHT = parse_topology("v5e:2x4")


@given(st.integers(1, 3000))
def test_divisors_divide(number):
    assert all(number % size == 0 for size in divisors(number)) and {1, number} <= set(divisors(number))


def test_candidates_keep_the_rules_and_are_ranked():
    found = candidates(SMALL, EIGHT)
    assert len(found) > 5
    assert [one.estimate.seconds for one in found] == sorted(one.estimate.seconds for one in found)
    for one in found[:10]:
        check_run(one.config)
        check_mesh(one.config, EIGHT)
        assert one.estimate.bytes < 1.1 * EIGHT.chip.memory_bytes


def test_a_model_without_experts_has_no_expert_axis():
    dense = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, moe=type(SMALL.model.moe)()))
    assert {one.config.parallel.expert for one in candidates(dense, EIGHT)} == {1}


def test_replicas_lie_across_slices():
    found = candidates(with_batch(load_recipe("moe_1b"), 512), parse_topology("2*v5e:2x4"))
    assert found and {one.config.parallel.data for one in found} == {2}


def test_nothing_that_fits_is_said_so():
    with pytest.raises(ConfigError, match="no layout of deepseek_v3 fits on v5e:2x2 by arithmetic"):
        search(with_batch(load_recipe("deepseek_v3"), 8), parse_topology("v5e:2x2"), 1, 0.0, 0.0)


def test_the_best_is_saved_as_flags_that_train_takes(tmp_path):
    recipe = load_recipe("moe_1b")
    best = next(one for one in candidates(with_batch(recipe, 256), EIGHT) if one.config.parallel.expert > 1)
    path = tmp_path / "layout.flags"
    path.write_text(flag_file(best, recipe, "moe_1b", EIGHT))
    config, _ = resolve(["--config=moe_1b", f"--flagfile={path}"])
    assert config.parallel == best.config.parallel and config.model == best.config.model
    assert config.train.accumulation_steps == best.config.train.accumulation_steps


def test_a_search_compiles_different_meshes_and_tells_what_failed(monkeypatch):
    compiled = []

    def refuse(config, *_):
        compiled.append(config.parallel)
        raise ConfigError("this mesh cannot be laid")

    monkeypatch.setattr(module, "make_plan", refuse)
    told = []
    found = search(SMALL, EIGHT, 3, 0.0, 0.0, told.append)
    assert len(set(compiled)) == 3 and {one.problem for one in found} == {"this mesh cannot be laid"}
    assert len(told) == 4 and "this mesh cannot be laid" in told[1]


def test_arithmetic_sees_recomputation_and_networks():
    config = with_batch(load_recipe("deepseek_v3"), 2048)
    topology = parse_topology("v5p:8x8x8")

    def guess(fsdp: int, expert: int, remat: str):
        parallel = dataclasses.replace(config.parallel, fsdp=fsdp, expert=expert)
        model = dataclasses.replace(config.model, remat=dataclasses.replace(config.model.remat, dense=remat, moe=remat))
        changed = dataclasses.replace(config, parallel=parallel, model=model)
        return estimate(changed, largest_stage(changed), topology, axis_sizes(changed.parallel, 512))

    assert guess(64, 8, "full").compute > guess(64, 8, "none").compute
    assert guess(512, 1, "full").fsdp > 4 * guess(64, 8, "full").fsdp
    assert guess(512, 1, "full").expert == 0 < guess(64, 8, "full").expert
    assert (
        math.isfinite(guess(64, 8, "full").seconds)
        and estimate(
            run_config(V3),
            largest_stage(run_config(V3)),
            parse_topology("h100:1x8"),
            axis_sizes(run_config(V3).parallel, 8),
        ).seconds
        > 0
    )
