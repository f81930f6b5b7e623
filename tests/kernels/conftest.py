"""What the tests of kernels share."""

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def watching(capfd):
    """Pallas' TPU interpreter with two cores; afterwards the test fails if any two accesses to memory raced."""
    yield pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=0)
    # Newer versions of JAX raise where they see a race; older ones print it and write it down.
    races = getattr(interpret_pallas_call, "races", None)
    assert races is None or not races.races_found
    assert "race" not in capfd.readouterr().out.lower()
