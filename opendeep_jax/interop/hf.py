"""Models in Hugging Face's format, read and written without torch: config.json and safetensors, one tensor at a time.

Memory: reading takes the model's own and a part of one array; writing takes one layer's array besides the model.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_card import Provenance, model_card
from opendeep_jax.interop.hf_config import config_from_hf, config_to_hf, family_of, family_of_directory
from opendeep_jax.interop.hf_family import Family
from opendeep_jax.interop.hf_layout import HubTensor, copies, layout
from opendeep_jax.interop.hf_text import text_files, write_text_files
from opendeep_jax.interop.hf_weights import Stored, elements, forms, read_into
from opendeep_jax.interop.reading import compute_dtype, describe_mismatch, empty, weight_sharding
from opendeep_jax.interop.safetensors import StoredTensor, TensorSpec, read_directory, write_directory
from opendeep_jax.models.accounting import count_parameters
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.parameters import Arrays, ModelDefinition, model_definition, split

__all__ = ["config_from_hf", "config_to_hf", "load_hf", "save_hf"]

MAX_READERS = 8
"""Threads that read tensors at a time; each may hold one, multiplied out, besides the array that it fills."""
ELEMENTS_COMPARED = 2**24
"""Elements of two tensors that are compared at a time."""


def load_hf(directory: str | Path, dtype=jnp.float32, mesh: Mesh | None = None) -> Decoder:
    """The model of a Hugging Face directory: config.json and *.safetensors, in one file or in shards with an index.

    Weights in float8 with block scales, as DeepSeek-V3 is published, or in MXFP4, as gpt-oss is, are multiplied out. An
    MTP module that config.json announces may be absent from the files; the model is then built without it.

    Args:
        directory: Where the files are.
        dtype: float32 or bfloat16: of the parameters (router biases stay float32) and of the computation.
        mesh: Devices to lay the model on, as training does; each reads its own part. None takes the default device.

    Raises:
        ConfigError: a file is missing or malformed, the family is unknown, or tensors are missing, unexpected,
            misshapen or not of numbers with a fraction; the message names them. No array is made before.
    """
    directory = Path(directory)
    dtype = compute_dtype(dtype)
    config = replace(config_from_hf(directory), dtype=dtype.name)
    family = family_of_directory(directory)
    stored = {family.names_in_files(name): tensor for name, tensor in read_directory(directory).items()}
    stored.pop(None, None)
    if not any(tensor.startswith(f"model.layers.{config.num_layers}.") for tensor in stored):
        config = replace(config, mtp=replace(config.mtp, depth=0))
    config = replace(config, tie_embeddings=config.tie_embeddings and not _has_own_head(stored, family))
    _check_size(directory, stored, config)
    definition = model_definition(config)
    tensors = defaultdict(list)
    for tensor in layout({path: array.shape for path, array in definition.shapes().items()}, config, family):
        tensors[tensor.path].append(tensor)
    _check_tensors(directory, stored, [tensor for part in tensors.values() for tensor in part], config, family.top)
    params = definition.shapes(nnx.Param)
    arrays = {
        path: _read_array(
            part, stored, definition, path, dtype if path in params else definition.shapes()[path].dtype, mesh
        )
        for path, part in tensors.items()
    }
    return definition.model(arrays, {})


def _has_own_head(stored: Stored, family: Family) -> bool:
    """Return whether the files hold a head with other values than the embedding's.

    Such a head is used, whatever tie_word_embeddings says: as transformers does.
    """
    head, embedding = (stored.get(family.top.get(path)) for path in ("head.kernel", "embedding.embedding"))
    return head is not None and embedding is not None and not _same_values(head, embedding)


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Compare two stored tensors, a few rows at a time."""
    if one.shape != other.shape:
        return False
    left, right = one.read(), other.read()
    rows = max(ELEMENTS_COMPARED // max(math.prod(one.shape[1:]), 1), 1)
    parts = [slice(first, first + rows) for first in range(0, len(left), rows)]
    return all(np.array_equal(*(x[part].astype(np.float32) for x in (left, right)), equal_nan=True) for part in parts)


def _check_size(directory: Path, stored: Stored, config: ModelConfig) -> None:
    """Raise ConfigError for a config.json that describes a far larger model than the files could be.

    Such a model's layers are not even counted out: a few bytes could otherwise ask for more than any machine has.
    """
    held, described = elements(stored), count_parameters(config).total
    if described > 4 * held + 10**7 or config.mtp.depth > len(stored):
        raise ConfigError(
            f"{directory / 'config.json'} describes a model of {described:,} parameters with {config.mtp.depth} MTP "
            f"modules, and the files hold {held:,} numbers. Download the directory again, or correct the config.json."
        )


def _check_tensors(
    directory: Path, stored: Stored, tensors: list[HubTensor], config: ModelConfig, top: Mapping[str, str]
) -> None:
    """Raise ConfigError that names the tensors which are missing, unexpected, of another shape or kind of number.

    Args:
        top: The files' names of the arrays outside the blocks.
    """
    expected = {name: form for tensor in tensors for name, form in forms(tensor, stored).items()}
    repeated = {tensor.name: top[tensor.path] for tensor in copies(config)}
    known = {*expected, *repeated}
    if config.tie_embeddings:
        known.add(top["head.kernel"])  # found to equal the embedding: `_has_own_head`
    unexpected = [name for name in stored if name not in known]
    present = {name: form for name, form in expected.items() if name in stored}
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")],
        "unlike what they repeat": [
            f"{name} (must equal {of})"
            for name, of in repeated.items()
            if name in stored and of in stored and not _same_values(stored[name], stored[of])
        ],
        "misshapen": [
            f"{name} (is {list(stored[name].shape)}, must be {list(shape)})"
            for name, (shape, _) in present.items()
            if stored[name].shape != shape
        ],
        "of the wrong type": [
            f"{name} (is {stored[name].dtype}, must be {' or '.join(str(dtype) for dtype in dtypes)})"
            for name, (_, dtypes) in present.items()
            if stored[name].dtype not in dtypes
        ],
    }
    if found := describe_mismatch(problems):
        raise ConfigError(
            f"The tensors in {directory} are not those of its config.json. {found}. "
            "Download the directory again, or correct the config.json."
        )


