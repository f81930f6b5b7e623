"""DeepSeek-V2/V3 models in Hugging Face's format: config.json and safetensors, read and written without torch.

One table pairs our parameters with the hub's tensors and serves both ways; `layout` expands it for a model. A hub
matrix is [out, in], ours [in, out...] with heads apart, so each is the other transposed and reshaped: no arithmetic,
and a round trip is exact to the bit.

Letters in shapes: V vocabulary, D model width.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_config import config_from_hf, config_to_hf
from opendeep_jax.interop.safetensors import StoredTensor, TensorSpec, read_directory, write_directory
from opendeep_jax.models.decoder import Decoder

__all__ = ["HubTensor", "config_from_hf", "config_to_hf", "layout", "load_hf", "save_hf"]

TOP = {
    "embedding.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}
# Inside a block, which the hub calls model.layers.N; {expert} runs over the experts.
BLOCK = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.q_proj": "self_attn.q_proj.weight",
    "attention.q_down": "self_attn.q_a_proj.weight",
    "attention.q_norm.scale": "self_attn.q_a_layernorm.weight",
    "attention.q_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.scale": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "moe.router": "mlp.gate.weight",
    "moe.router_bias": "mlp.gate.e_score_correction_bias",
    "moe.gate": "mlp.experts.{expert}.gate_proj.weight",
    "moe.up": "mlp.experts.{expert}.up_proj.weight",
    "moe.down": "mlp.experts.{expert}.down_proj.weight",
    "moe.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "moe.shared.up": "mlp.shared_experts.up_proj.weight",
    "moe.shared.down": "mlp.shared_experts.down_proj.weight",
}
# MTP module k is the hub's layer num_layers + k: a block and these.
MTP = {
    "embedding_norm.scale": "enorm.weight",
    "hidden_norm.scale": "hnorm.weight",
    "projection": "eh_proj.weight",
    "norm.scale": "shared_head.norm.weight",
    "embedding": "embed_tokens.weight",
    "head": "shared_head.head.weight",
}
COPIES = ("embedding", "head")  # of the main model's; ours shares them
AS_STORED = "embed_tokens.weight"  # [V, D] on both sides
INPUT_HEADS = "self_attn.o_proj.weight"  # [H, V', D] on ours: its heads are on the input side
FP8_BLOCK = 128
MAX_NAMED = 20


@dataclass(frozen=True)
class HubTensor:
    """One tensor of the hub's files and where it lives in the model.

    For example `model.layers.4.mlp.experts.7.down_proj.weight` of a model with 3 dense layers is at index (1, 7) of
    ("moe_layers", "moe", "down"), with our_shape [F, D] and shape [D, F].
    """

    name: str
    path: tuple[str | int, ...]
    index: tuple[int, ...]
    our_shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether the two layouts differ."""
        return len(self.our_shape) > 1 and not self.name.endswith(AS_STORED)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the hub's file."""
        if not self.transposed:
            return self.our_shape
        inputs = len(self.our_shape) - 1 if self.name.endswith(INPUT_HEADS) else 1
        return math.prod(self.our_shape[inputs:]), math.prod(self.our_shape[:inputs])

    def to_hub(self, ours: np.ndarray) -> np.ndarray:
        """The hub's tensor out of our whole variable."""
        part = ours[self.index]
        return part.reshape(self.shape[::-1]).T if self.transposed else part

    def from_hub(self, stored: np.ndarray) -> np.ndarray:
        """The hub's tensor in our layout, of our_shape."""
        return stored.T.reshape(self.our_shape) if self.transposed else stored


def layout(shapes: Mapping[tuple, tuple[int, ...]], config: ModelConfig) -> Iterator[HubTensor]:
    """Every tensor that the hub's files hold for a model, in the order of our variables.

    Args:
        shapes: Shape of each of the model's variables by flat path, such as ("moe_layers", "moe", "router").
        config: The model's configuration, for the numbers of its layers.
    """
    for path, shape in shapes.items():
        if path[0] in ("dense_layers", "moe_layers"):
            first = 0 if path[0] == "dense_layers" else config.num_leading_dense_layers
            template = "model.layers.{layer}." + BLOCK[_dotted(path[1:])]
            places = [((row,), first + row) for row in range(shape[0])]
        elif path[0] == "mtp":
            inside = BLOCK[_dotted(path[3:])] if path[2] == "block" else MTP[_dotted(path[2:])]
            template, places = "model.layers.{layer}." + inside, [((), config.num_layers + int(path[1]))]
        else:
            template, places = TOP[_dotted(path)], [((), 0)]
        for index, layer in places:
            rest = shape[len(index) :]
            if "{expert}" in template:
                for expert in range(rest[0]):
                    yield HubTensor(template.format(layer=layer, expert=expert), path, (*index, expert), rest[1:])
            else:
                yield HubTensor(template.format(layer=layer), path, index, rest)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def load_hf(directory: str | Path, dtype=jnp.float32) -> Decoder:
    """The model of a Hugging Face directory: config.json and *.safetensors, in one file or in shards with an index.

    Tensors are read one at a time. Weights in float8 with block scales, as DeepSeek-V3 is published, are multiplied
    out. An MTP module that config.json announces may be absent from the files; the model is then built without it.

    Args:
        directory: Where the files are.
        dtype: float32 or bfloat16: of the parameters (router biases stay float32) and of the computation.

    Raises:
        ConfigError: a file is missing or malformed, the family is not DeepSeek-V2/V3, or tensors are missing,
            unexpected or misshapen; the message names them.
    """
    directory = Path(directory)
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype = {name}: a model computes in float32 or bfloat16. Choose one of the two.")
    config = replace(config_from_hf(directory), dtype=name)
    stored = read_directory(directory)
    if not any(tensor.startswith(f"model.layers.{config.num_layers}.") for tensor in stored):
        config = replace(config, mtp=replace(config.mtp, depth=0))
    # Shapes only: nothing is initialised that the files replace.
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    variables = dict(nnx.to_flat_state(state))
    parts = defaultdict(list)
    for tensor in layout({path: variable.shape for path, variable in variables.items()}, config):
        parts[tensor.path].append(tensor)
    _check_tensors(directory, stored, [tensor for part in parts.values() for tensor in part], config)
    for path, tensors in parts.items():
        variable = variables[path]
        value = np.empty(variable.shape, dtype if isinstance(variable, nnx.Param) else variable.dtype)
        for tensor in tensors:
            value[tensor.index] = tensor.from_hub(read_weight(stored, tensor.name))
        variables[path] = variable.replace(jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(variables))


