"""Model directories for tests: the golden ones, and copies of them with something changed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.safetensors import TensorSpec, read_directory, write_directory
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.parameters import split

GOLDEN = Path(__file__).parent.parent / "golden"
DEEPSEEK = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
FAMILIES = sorted(path.parent for path in (GOLDEN / "families").glob("*/config.json"))
ALL = DEEPSEEK + FAMILIES


def name_of(directory: Path) -> str:
    """What pytest calls a case."""
    return directory.name


def family(name: str) -> Path:
    return GOLDEN / "families" / name


def expected(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "expected.npz") as file:
        return dict(file)


def raw_config(directory: Path, **changes) -> dict:
    return json.loads((directory / "config.json").read_text()) | changes


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_directory(directory).items()}


def write_tensors(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_directory(directory, specs, tensors.values(), 10**9)


def changed_copy(source: Path, directory: Path, config=None, **tensors) -> Path:
    """The case with keys of its config.json and tensors replaced, or removed where the value is None."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw_config(source, **(config or {}))))
    kept = tensors_of(source) | tensors
    write_tensors(directory, {name: array for name, array in kept.items() if array is not None})
    return directory


def arrays_of(model: Decoder) -> dict[str, np.ndarray]:
    _, params, router_bias = split(model)
    return {name: np.asarray(array) for name, array in (params | router_bias).items()}


def random_model(config: ModelConfig) -> Decoder:
    """A model of normal weights in the config's dtype, without compiling an initializer."""
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def fill(variable):
        dtype = config.dtype if isinstance(variable, nnx.Param) else variable.dtype
        return variable.replace(jnp.asarray(random.normal(size=variable.shape), dtype))

    return nnx.merge(graph, jax.tree.map(fill, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def assert_same_bits(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key, array in left.items():
        found = right[key]
        assert (array.dtype, array.shape) == (found.dtype, found.shape), key
        assert array.tobytes() == found.tobytes(), key
