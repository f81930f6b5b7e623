"""Stochastic rounding: unbiased against exact arithmetic, the same wherever it is done, and never the same twice."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train.rounding import round_stochastically

NUMBERS = np.float32([1.0, 1.001, -1.003, 0.02 + 1e-5, 3e-39, -7.77e-41, 1e-30, 2.7e38, 1 / 3, -1e4, 0.0])


@jax.jit
def rounded(x, count):
    return round_stochastically(x, "bfloat16", 5, count, "weight w")


def test_the_mean_of_many_roundings_is_the_number_and_each_is_a_neighbor():
    counts = jnp.arange(8192)
    results = np.asarray(jax.vmap(lambda count: rounded(NUMBERS, count))(counts)).astype(np.float64)
    below = NUMBERS.view(np.uint32) & 0xFFFF0000
    neighbors = np.stack([below.view(np.float32), (below + 0x10000).view(np.float32)]).astype(np.float64)
    assert ((results == neighbors[0]) | (results == neighbors[1])).all()
    place = np.abs(neighbors[1] - neighbors[0])
    error = (results.mean(0) - NUMBERS.astype(np.float64)) / place
    np.testing.assert_allclose(error, 0, atol=4 * 0.5 / np.sqrt(len(counts)))


def test_what_bfloat16_holds_stays_as_it_is_and_so_does_what_is_not_finite():
    kept = np.array([0, -0.0, 1, -1.5, 2**-126, 3.3895314e38, np.inf, -np.inf, np.nan], ml_dtypes.bfloat16)
    for count in range(20):
        np.testing.assert_array_equal(np.float32(rounded(jnp.float32(kept), count)), np.float32(kept))
    assert round_stochastically(NUMBERS, "float32", 0, jnp.int32(0), "w") is NUMBERS


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": jnp.int32(1)}, {"name": "nu w"}, {"name": "weight v"}])
def test_another_seed_step_or_array_has_chances_of_its_own(change):
    x = jnp.full((64, 512), 1 + 1 / 256, jnp.float32)  # half way between two neighbors
    given = {"seed": 0, "count": jnp.int32(0), "name": "weight w"}
    ups = [np.asarray(round_stochastically(x, "bfloat16", **given | other) > 1) for other in ({}, change)]
    correlation = np.corrcoef(*(up.ravel() for up in ups))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(x.size)
    rows = np.corrcoef(ups[0].astype(float))  # nor do the elements of one array follow each other
    assert np.abs(rows - np.eye(64)).max() < 6 / np.sqrt(512)


@pytest.mark.parametrize("shape", [(), (16,), (16, 24), (4, 8, 3, 16)])
def test_the_chances_do_not_depend_on_how_an_array_is_divided(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    alone = rounded(x, 7)
    for axes in [("fsdp",), (None, "fsdp"), ("data", "fsdp"), (None, ("data", "fsdp"))]:
        if len(axes) > len(shape):
            continue
        with jax.set_mesh(make_mesh(ParallelConfig(data=2, fsdp=4), jax.devices()[:8])):
            divided = rounded(jax.device_put(x, PartitionSpec(*axes)), 7)
        np.testing.assert_array_equal(divided, alone)
