"""A model taken apart by name, and put together again."""

import jax
import numpy as np
import pytest
from flax import nnx
from small_models import FAMILIES, V3, random_arrays

from opendeep_jax.models.moe import RouterBias
from opendeep_jax.models.parameters import model_definition, split


@pytest.mark.parametrize("family", FAMILIES)
def test_every_array_has_one_axis_name_for_each_dimension(family):
    definition = model_definition(FAMILIES[family])
    shapes, axes = definition.shapes(), definition.axes()
    assert shapes.keys() == axes.keys()
    assert all(len(axes[name]) == len(shape.shape) for name, shape in shapes.items())


def test_parameters_and_router_biases_are_all_there_is():
    definition = model_definition(V3)
    params, biases = definition.shapes(nnx.Param), definition.shapes(RouterBias)
    assert set(params) | set(biases) == set(definition.shapes()) and not set(params) & set(biases)
    assert {name: shape.shape for name, shape in biases.items()} == {
        "moe_layers.moe.router_bias": (2, 8),
        "mtp.0.block.moe.router_bias": (8,),
    }


def test_splitting_a_model_gives_back_the_arrays_it_was_made_of():
    definition = model_definition(V3)
    params, router_bias = random_arrays(definition)
    again, params_again, bias_again = split(definition.model(params, router_bias))
    assert again.axes() == definition.axes()
    jax.tree.map(np.testing.assert_array_equal, (params_again, bias_again), (params, router_bias))


def test_a_missing_array_is_named():
    definition = model_definition(V3)
    params, router_bias = random_arrays(definition)
    del params["head.kernel"]
    with pytest.raises(KeyError, match="head.kernel"):
        definition.model(params, router_bias)