def _read_array(
    tensors: list[HubTensor], stored: Stored, definition: ModelDefinition, path: str, dtype, mesh: Mesh | None
) -> jax.Array:
    """One of the model's arrays, out of the tensors that it is made of; each device's part is read by itself."""
    shape = definition.shapes()[path].shape
    if mesh is None:
        return jax.device_put(_read_part(tensors, stored, [range(size) for size in shape], dtype))
    sharding = weight_sharding(definition, path, mesh)
    devices = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices[tuple(range(size)[part] for size, part in zip(shape, index, strict=True))].append(device)
    parts = []
    for ranges, holders in devices.items():
        value = _read_part(tensors, stored, ranges, dtype)
        # Waited for, so that the host holds one part at a time.
        parts += jax.block_until_ready([jax.device_put(value, device) for device in holders])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read_part(tensors: list[HubTensor], stored: Stored, ranges, dtype) -> np.ndarray:
    """Return the elements of an array whose indices lie in these ranges, one for each dimension."""
    value = empty([len(r) for r in ranges], dtype)

    def read(tensor: HubTensor) -> None:
        inside = ranges[len(tensor.index) :]
        place = tuple(i - r.start for i, r in zip(tensor.index, ranges, strict=False))
        read_into(value[place], tensor, stored, tuple(slice(r.start, r.stop) for r in inside))

    here = [t for t in tensors if all(i in r for i, r in zip(t.index, ranges, strict=False))]
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
        list(readers.map(read, here))  # raises what a reader raised
    return value


