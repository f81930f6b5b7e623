"""Every family has the same gradients and metrics on any layout, and every metric there is means the same on all.

Families are the rows of `small_models.FAMILIES`, metrics those of pretraining and planted ones of the kinds that
no metric has yet.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import DENSE, FAMILIES, NOT_FOR, V3, packed_batch, random_arrays, run_config

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ParallelConfig, RematConfig, TrainConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.decoder import Block, MixerBlock
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh, put_batch
from opendeep_jax.parallel.shares import Max, Mean, Sum
from opendeep_jax.train.objective import pretraining
from opendeep_jax.train.state import TrainState
from opendeep_jax.train.step import batch_gradients

ROWS, LENGTH = 8, 16
BATCH = packed_batch(ROWS, LENGTH, seed=5)
PLANTED = ("stream_square", "stream_peak", "hidden_peak", "hidden_square")
SIX_LAYERS = dataclasses.replace(V3, num_layers=6)


def measuring(call):
    """A block's call that reports the residual stream's mean square, and its peak, which is below 0."""

    def measured(self, x, context, *more):
        out, report = call(self, x, context, *more)
        return out, report | {"stream_square": squares(out, context.valid), "stream_peak": peak(out, context.valid)}

    return measured


def squares(x, valid) -> Mean:
    return Mean(jnp.sum(jnp.where(valid[..., None], x**2, 0)), jnp.sum(valid) * x.shape[-1])


def peak(x, valid) -> Max:
    return Max(jnp.max(jnp.where(valid[..., None], x, -jnp.inf)) - 100)


def plant(patch, config):
    """Adds metrics to every block and to the loss; returns the objective."""
    for block in (Block, MixerBlock):
        patch.setattr(block, "__call__", measuring(block.__call__))
    plain = pretraining(config)

    def measured(hidden, *, batch, **inputs):
        loss, metrics = plain.loss(hidden, batch=batch, **inputs)
        valid = batch.segment_ids > 0
        return loss, metrics | {"hidden_peak": peak(hidden, valid), "hidden_square": squares(hidden, valid)}

    return dataclasses.replace(plain, loss=measured)


def run_of(model, micros=1, **parallel):
    """The configuration of a run."""
    train = TrainConfig(steps=10, batch_size=ROWS, loss_chunk=24, accumulation_steps=micros, z_loss_weight=0.01)
    return run_config(model, train=train, parallel=ParallelConfig(**{"fsdp": 1} | parallel))


def gradients(config, devices: int):
    """The batch's gradients and metrics from random weights."""
    definition, mesh = model_definition(config.model), make_mesh(config.parallel, jax.devices()[:devices])
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        objective = plant(patch, config)
        program = jax.jit(lambda state, batch: batch_gradients(config, definition, objective, state, batch))
        return jax.device_get(program(state_of(definition), put_batch(BATCH, mesh)))


def state_of(definition) -> TrainState:
    """A state of random weights, without an optimizer's."""
    params, router_bias = random_arrays(definition)
    return TrainState(jnp.int32(0), params, (), router_bias, new_health())


def measured_names(config, objective=None) -> set[str]:
    """The metrics of a step; nothing is compiled."""
    definition, objective = model_definition(config.model), objective or pretraining(config)
    state = jax.eval_shape(lambda: state_of(definition))
    return set(
        jax.eval_shape(lambda state: batch_gradients(config, definition, objective, state, BATCH)[1], state).metrics
    )


def axes_of(family: str, *axes: str) -> dict[str, int]:
    """Those of the mesh axes over which a family can be divided, by two devices each."""
    return {axis: 2 for axis in axes if axis not in NOT_FOR.get(family, ())}


def layouts_of(family: str) -> dict[str, dict]:
    """How a family's step is cut: over as many axes as it can, and in a pipeline if it can."""
    inside = axes_of(family, "expert", "context", "tensor")
    layouts = {"devices": {**inside, "fsdp": 2 ** (3 - len(inside)), "micros": 1}}
    if staged := axes_of(family, "stage"):
        layouts["stages"] = {**staged, **axes_of(family, "expert", "tensor"), "micros": 2}
    return layouts


CASES = [(family, layout) for family in FAMILIES for layout in layouts_of(family)]
QUICK = {("v3", "devices"), ("v3", "stages"), ("gpt-oss", "devices"), ("gemma", "devices"), ("nemotron-h", "devices")}
"""Between them they have every kind of layer, cut over every axis; `make test-all` takes the other families, too."""


@pytest.fixture(scope="module")
def whole():
    """A function of a family to its step on one device, the batch in one piece."""
    found = {}  # one program for each family

    def whole(name, model):
        if name not in found:
            found[name] = gradients(run_of(model), 1)
        return found[name]

    return whole


def assert_same(cut, whole):
    (grads, (metrics, loads)), (wanted, (whole_metrics, whole_loads)) = cut, whole
    assert metrics.keys() == whole_metrics.keys() and metrics.keys() >= set(PLANTED)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, loads, whole_loads)
    for name, grad in wanted.items():
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-4 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize(
    "family, layout", [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_each_family_has_the_gradients_and_metrics_of_one_device_on_every_layout(family, layout, whole):
    model = dataclasses.replace(FAMILIES[family], remat=RematConfig(dense="none", moe="none"))
    sizes = layouts_of(family)[layout]
    devices = int(np.prod([size for axis, size in sizes.items() if axis != "micros"]))
    assert_same(gradients(run_of(model, **sizes), devices), whole(family, model))


@pytest.mark.slow
def test_layers_that_fill_stages_unevenly_have_the_gradients_of_one_device(whole):
    """One dense layer and five of experts in four chunks."""
    sizes = {"stage": 2, "stage_chunks": 2, "expert": 2, "micros": 2}
    assert_same(gradients(run_of(SIX_LAYERS, **sizes), 4), whole("six layers", SIX_LAYERS))


@pytest.mark.parametrize(
    "family, axis",
    [(family, part) for family, parts in NOT_FOR.items() for part in parts if part not in ("hf", "gguf")],
)
def test_what_a_family_cannot_be_divided_over_is_refused(family, axis):
    with pytest.raises(ConfigError, match=NOT_FOR[family][axis]):
        run_of(FAMILIES[family], micros=2, **{axis: 2})


def test_every_metric_of_pretraining_is_described():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    measured = measured_names(run_of(V3))
    assert measured == {"loss", "lm_loss", "z_loss", "mtp_loss", "balance_loss"}
    assert {name for name in measured if f"| `{name}` |" not in page} == set()


@pytest.mark.parametrize("where", ["layer", "loss"])
@pytest.mark.parametrize(
    "name, share, message",
    [
        ("new", jnp.ones(()), "does not say how"),
        ("lm_loss", Mean(1.0, 1.0), "A (Sum|Mean) and a (Sum|Mean) of one number: they must be of one kind"),
    ],
)
def test_a_metric_that_does_not_say_how_its_shares_meet_is_refused_before_anything_is_compiled(
    where, name, share, message, monkeypatch
):
    config, call = run_of(DENSE), Block.feed_forward
    plain = pretraining(config)

    def loss(*given, **inputs):
        total, metrics = plain.loss(*given, **inputs)
        return total, {"lm_loss": Sum(total), name: share} if where == "loss" else metrics

    if where == "layer" or name == "lm_loss":
        kept = {"lm_loss": Sum(1.0)} if where == "loss" else {name: share}
        monkeypatch.setattr(Block, "feed_forward", lambda self, *given: (call(self, *given)[0], kept))
    with pytest.raises(ConfigError, match=message):
        measured_names(config, dataclasses.replace(plain, loss=loss))
