"""GGUF files, the format of llama.cpp: models read from them and written to them, one tensor at a time.

For example `load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")` gives the Decoder with its weights multiplied out, and
`save_gguf(model, "mine.gguf", "q8_0")` writes what `llama-cli -m mine.gguf` reads.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import replacing
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.gguf_config import config_from_gguf, rope_factors
from opendeep_jax.interop.gguf_fields import config_to_gguf
from opendeep_jax.interop.gguf_file import GGUFFile, read_gguf, require_gguf
from opendeep_jax.interop.gguf_tensors import FileTensor, layout
from opendeep_jax.interop.reading import compute_dtype, describe_mismatch, empty, weight_sharding
from opendeep_jax.models.accounting import count_parameters
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.parameters import Arrays, ModelDefinition, model_definition, split

__all__ = ["StorageType", "config_of", "load_gguf", "read_gguf", "save_gguf"]

StorageType = Literal["f32", "bf16", "q8_0"]
ROPE_FACTORS = "rope_freqs.weight"
WITH_OUTPUT = ("gpt-oss", "nemotron", "olmo2")
"""Architectures whose files have the head's tensor even where it is the embedding's."""
BLOCK = 32
"""Weights that share a scale in Q8_0."""
ELEMENTS_AT_ONCE = 1 << 24


def load_gguf(path: str | Path, dtype=jnp.float32, mesh: Mesh | None = None) -> Decoder:
    """The model of a GGUF file, of any type that the `gguf` package can dequantize (Q4_K, Q8_0, MXFP4, BF16, ...).

    Its layout is that of Hugging Face's files: heads that `llama` interleaves are put back in halves. MTP modules are
    left out. The file's tokenizer is in its fields: text/gguf_tokenizer.py.

    Args:
        path: A file, or one of the parts that a model is split into; the others lie beside it.
        dtype: float32 or bfloat16: of the parameters (router biases stay float32) and of the computation.
        mesh: Devices to lay the model on, as training does, array after array. None takes the default device.

    Raises:
        ConfigError: the file is missing, damaged or hostile, of another architecture, or its tensors are not those that
            its metadata describes.
    """
    dtype = compute_dtype(dtype)
    file = read_gguf(path)
    config = replace(config_of(file), dtype=dtype.name)
    definition = model_definition(config)
    shapes, params = definition.shapes(), definition.shapes(nnx.Param)
    arrays: Arrays = {}
    for variable, parts in _matched(file, config, definition).items():
        value = empty(shapes[variable].shape, dtype if variable in params else shapes[variable].dtype)
        for part in parts:
            _fill(value, part, file)
        # Waited for, so that the host holds one array at a time.
        arrays[variable] = jax.block_until_ready(jax.device_put(value, weight_sharding(definition, variable, mesh)))
    return definition.model(arrays, {})


def config_of(file: GGUFFile) -> ModelConfig:
    """The configuration of the model in a file that `read_gguf` has opened. Raises ConfigError as `load_gguf` does."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    held = sum(math.prod(shape) for shape in shapes.values())
    try:
        factors = file.tensors[ROPE_FACTORS].read() if ROPE_FACTORS in file.tensors else None
        config = config_from_gguf(file.fields, shapes, factors)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error
    described = count_parameters(config).total
    if config.num_layers > len(shapes) or described > 4 * held + 10**7:
        raise ConfigError(
            f"{file.path} describes a model of {config.num_layers:,} layers and {described:,} parameters, and holds "
            f"{held:,} numbers. Download the file again."
        )
    return config


def _matched(file: GGUFFile, config: ModelConfig, definition: ModelDefinition) -> dict[str, list[FileTensor]]:
    """The file's tensors by our variable. Raises ConfigError that names what is missing, unexpected or misshapen."""
    architecture = file.fields["general.architecture"]
    shapes = {name: shape.shape for name, shape in definition.shapes().items()}
    tensors = list(layout(shapes, config, architecture, file.tensors))
    expected = {tensor.name: tensor.shape for tensor in tensors}
    beyond = tuple(f"blk.{config.num_layers + k}." for k in range(len(file.tensors)))
    known = {ROPE_FACTORS, *expected}
    problems = {
        "missing": [name for name in expected if name not in file.tensors],
        "unexpected": [
            name
            for name in file.tensors
            if name not in known and not name.startswith(beyond) and "attn_rot_embd" not in name
        ],
        "misshapen": [
            f"{name} (is {list(file.tensors[name].shape)}, must be {list(shape)})"
            for name, shape in expected.items()
            if name in file.tensors and file.tensors[name].shape != shape
        ],
    }
    if found := describe_mismatch(problems):
        raise ConfigError(
            f"The tensors in {file.path} are not those of a {architecture} model. {found}. "
            "Download the file again, or convert the model again."
        )
    by_variable: dict[str, list[FileTensor]] = {}
    for tensor in tensors:
        by_variable.setdefault(tensor.variable, []).append(tensor)
    return by_variable


