"""Muon of stacked matrices does what optax's does to each weight by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from opendeep_jax.train import muon as module
from opendeep_jax.train.muon import muon

NUMBERS = {
    "wide": MuonDimensionNumbers((0,), (1,)),
    "tall": MuonDimensionNumbers((0,), (1,)),
    "layers": MuonDimensionNumbers((1,), (2,)),
    "heads": MuonDimensionNumbers((0, 1), (2,)),
    "between": MuonDimensionNumbers((0,), (2,)),
    "square": MuonDimensionNumbers((0,), (1,)),
}
SHAPES = {
    "wide": (4, 6),
    "tall": (6, 4),
    "layers": (3, 4, 6),
    "heads": (2, 3, 4),
    "between": (6, 2, 4),
    "square": (5, 5),
}


def steps_of(rule, steps=3):
    """The updates of the last of some steps, and the state after it."""
    random = np.random.default_rng(0)
    state = rule.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    for _ in range(steps):
        grads = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        updates, state = jax.jit(rule.update)(grads, state)
    return updates, state


@pytest.mark.parametrize("largest", [1 << 24, 30])
def test_matrices_of_one_shape_together_are_what_they_are_alone(largest, monkeypatch):
    monkeypatch.setattr(module, "STACKED_NUMBERS", largest)
    results = steps_of(muon(5, 0.95, NUMBERS.get))
    wanted = steps_of(scale_by_muon(ns_steps=5, beta=0.95, weight_dimension_numbers=NUMBERS))
    assert jax.tree.structure(results) == jax.tree.structure(wanted)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), results, wanted)


def test_the_program_has_one_loop_for_each_shape():
    rule = muon(5, 0.95, NUMBERS.get)
    arrays = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    text = str(jax.make_jaxpr(rule.update)(arrays, rule.init(arrays)))
    assert text.count("dot_general") == 3 * 2  # [4, 6] and [5, 5]
