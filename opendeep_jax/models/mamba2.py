"""Mamba-2 (Dao and Gu 2024): a mixer whose memory of a document is a state of fixed size.

As Nemotron-H has it: one projection gives the gate, the convolution's channels and the time steps; after the states
come a skip, the gate and a norm over each group of heads. Departs from the paper in nothing.

B batch, L length, D model width, I width of all heads, C channels of the convolution, H heads, P size of a head, N
state size, G groups, K positions of the convolution, k = K - 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.layers import Context, RMSNorm, bias, weight
from opendeep_jax.ops.linear import project
from opendeep_jax.ops.norm import rms_norm
from opendeep_jax.ops.state_space import causal_convolution, document_numbers, state_space

STEPS_AT_START = 1e-3, 1e-1
"""Time steps of an untrained model's heads are drawn between these, evenly by their logarithms."""


class MambaState(NamedTuple):
    """State after a row's tokens so far."""

    convolution: Float[Array, "B k C"]
    """The last inputs of the convolution."""
    state: Float[Array, "B H P N"]
    """Float32."""


class Mamba2(nnx.Module):
    """The mixer of a layer `M`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        mamba, D, std, dtype = config.mamba, config.hidden_size, config.init_std, config.weight_dtype
        size, channels, heads = mamba.size, mamba.conv_size, mamba.num_heads
        self.input = weight(rngs, (D, size + channels + heads), ("embed", None), std, dtype)
        self.conv = weight(rngs, (channels, 1, mamba.conv_kernel), ("norm",) * 3, mamba.conv_kernel**-0.5)
        if mamba.conv_bias:
            self.conv_bias = bias((channels,), ("norm",))
        self.decay_log = nnx.Param(jnp.log(jnp.arange(1.0, heads + 1)), logical_axes=("norm",))
        low, high = map(math.log, STEPS_AT_START)
        steps = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
        self.step_bias = nnx.Param(steps + jnp.log(-jnp.expm1(-steps)), logical_axes=("norm",))  # softplus undone
        self.skip = nnx.Param(jnp.ones((heads,), jnp.float32), logical_axes=("norm",))
        self.norm = RMSNorm(size, config.norm_epsilon)
        self.output = weight(rngs, (size, D), (None, "embed"), std, dtype)
        self.config, self.precision = mamba, config.precision

    def __call__(
        self, x: Float[Array, "B L D"], context: Context, core: Callable | None = None
    ) -> Float[Array, "B L D"]:
        """Mix the positions of each document, by `over_row` or another core."""
        return (core or type(self).over_row)(self, context, x)

    def over_row(self, context: Context, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Mix as in training: a row starts from the initial state."""
        documents = document_numbers(context.own.segment_ids)
        return self.continued(x, documents, context.valid, self.initial_state(len(x), x.dtype))[0]

    def initial_state(self, rows: int, dtype) -> MambaState:
        """Return the initial state of rows."""
        mamba = self.config
        return MambaState(
            jnp.zeros((rows, mamba.conv_kernel - 1, mamba.conv_size), dtype),
            jnp.zeros((rows, mamba.num_heads, mamba.head_dim, mamba.state_size), jnp.float32),
        )

    def continued(
        self, x: Float[Array, "B L D"], documents: Int[Array, "B L"], present: Bool[Array, "B L"], memory: MambaState
    ) -> tuple[Float[Array, "B L D"], MambaState]:
        """Return the output for positions that follow a state, and the state after the last present one.

        Args:
            documents: `ops.state_space.document_numbers`; the memory is of the first one.
            present: the others change no state; a row's present positions come first where its memory is used.
        """
        mamba, (rows, length) = self.config, x.shape[:2]
        projected = checkpoint_name(project(x, self.input[...], precision=self.precision), "mamba_input")
        gate, channels, step = jnp.split(projected, (mamba.size, mamba.size + mamba.conv_size), axis=-1)
        conv_bias = self.conv_bias[...] if mamba.conv_bias else None
        mixed = causal_convolution(channels, self.conv[...][:, 0], conv_bias, documents, memory.convolution)
        mixed = jax.nn.silu(mixed).astype(x.dtype)
        inner, b, c = jnp.split(mixed, (mamba.size, mamba.size + mamba.num_groups * mamba.state_size), axis=-1)
        inner = inner.reshape(rows, length, mamba.num_heads, mamba.head_dim)
        b, c = (y.reshape(rows, length, mamba.num_groups, mamba.state_size) for y in (b, c))
        step = jax.nn.softplus(step.astype(jnp.float32) + self.step_bias[...].astype(jnp.float32))
        step = jnp.clip(step, mamba.time_step_min, mamba.time_step_max or None)
        step = jnp.where(present[..., None], step, 0)
        decay = -jnp.exp(self.decay_log[...].astype(jnp.float32))
        out, state = state_space(inner, step, decay, b, c, documents, memory.state, mamba.chunk_size)
        out += self.skip[...].astype(jnp.float32)[:, None] * inner.astype(jnp.float32)
        out = out.reshape(rows, length, -1) * jax.nn.silu(gate.astype(jnp.float32))
        out = self.normalized(out).astype(x.dtype)
        out = project(out, self.output[...], precision=self.precision)
        return out, MambaState(self._last_channels(channels, present, memory.convolution), state)

    def normalized(self, x: Float[Array, "B L I"]) -> Float[Array, "B L I"]:
        """RMSNorm over each group of heads."""
        grouped = x.reshape(*x.shape[:-1], self.config.num_groups, -1)
        scale = self.norm.scale[...].reshape(self.config.num_groups, -1)
        return rms_norm(grouped, scale, self.norm.epsilon).reshape(x.shape)

    def _last_channels(self, channels, present, before) -> Float[Array, "B k C"]:
        """The convolution's inputs at the last present positions, those before the first one's included."""
        places = jnp.sum(present, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(before.shape[1])
        joined = jnp.concatenate([before, channels.astype(before.dtype)], axis=1)
        return jnp.take_along_axis(joined, places[..., None], axis=1)