def read_weight(stored: Mapping[str, StoredTensor], name: str) -> np.ndarray:
    """A stored tensor; a float8 matrix comes out as float32, each 128 x 128 block multiplied by its scale."""
    value = stored[name].read()
    if name + "_scale_inv" not in stored:
        return value
    scale = stored[name + "_scale_inv"].read().astype(np.float32)
    scale = scale.repeat(FP8_BLOCK, axis=0).repeat(FP8_BLOCK, axis=1)
    return value.astype(np.float32) * scale[: value.shape[0], : value.shape[1]]


def _check_tensors(directory: Path, stored: Mapping[str, StoredTensor], tensors: list[HubTensor], config) -> None:
    """Raises ConfigError that names the tensors which are missing, unexpected or of another shape than the model's."""
    expected = {tensor.name: tensor.shape for tensor in tensors}
    for name in tuple(expected):
        if name + "_scale_inv" in stored:
            expected[name + "_scale_inv"] = tuple(-(-size // FP8_BLOCK) for size in expected[name])
    ignored = {f"model.layers.{config.num_layers + k}.{MTP[copy]}" for k in range(config.mtp.depth) for copy in COPIES}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    unexpected = [name for name in stored if name not in expected and name not in ignored]
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")],
        "misshapen": [
            f"{name} (is {list(stored[name].shape)}, must be {list(shape)})"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ConfigError(
            f"The tensors in {directory} are not those of its config.json. {'; '.join(found)}. "
            "Download the directory again, or correct the config.json."
        )


def _some(names: list[str]) -> str:
    """The names, cut after the first few: one missing expert layer is hundreds of tensors."""
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(sorted(names)[:MAX_NAMED]) + more


def save_hf(model: Decoder, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes the model as a Hugging Face directory, parameters in their own dtype; `load_hf` gives it back to the bit.

    Args:
        model: The model, its parameters in this process' reach.
        directory: Where to; made if need be, and refused if it already holds a model.
        max_shard_bytes: Largest file; a larger model is cut into shards with an index.

    Raises:
        ConfigError: the directory holds a model, or no DeepSeek family describes this one.
    """
    directory = Path(directory)
    config = model.config
    raw = config_to_hf(config)
    held = [path.name for pattern in ("*.safetensors*", "config.json") for path in directory.glob(pattern)]
    if held:
        raise ConfigError(f"{directory} already holds {', '.join(sorted(held)[:5])}. Choose an empty directory.")
    arrays = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}
    arrays |= _implied_arrays(arrays, config)
    tensors = list(layout({path: array.shape for path, array in arrays.items()}, config))
    # Wider types first keeps every tensor at a multiple of its own width.
    tensors.sort(key=lambda tensor: -arrays[tensor.path].dtype.itemsize)
    specs = [TensorSpec(tensor.name, np.dtype(arrays[tensor.path].dtype), tensor.shape) for tensor in tensors]
    directory.mkdir(parents=True, exist_ok=True)
    write_directory(directory, specs, _hub_values(arrays, tensors), max_shard_bytes)
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _implied_arrays(arrays: Mapping[tuple, jax.Array], config: ModelConfig) -> dict[tuple, jax.Array]:
    """What the hub's files repeat or spell out: MTP's embedding and head, and V3's bias where the model has none."""
    implied = {}
    embedding = arrays["embedding", "embedding"]
    for module in range(config.mtp.depth):
        implied["mtp", module, "embedding"] = embedding
        implied["mtp", module, "head"] = embedding.T if config.tie_embeddings else arrays["head", "kernel"]
    if config.moe.scoring == "sigmoid" and not config.moe.use_router_bias:
        for *where, name in arrays:
            if name == "router":
                shape = arrays[*where, name].shape
                implied[*where, "router_bias"] = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
    return implied


def _hub_values(arrays: Mapping[tuple, jax.Array], tensors: list[HubTensor]) -> Iterator[np.ndarray]:
    """The tensors' values in the hub's layout; one of our arrays at a time is fetched from its device."""
    path, ours = None, None
    for tensor in tensors:
        if tensor.path != path:
            path, ours = tensor.path, np.asarray(arrays[tensor.path])
        yield tensor.to_hub(ours)
