"""Small models, compiled for one TPU and one GPU target with no accelerator; skipped where a compiler is missing."""

import importlib.util
import json
import math

import pytest
from small_models import DENSE, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe
from opendeep_jax.plan import estimate as module
from opendeep_jax.plan.batch import with_batch
from opendeep_jax.plan.compile import OutOfResource
from opendeep_jax.plan.estimate import RunPlan, make_plan
from opendeep_jax.plan.report import plan_page
from opendeep_jax.plan.shortage import MEMORY, Shortage
from opendeep_jax.plan.table import plan_table
from opendeep_jax.plan.topology import parse_topology

KEYS = {
    "": "topology chips compile_seconds memory flops collective_bytes roofline mfu tokens_per_second days cost_usd",
    "memory": "arguments_bytes temporaries_bytes total_bytes limit_bytes fits",
    "flops": "model_per_step hardware_per_step",
    "roofline": "compute_seconds memory_seconds collective_seconds step_seconds",
}


def installed(topology: str) -> bool:
    module = "libtpu" if topology.startswith("v") else "jax_cuda13_plugin"
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module", params=["v5e:2x2", "h100:1x8"])
def plan(request) -> RunPlan:
    if not installed(request.param):
        pytest.skip("its compiler is not installed")
    return make_plan(run_config(DENSE), parse_topology(request.param))


def test_the_step_compiles_and_fits(plan):
    assert plan.fits and plan.memory.total > 0 and plan.compile_seconds > 0
    assert plan.text.startswith("HloModule") and plan.program.devices == plan.topology.device_count


def test_the_state_is_donated(plan):
    weights_and_moments = plan.components["weights"] + plan.components["optimizer"]
    assert plan.memory.donated >= weights_and_moments * 0.9


def test_the_matmuls_of_the_model_are_all_there(plan):
    # The attention's scores are whole where the model's FLOPs count the causal half, and remat repeats some.
    assert 0.9 < plan.hardware_flops / plan.model_flops < 2


def test_weights_travel_along_their_axis(plan):
    assert {row.axes for row in plan.traffic if row.kind == "all-gather"} == {"fsdp"}
    assert plan.times.fastest <= plan.times.scheduled <= plan.times.slowest


def test_the_json_has_every_key_and_adds_up(plan):
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    for part, names in KEYS.items():
        assert set(names.split()) <= set(data[part] if part else data)
    step, peak = data["roofline"]["step_seconds"], plan.topology.chip.flops * data["chips"]
    assert data["mfu"] == pytest.approx(data["flops"]["model_per_step"] / step / peak)
    assert data["tokens_per_second"] == pytest.approx(8 * 16 / step)
    assert data["days"] * 86_400 * data["tokens_per_second"] == pytest.approx(data["total_tokens"])
    assert data["cost_usd"] == pytest.approx(data["days"] * 24 * data["chips"] * data["price_per_chip_hour_usd"])
    assert sum(data["collective_bytes"].values()) == pytest.approx(sum(row.bytes for row in plan.traffic))


def test_table_and_page_call_estimates_so(plan):
    assert "(an estimate)" in plan_table(plan) and "to spare" in plan_table(plan)
    html = plan_page(plan)
    assert "an estimate" in html and "http" not in html and html.count('class="bar') > 12


def refused(needed: float) -> RunPlan:
    """The plan of a program that the compiler refused."""

    def refuse(*_):
        raise OutOfResource(Shortage(MEMORY, needed, math.nan, ""), 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_step", refuse)
        return make_plan(run_config(DENSE), parse_topology("v5e:2x2"))


def test_a_run_that_does_not_fit_says_by_how_much_and_what_would_help():
    plan = refused(20e9)
    assert not plan.fits and "does not fit" in plan_table(plan) and "does not fit" in plan_page(plan)
    assert "2.88 GiB more than the 15.75 GiB" in plan.why_not() and "--model.remat.dense=full" in plan.why_not()
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["memory"]["fits"] is False and data["memory"]["total_bytes"] == 20e9 and data["mfu"] is None


def test_a_compiler_that_does_not_say_how_much_is_quoted_without_a_number():
    plan = refused(math.nan)
    assert "more than the 15.75 GiB" in plan.why_not() and json.dumps(plan.to_json(), allow_nan=False)


def test_a_state_that_cannot_fit_is_told_without_compiling():
    config = with_batch(load_recipe("deepseek_v3"), 64)
    plan = make_plan(config, parse_topology("v5e:8x8"))
    assert plan.compile_seconds == 0 and not plan.fits
    assert "more than the 15.75 GiB" in plan.why_not() and "more chips" in plan.why_not()


def test_a_mesh_that_does_not_fit_is_refused_before_compiling():
    with pytest.raises(ConfigError, match=r"--topology=v5e:4x4 has 16 devices"):
        make_plan(run_config(DENSE), parse_topology("v5e:4x4"))
