"""A model taken apart by name, and put together again."""

import jax
import numpy as np
import pytest
from flax import nnx
from small_models import FAMILIES, V3, random_arrays

from opendeep_jax.models.moe import RouterBias
from opendeep_jax.models.parameters import skeleton, split


@pytest.mark.parametrize("family", FAMILIES)
def test_every_array_has_one_axis_name_for_each_dimension(family):
    bones = skeleton(FAMILIES[family])
    shapes, axes = bones.shapes(), bones.axes()
    assert shapes.keys() == axes.keys()
    assert all(len(axes[name]) == len(shape.shape) for name, shape in shapes.items())


def test_parameters_and_router_biases_are_all_there_is():
    bones = skeleton(V3)
    params, biases = bones.shapes(nnx.Param), bones.shapes(RouterBias)
    assert set(params) | set(biases) == set(bones.shapes()) and not set(params) & set(biases)
    assert {name: shape.shape for name, shape in biases.items()} == {
        "moe_layers.moe.router_bias": (2, 8),
        "mtp.0.block.moe.router_bias": (8,),
    }


def test_splitting_a_model_gives_back_the_arrays_it_was_made_of():
    bones = skeleton(V3)
    params, router_bias = random_arrays(bones)
    again, params_again, bias_again = split(bones.model(params, router_bias))
    assert again.axes() == bones.axes()
    jax.tree.map(np.testing.assert_array_equal, (params_again, bias_again), (params, router_bias))


def test_a_missing_array_is_named():
    bones = skeleton(V3)
    params, router_bias = random_arrays(bones)
    del params["head.kernel"]
    with pytest.raises(KeyError, match="head.kernel"):
        bones.model(params, router_bias)
