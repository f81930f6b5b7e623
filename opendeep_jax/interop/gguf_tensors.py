"""Mapping between the tensors of a GGUF file and our arrays, and conversion between the two layouts.

One table serves both ways. GGUF matrices are [out, in], as Hugging Face has them; heads of `llama` are stored with the
two halves that are rotated together interleaved; the experts of a layer are one tensor; DeepSeek's up-projection of
keys and values is two, the keys' transposed.

Letters in shapes: D model width, E experts, F width of an expert, H heads, C rank of the latent, N/V parts of its keys
and values.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from opendeep_jax.config.schema import ModelConfig

TOP = {
    "embedding.embedding": "token_embd.weight",
    "final_norm.scale": "output_norm.weight",
    "final_norm.bias": "output_norm.bias",
    "head.kernel": "output.weight",
}
# Inside blk.N.
BLOCK = {
    "attention_norm.scale": "attn_norm.weight",
    "attention_norm.bias": "attn_norm.bias",
    "attention_post_norm.scale": "post_attention_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "mlp_norm.bias": "ffn_norm.bias",
    "mlp_post_norm.scale": "post_ffw_norm.weight",
    "attention.query": "attn_q.weight",
    "attention.key": "attn_k.weight",
    "attention.value": "attn_v.weight",
    "attention.out": "attn_output.weight",
    "attention.query_bias": "attn_q.bias",
    "attention.key_bias": "attn_k.bias",
    "attention.value_bias": "attn_v.bias",
    "attention.out_bias": "attn_output.bias",
    "attention.query_norm.scale": "attn_q_norm.weight",
    "attention.key_norm.scale": "attn_k_norm.weight",
    "attention.sinks": "attn_sinks.weight",
    "attention.q_proj": "attn_q.weight",
    "attention.q_down": "attn_q_a.weight",
    "attention.q_norm.scale": "attn_q_a_norm.weight",
    "attention.q_up": "attn_q_b.weight",
    "attention.kv_down": "attn_kv_a_mqa.weight",
    "attention.kv_norm.scale": "attn_kv_a_norm.weight",
    "attention.kv_up": "attn_kv_b.weight",  # of files before 2025; split into KEYS and VALUES since
    "mlp.gate": "ffn_gate.weight",
    "mlp.up": "ffn_up.weight",
    "mlp.down": "ffn_down.weight",
    "moe.router": "ffn_gate_inp.weight",
    "moe.router_linear_bias": "ffn_gate_inp.bias",
    "moe.router_bias": "exp_probs_b.bias",
    "moe.gate": "ffn_gate_exps.weight",
    "moe.up": "ffn_up_exps.weight",
    "moe.down": "ffn_down_exps.weight",
    "moe.gate_bias": "ffn_gate_exps.bias",
    "moe.up_bias": "ffn_up_exps.bias",
    "moe.down_bias": "ffn_down_exps.bias",
    "moe.shared.gate": "ffn_gate_shexp.weight",
    "moe.shared.up": "ffn_up_shexp.weight",
    "moe.shared.down": "ffn_down_shexp.weight",
}
KEYS, VALUES = "attn_k_b.weight", "attn_v_b.weight"
RENAMED = {"gpt-oss": {"mlp_norm.scale": "post_attention_norm.weight"}}
HEADS_INSIDE = ("attention.out",)  # [H, V, D]: its heads are on the input side
EXPERTS = ("moe.gate", "moe.up", "moe.down")
ROTATED = ("attention.query", "attention.key", "attention.query_bias", "attention.key_bias")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file and where it lives in the model: `blk.4.attn_q.weight` of a model without dense layers is at
    index (4,) of `moe_layers.attention.query`, with our_shape [D, H, Q] and the file's shape [H*Q, D]."""

    name: str
    variable: str
    index: tuple[int, ...]
    our_shape: tuple[int, ...]
    how: Literal["same", "matrix", "heads_inside", "experts", "keys", "values", "flat"] = "same"
    begin: int = 0
    end: int | None = None
    """The part of our last axis that this is."""
    pairs: int = 0
    """Half the size of a rotated head whose halves the file interleaves; 0 where it does not."""
    shift: float = 0.0
    """Offset that the file adds: it holds 1 + weight where ours is centered on zero."""

    @property
    def section(self) -> slice:
        """Section of our last axis."""
        return slice(self.begin, self.end)

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape in the file."""
        ours = (*self.our_shape[:-1], len(range(self.our_shape[-1])[self.section]))
        first = ours[0]
        rest = math.prod(ours[1:])
        return {
            "same": ours,
            "flat": (first * rest,),
            "matrix": (rest, first),
            "heads_inside": (ours[-1], math.prod(ours[:-1])),
            "experts": (first, *ours[:0:-1]),
            "keys": (*ours[1:2], first, ours[-1]),
            "values": (*ours[1:2], ours[-1], first),
        }[self.how]

    def to_file(self, ours: np.ndarray) -> np.ndarray:
        """Return the file's tensor out of the layer's array, of our_shape."""
        part = ours[..., self.section]
        stored = {
            "same": lambda: part,
            "flat": lambda: part.reshape(-1),
            "matrix": lambda: part.reshape(part.shape[0], -1).T,
            "heads_inside": lambda: part.reshape(-1, part.shape[-1]).T,
            "experts": lambda: part.swapaxes(-1, -2),
            "keys": lambda: part.transpose(1, 0, 2),
            "values": lambda: part.transpose(1, 2, 0),
        }[self.how]()
        stored = stored + np.asarray(self.shift, stored.dtype) if self.shift else stored
        return _interleave(stored, self.pairs, back=False) if self.pairs else stored

    def from_file(self, stored: np.ndarray) -> np.ndarray:
        """Return the file's tensor in our layout: of our_shape, with the last axis' section only."""
        stored = _interleave(stored, self.pairs, back=True) if self.pairs else stored
        stored = stored - np.asarray(self.shift, stored.dtype) if self.shift else stored
        ours = (*self.our_shape[:-1], len(range(self.our_shape[-1])[self.section]))
        return {
            "same": lambda: stored,
            "flat": lambda: stored.reshape(ours),
            "matrix": lambda: stored.T.reshape(ours),
            "heads_inside": lambda: stored.T.reshape(ours),
            "experts": lambda: stored.swapaxes(-1, -2),
            "keys": lambda: stored.transpose(1, 0, 2),
            "values": lambda: stored.transpose(2, 0, 1),
        }[self.how]()


def _interleave(rows: np.ndarray, half: int, back: bool) -> np.ndarray:
    """Rows of heads with the two halves of each put in pairs, or back again."""
    first, second = (half, 2) if back else (2, half)
    return rows.reshape(-1, first, second, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def layout(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, architecture: str, names: Iterable[str] = ()
) -> Iterator[FileTensor]:
    """Every tensor that a file holds for a model, in the order of our variables; MTP modules have none.

    Args:
        shapes: Shape of each of the model's arrays by name, such as `moe_layers.moe.router`.
        config: The model's configuration.
        architecture: As `general.architecture` has it.
        names: The tensors of a file that is read, which tell its age.
    """
    whole_kv = any(name.endswith(BLOCK["attention.kv_up"]) for name in names)
    table = BLOCK | RENAMED.get(architecture, {})
    for variable, shape in shapes.items():
        group, _, inside = variable.partition(".")
        if group == "mtp":
            continue
        if group not in ("dense_layers", "moe_layers"):
            how = "matrix" if variable == "head.kernel" else "same"
            yield FileTensor(TOP[variable], variable, (), shape, how, shift=_shift(variable, config))
            continue
        first = 0 if group == "dense_layers" else config.num_leading_dense_layers
        for row in range(shape[0]):
            make = partial(_in_block, variable, inside, (row,), shape[1:], config, architecture)
            prefix = f"blk.{first + row}."
            if inside == "attention.kv_up" and not whole_kv:
                size = config.attention.qk_nope_head_dim
                yield make(prefix + KEYS, how="keys", end=size)
                yield make(prefix + VALUES, how="values", begin=size)
            else:
                yield make(prefix + table[inside])


def _in_block(variable, inside, index, shape, config, architecture, name, how="", begin=0, end=None) -> FileTensor:
    halves_apart = architecture == "llama" and not config.attention.rope.interleaved
    pairs = config.attention.head_dim // 2 if halves_apart and inside in ROTATED else 0
    shift = _shift(variable, config)
    return FileTensor(name, variable, index, shape, how or _how(inside, shape), begin, end, pairs, shift)


def _how(inside: str, shape: tuple[int, ...]) -> str:
    if inside in EXPERTS:
        return "experts"
    if inside in HEADS_INSIDE:
        return "heads_inside"
    if inside.endswith("_bias"):
        return "flat" if inside.startswith("attention.") else "same"
    return "matrix" if len(shape) > 1 else "same"


def _shift(variable: str, config: ModelConfig) -> float:
    return 1.0 if config.norm != "rms" and variable.endswith("norm.scale") else 0.0