def _fill(value: np.ndarray, tensor: FileTensor, file: GGUFFile) -> None:
    """Put one of the file's tensors into our array, the large ones in pieces: experts, embedding, head."""
    place, stored = value[tensor.index], file.tensors[tensor.name]
    if tensor.how == "experts":
        for expert in range(len(place)):
            place[expert] = stored.part(expert, expert + 1).read()[0].T
    elif not tensor.index and place.ndim == 2:
        rows = place.T if tensor.how == "matrix" else place
        step = max(1, ELEMENTS_AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), step):
            rows[start : start + step] = stored.part(start, min(start + step, len(rows))).read()
    else:
        place[..., tensor.section] = tensor.from_file(stored.read())


def save_gguf(
    model: Decoder,
    path: str | Path,
    storage: StorageType = "bf16",
    tokenizer: Mapping[str, Any] | None = None,
    name: str = "",
) -> None:
    """Write a model as one GGUF file, which appears under its name when it is whole. MTP modules are left out.

    Norms, biases and routers stay float32, as llama.cpp's own converter has them, and so `f32` loses nothing.

    Args:
        model: The model; one tensor at a time is fetched from its devices.
        path: The file; its directory is made if need be.
        storage: Of the matrices: float32, bfloat16, or 8 bits with a scale for each 32. Rows that 32 does not divide
            are bfloat16 then.
        tokenizer: Fields that text/gguf_tokenizer.py gives; without them llama.cpp does not start.
        name: Of the model, for people.

    Raises:
        ConfigError: no architecture of llama.cpp computes what this model does, the file exists, or the `gguf` extra is
            missing.
        OSError: the disk does not take it.
    """
    require_gguf()
    path = Path(path)
    if storage not in get_args(StorageType):
        raise ConfigError(f"type = {storage!r}: must be one of {', '.join(get_args(StorageType))}.")
    if path.exists():
        raise ConfigError(f"{path} exists already, and is not overwritten. Choose another name, or remove it.")
    config = model.config
    fields = config_to_gguf(config)
    architecture = fields.pop("general.architecture")
    _, params, router_bias = split(model)
    arrays = params | router_bias
    if architecture in WITH_OUTPUT and config.tie_embeddings:
        arrays["head.kernel"] = arrays["embedding.embedding"].T
    tensors = list(layout({name: array.shape for name, array in arrays.items()}, config, architecture))
    attention = config.attention
    if attention.rope.llama3_factor > 1:
        factors = rope_factors(attention.rope, attention.rotary_dim or attention.head_dim)
        arrays[ROPE_FACTORS] = factors
        tensors.insert(0, FileTensor(ROPE_FACTORS, ROPE_FACTORS, (), factors.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = _general(storage, name) | fields | dict(tokenizer or {})
    with replacing(path) as temporary:
        _write(temporary, architecture, fields, tensors, arrays, storage)


def _general(storage: StorageType, name: str) -> dict[str, Any]:
    import gguf

    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(types[storage]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: list[FileTensor],
    arrays: Mapping[str, jax.Array],
    storage: StorageType,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    kinds = [_kind(tensor, storage) for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        size = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), math.prod(size), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        _pad(file, writer.data_alignment)
        for tensor, kind in zip(tensors, kinds, strict=True):
            for piece in _pieces(arrays[tensor.variable], tensor):
                file.write(_stored(piece, kind).tobytes())
            _pad(file, writer.data_alignment)
    finally:
        writer.close()


def _kind(tensor: FileTensor, storage: StorageType) -> int:
    """Return the type that a tensor is stored in, a gguf.GGMLQuantizationType."""
    from gguf import GGMLQuantizationType as Kind

    small = len(tensor.shape) == 1 or not tensor.name.endswith(".weight") or "ffn_gate_inp" in tensor.name
    if storage == "f32" or small:
        return Kind.F32
    return Kind.Q8_0 if storage == "q8_0" and tensor.shape[-1] % BLOCK == 0 else Kind.BF16


def _pieces(array: jax.Array | np.ndarray, tensor: FileTensor) -> Iterator[np.ndarray]:
    """A file's tensor in float32, in pieces of rows; a layer's experts are fetched and transposed one at a time."""
    if tensor.how == "experts":
        wholes = (np.asarray(array[(*tensor.index, expert)]).T for expert in range(tensor.shape[0]))
    else:
        wholes = iter([tensor.to_file(np.asarray(array[tensor.index]))])
    for whole in wholes:
        rows = whole.reshape(-1, whole.shape[-1])
        step = max(1, ELEMENTS_AT_ONCE // rows.shape[-1])
        for start in range(0, len(rows), step):
            yield np.ascontiguousarray(rows[start : start + step], np.float32)


def _stored(rows: np.ndarray, kind: int) -> np.ndarray:
    """Float32 rows as the file has them."""
    import gguf

    if kind == gguf.GGMLQuantizationType.BF16:
        return rows.astype(ml_dtypes.bfloat16)
    return gguf.quantize(rows, gguf.GGMLQuantizationType(kind))


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
