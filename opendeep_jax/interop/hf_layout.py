"""Mapping between the tensors of the hub's files and a model's arrays, and how the two layouts differ.

A hub matrix is [out, in], ours [in, out...] with heads apart, so each is the other transposed and reshaped: no
arithmetic, and a round trip is exact to the bit. Some files hold several arrays of ours in one tensor (`Fused`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_family import Family, Fused

# MTP module k is the hub's layer num_layers + k: a block and these.
MTP = {
    "embedding_norm.scale": "enorm.weight",
    "hidden_norm.scale": "hnorm.weight",
    "projection": "eh_proj.weight",
    "norm.scale": "shared_head.norm.weight",
}
COPIES = {"embedding": "embed_tokens.weight", "head": "shared_head.head.weight"}
"""Tensors of the main model that an MTP layer of the hub repeats; ours shares them."""


@dataclass(frozen=True)
class HubTensor:
    """A tensor of the hub's files, or some of its columns, and where it lives in the model.

    For example `model.layers.4.mlp.experts.7.down_proj.weight` of a model with 3 dense layers is at index (1, 7) of
    `moe_layers.moe.down`, with our_shape [F, D] and shape [D, F].
    """

    name: str
    path: str
    index: tuple[int, ...]
    our_shape: tuple[int, ...]
    inputs: int = 0
    """Number of our dimensions that are a transposed matrix's inputs; 0 where the file has our order."""
    first: int = 0
    """The first of the columns (the file's last dimension) that are ours."""
    step: int = 1
    """Distance from one of them to the next; 1 where the tensor is one array of ours."""

    @property
    def columns(self) -> slice:
        """The columns of the file's tensor that are ours."""
        return slice(self.first, None, self.step)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        if self.inputs:
            return math.prod(self.our_shape[self.inputs :]), math.prod(self.our_shape[: self.inputs])
        if self.flattened:
            return (math.prod(self.our_shape),)
        return *self.our_shape[:-1], self.our_shape[-1] * self.step

    @property
    def flattened(self) -> bool:
        """Return whether the file has a vector where our array has an axis of heads."""
        return self.path.endswith(("query_bias", "key_bias", "value_bias"))

    def to_hub(self, ours: np.ndarray) -> np.ndarray:
        """Our part [our_shape] as the file has it: its tensor, or the columns that are ours. A view."""
        if self.inputs:
            return ours.reshape(self.shape[::-1]).T
        return ours.reshape(-1) if self.flattened else ours

    def from_hub(self, stored: np.ndarray) -> np.ndarray:
        """Return the file's tensor in our layout, of our_shape. A view."""
        if self.inputs:
            return stored.T.reshape(self.our_shape)
        return stored.reshape(self.our_shape) if self.flattened else stored[..., self.columns]


def layout(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, family: Family) -> Iterator[HubTensor]:
    """Every tensor that the hub's files hold for a model, in the order of our arrays.

    Args:
        shapes: Shape of each of the model's arrays by name, such as "moe_layers.moe.router".
        config: The model's configuration, for the numbers of its layers.
        family: Whose names they are.
    """
    stacks = config.layer_stacks
    for path, shape in shapes.items():
        group, _, inside = path.partition(".")
        if group in stacks:
            for row, layer in enumerate(stacks[group]):
                yield from _in_block(family.block[inside], f"{family.layers}{layer}.", path, (row,), shape[1:])
        elif group == "mtp":
            module, _, inside = inside.partition(".")
            prefix = f"{family.layers}{config.num_layers + int(module)}."
            entry = family.block[inside.removeprefix("block.")] if inside.startswith("block.") else MTP[inside]
            yield from _in_block(entry, prefix, path, (), shape)
        else:
            yield HubTensor(
                family.top[path], path, (), shape, 0 if path == "embedding.embedding" else _inputs(path, shape)
            )


def _in_block(entry: str | Fused, prefix: str, path: str, index: tuple, shape: tuple) -> Iterator[HubTensor]:
    if isinstance(entry, Fused):
        yield HubTensor(prefix + entry.name, path, index, shape, first=entry.first, step=entry.step)
    elif "{expert}" in entry:
        for expert in range(shape[0]):
            name = prefix + entry.format(expert=expert)
            yield HubTensor(name, path, (*index, expert), shape[1:], _inputs(path, shape[1:]))
    else:
        yield HubTensor(prefix + entry, path, index, shape, _inputs(path, shape))


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    """A matrix's input dimensions: one, but for attention's output, whose inputs are heads apart; none of a vector."""
    if len(shape) == 1 or path.endswith("_bias"):
        return 0
    return len(shape) - 1 if path.endswith("attention.out") else 1


def copies(config: ModelConfig) -> Iterator[HubTensor]:
    """Yield the tensors that the hub's MTP layers repeat of the main model."""
    V, D = config.vocab_size, config.hidden_size
    embedding = HubTensor("", "embedding.embedding", (), (V, D))
    head = embedding if config.tie_embeddings else HubTensor("", "head.kernel", (), (D, V), inputs=1)
    for module in range(config.mtp.depth):
        for tensor, name in zip((embedding, head), COPIES.values(), strict=True):
            full = f"model.layers.{config.num_layers + module}.{name}"
            yield HubTensor(full, tensor.path, (), tensor.our_shape, tensor.inputs)