def save_hf(
    model: Decoder,
    directory: str | Path,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    provenance: Provenance | None = None,
) -> None:
    """Write the model as a Hugging Face directory, parameters in their own dtype; `load_hf` gives it back to the bit.

    Args:
        model: The model, its parameters in this process' reach.
        directory: Where to; made if need be, and refused if it already holds a model.
        tokenizer: A directory whose tokenizer, chat template, generation config and license come along, or a
            tokenizer.json.
        max_shard_bytes: Largest file; a larger model is cut into shards with an index.
        provenance: What the model card tells of where it comes from.

    Raises:
        ConfigError: the directory holds a model, the tokenizer isn't there, or no family describes this model.
    """
    directory = Path(directory)
    config = model.config
    raw, family = config_to_hf(config), family_of(config)
    held = [path.name for pattern in ("*.safetensors*", "config.json") for path in directory.glob(pattern)]
    if held:
        raise ConfigError(f"{directory} already holds {', '.join(sorted(held)[:5])}. Choose an empty directory.")
    texts = text_files(tokenizer)
    raw |= texts.ids
    _, params, router_bias = split(model)
    arrays = params | router_bias
    arrays |= _zero_biases(arrays, config, family)
    tensors = defaultdict(list)
    for tensor in [*layout({path: array.shape for path, array in arrays.items()}, config, family), *copies(config)]:
        tensors[tensor.name].append(tensor)

    def order(name: str) -> tuple[int, int]:
        """Return the sort key: wider types first, which aligns every tensor to its width; then by layer."""
        path = tensors[name][0].path
        layer = name.removeprefix("model.layers.").partition(".")[0]
        return -arrays[path].dtype.itemsize, int(layer) if layer.isdigit() else -1

    names = sorted(tensors, key=order)
    specs = [TensorSpec(name, np.dtype(arrays[tensors[name][0].path].dtype), tensors[name][0].shape) for name in names]
    raw["torch_dtype"] = arrays["embedding.embedding"].dtype.name
    directory.mkdir(parents=True, exist_ok=True)
    write_directory(directory, specs, _hub_values(arrays, (tensors[name] for name in names)), max_shard_bytes)
    write_text_files(texts, directory)
    card = directory / "README.md"
    if not card.exists():
        write_atomically(card, model_card(config, family.architecture, count_parameters(config), provenance))
    # Last: what has a config.json is whole.
    write_atomically(directory / "config.json", json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _zero_biases(arrays: Arrays, config: ModelConfig, family: Family) -> Arrays:
    """Return the router biases that V3's files spell out where the model has none."""
    if config.moe.scoring != "sigmoid" or config.moe.use_router_bias or "moe.router_bias" not in family.block:
        return {}
    shapes = {path: array.shape for path, array in arrays.items() if path.endswith("moe.router")}
    return {f"{path}_bias": jnp.zeros((*shape[:-2], shape[-1]), jnp.float32) for path, shape in shapes.items()}


@jax.jit
def _layer(array: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, row, keepdims=False)


def _hub_values(arrays: Arrays, files: Iterator[list[HubTensor]]) -> Iterator[np.ndarray]:
    """Yield the tensors' values in the hub's layout; one layer's array at a time is fetched from its devices."""
    place, fetched = None, None

    def ours(tensor: HubTensor) -> np.ndarray:
        nonlocal place, fetched
        if (tensor.path, tensor.index[:1]) != place:
            place, array = (tensor.path, tensor.index[:1]), arrays[tensor.path]
            fetched = np.asarray(_layer(array, tensor.index[0]) if tensor.index else array)
        return fetched[tensor.index[1:]]

    for tensors in files:
        if tensors[0].step == 1:
            yield tensors[0].to_hub(ours(tensors[0]))
            continue
        value = np.empty(tensors[0].shape, arrays[tensors[0].path].dtype)
        for tensor in tensors:
            value[..., tensor.columns] = tensor.to_hub(ours(tensor))
        yield value
