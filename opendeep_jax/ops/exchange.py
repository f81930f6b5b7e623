"""Tokens to experts on other devices and back, dropless (DeepSeek-V3 report, sections 2.1.2 and 3.2.2).

A token travels once to each device that holds any of its experts, which node-limited routing bounds; that device runs
all of its experts, adds up their outputs and sends one row back. Buffers hold somewhat more than the balanced number
of rows. When a batch is so unbalanced that its rows don't fit, its last tokens take another way (`exchange_overflow`):
every device of the axis knows all choices, so all agree on which those are, and nothing is dropped.

Each device of the mesh axis "expert" has T tokens of its own and e = E / n consecutive experts.
T tokens of a device, N = n T tokens of all, n devices, K experts chosen per token, E experts, e of them on a device,
D model width, F expert width (f with the row of a bias), S rows sent, R rows received, M rows of experts.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.target import platform
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ExecutionConfig
from opendeep_jax.ops.dispatch import SWIGLU, ExpertKind, grouped_experts, routed_experts
from opendeep_jax.ops.exchange_overflow import AXIS, chunk_size, sorted_choices, with_overflow
from opendeep_jax.ops.exchange_rows import NOWHERE, CopySlots, copies, segments, sums
from opendeep_jax.parallel.collectives import all_gather, all_to_all, axis_index, axis_size, psum_scatter

GATHER_AT_MOST = 4
"""Devices up to which `auto` sends all tokens to all, if an exchange could send as much."""
TILE = 256
"""Buffers of more rows than this are multiples of it."""


def exchanged_experts(
    x: Float[Array, "T D"],
    indices: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    valid: Bool[Array, "T"],
    gate: Float[Array, "e D F"],
    up: Float[Array, "e D F"],
    down: Float[Array, "e f D"],
    execution: ExecutionConfig,
    num_experts: int,
    devices_per_token: int | None = None,
    kind: ExpertKind = SWIGLU,
) -> Float[Array, "T D"]:
    """`ops.dispatch.routed_experts` where the experts are divided over the mesh axis "expert"; zeros for tokens that
    aren't `valid`. Differentiable in x, weights, gate, up and down.

    Args:
        x: this device's tokens.
        indices: experts of each token, from 0 to `num_experts` - 1, different ones.
        gate, up, down: this device's experts; device i of the axis has those from i e.
        execution: `expert_exchange` is the form and `exchange_buffer` the size of its buffers.
        devices_per_token: most devices that any token's experts lie on (`most_devices`); None for what K and n say.
        kind: the experts' precision, biases and activation.
    Raises:
        ConfigError: for the form "ragged" on a platform without ragged collectives.
    """
    n, (T, K) = axis_size(AXIS), indices.shape
    if n == 1:
        return routed_experts(x, indices, weights, gate, up, down, execution, kind)
    most = min(n, K, devices_per_token or n)
    form = exchange_form(execution.expert_exchange, most)
    choices = all_gather(jnp.where(valid[:, None], indices, num_experts).T, AXIS, 1)
    weights = all_gather(weights.T, AXIS, 1)
    sizes = buffer_sizes(T, K, num_experts, n, most, execution.exchange_buffer, form)
    fitting = checkpoint_name(fitting_tokens(choices, num_experts, n, sizes), "routing")
    experts = partial(grouped_experts, execution=execution, kind=kind, expected_rows=sizes.balanced)
    main = partial(_gathered, experts, sizes) if form == "gather" else partial(_exchanged, experts, form, sizes)
    arrays = x, weights, gate, up, down
    return main(arrays, choices) if sizes.exact else with_overflow(main, kind, arrays, choices, fitting)


def exchange_form(name: str, most_devices: int) -> str:
    """The form that `execution.expert_exchange` means here: `gather`, `ragged` or `all_to_all`.

    Gathering and scattering sends every row to n - 1 devices, an exchange to at most `most_devices`.
    """
    if name == "ragged" and platform() == "cpu":
        raise ConfigError(
            "model.execution.expert_exchange = 'ragged': this platform, cpu, has no ragged collectives. "
            "Use 'all_to_all', which does the same with padded slots, or 'auto'."
        )
    if name != "auto":
        return name
    if axis_size(AXIS) <= min(most_devices, GATHER_AT_MOST):
        return "gather"
    return "all_to_all" if platform() == "cpu" else "ragged"


def most_devices(num_experts: int, chosen: int, num_groups: int, groups_per_token: int, devices: int) -> int:
    """Most devices that the experts of one token can lie on, by the groups that its choice is limited to."""
    group, share = num_experts // num_groups, num_experts // devices
    # Of all places where a group may begin on a device, the last reaches furthest: a gcd before the device's end.
    spanned = (share - math.gcd(group, share) + group - 1) // share + 1
    return min(devices, chosen, groups_per_token * spanned)


class Sizes(NamedTuple):
    """Static sizes of an exchange."""

    sent: int
    """Rows S sent, at most: exact."""
    received: int
    """Rows R of the buffer of received rows."""
    expert_rows: int
    """Rows M of the buffer that the experts work on."""
    balanced: int
    """Number of received rows when the load is balanced."""
    exact: bool
    """True if the buffers are large enough for any choice of experts."""


def buffer_sizes(
    tokens: int, chosen: int, num_experts: int, devices: int, most: int, buffer: float, form: str
) -> Sizes:
    """The `Sizes` for buffers of `buffer` times the balanced rows, but no more than there can be."""

    def room(balanced, at_most):
        rows = min(max(int(buffer * balanced), 1), at_most)
        return rows if rows <= TILE else -(-rows // TILE) * TILE

    all_tokens = devices * tokens
    all_choices = all_tokens * min(chosen, num_experts // devices)
    expert_rows = room(tokens * chosen, all_choices)
    received = all_tokens if form == "gather" else room(tokens * most, all_tokens)
    exact = expert_rows >= all_choices and received >= all_tokens
    return Sizes(tokens * most, received, expert_rows, tokens * chosen, exact)


def fitting_tokens(choices: Int[Array, "K N"], num_experts: int, devices: int, sizes: Sizes) -> Int[Array, ""]:
    """Return how many of each device's first tokens fit all devices' buffers: a multiple of `chunk_size`, or all T."""
    tokens = choices.shape[1] // devices
    if sizes.exact:
        return jnp.int32(tokens)
    chunk = chunk_size(tokens)
    rows = _on_device(choices, num_experts, devices)
    counts = jnp.stack([jnp.sum(rows, axis=1), jnp.any(rows, axis=1)]).astype(jnp.int32)
    counts = counts.reshape(2, devices, devices, tokens)  # of each receiver and sender
    counts = jnp.pad(counts, ((0, 0), (0, 0), (0, 0), (0, -tokens % chunk)))
    counts = jnp.sum(counts.reshape(2, devices, devices, -1, chunk), axis=(2, 4))
    limits = jnp.asarray([sizes.expert_rows, sizes.received])[:, None, None]
    fits = jnp.all(jnp.cumsum(counts, axis=2) <= limits, axis=(0, 1))
    return jnp.minimum(jnp.sum(fits, dtype=jnp.int32) * chunk, tokens)


def _on_device(choices, num_experts, devices):
    """True [n, K, N] where a choice lies on a device."""
    return choices // (num_experts // devices) == jnp.arange(devices)[:, None, None]


def _gathered(experts, sizes, arrays, choices):
    """The form "gather": all tokens through the experts of this device, and the sums of all devices back."""
    x, weights, gate, up, down = arrays
    x = checkpoint_name(all_gather(x, AXIS, 0), "received")
    place = jnp.arange(x.shape[0], dtype=jnp.int32)
    return psum_scatter(_local_experts(experts, sizes, x, place, choices, weights, gate, up, down), AXIS, 0)


def _exchanged(experts, form, sizes, arrays, choices):
    """Send this device's tokens [T, D] to their experts on any device, and return the outputs."""
    x, weights, gate, up, down = arrays
    (T, _), n = x.shape, axis_size(AXIS)
    there, back, sent, place = checkpoint_name(_routes(choices, gate.shape[0] * n, T, n, sizes), "routing")
    leaving = copies(x.reshape(T, *row_shape(x.shape[1])), sent)
    received = _moved(form, sizes.sent, sizes.received, leaving, there, back)
    received = checkpoint_name(received.reshape(sizes.received, -1), "received")
    partials = _local_experts(experts, sizes, received, place, choices, weights, gate, up, down)
    partials = partials.reshape(sizes.received, *row_shape(x.shape[1]))
    returned = _moved(form, sizes.received, sizes.sent, partials, back, there)
    return sums(returned, sent, T).reshape(T, -1)


def row_shape(width: int) -> tuple[int, ...]:
    """The shape that rows of this width travel in: on a TPU, where it can be, one whose rows are whole memory tiles.

    A TPU keeps 8 rows of a matrix in a tile of 8 x 128, but sends rows, so a matrix would be laid out anew for it.
    """
    return (8, width // 8) if platform() == "tpu" and width % 1024 == 0 else (width,)


class Route(NamedTuple):
    """The arguments of `lax.ragged_all_to_all` that say which rows go where; each has an entry per device."""

    input_offsets: Int[Array, "n"]
    send_sizes: Int[Array, "n"]
    output_offsets: Int[Array, "n"]
    recv_sizes: Int[Array, "n"]


def _routes(choices, num_experts, tokens, devices, sizes):
    """Return the plans of both exchanges, the token of each sent row, and the received row of each token [N].

    Rows are sent in the order (device, token) and received in the order (sender, token).
    """
    me = axis_index(AXIS)
    lands = jnp.any(_on_device(choices, num_experts, devices), axis=1)  # [n, N]
    matrix = jnp.sum(lands.reshape(devices, devices, tokens), axis=2, dtype=jnp.int32)  # [receiver, sender]
    send_offsets = jnp.cumsum(matrix, axis=0) - matrix
    receive_offsets = jnp.cumsum(matrix, axis=1) - matrix
    there = Route(send_offsets[:, me], matrix[:, me], receive_offsets[:, me], matrix[me])
    back = Route(receive_offsets[me], matrix[me], send_offsets[me], matrix[:, me])

    arriving = lands[me]
    place = jnp.where(arriving, jnp.cumsum(arriving, dtype=jnp.int32) - 1, NOWHERE)
    leaving = lax.dynamic_slice_in_dim(lands, me * tokens, tokens, axis=1)  # [n, T]
    flat = leaving.reshape(-1)
    ordered = jnp.sort(jnp.where(flat, jnp.arange(flat.size, dtype=jnp.int32), NOWHERE), stable=False)[: sizes.sent]
    slot = (jnp.cumsum(flat, dtype=jnp.int32) - 1).reshape(leaving.shape)
    rank = jnp.cumsum(leaving, axis=0, dtype=jnp.int32)  # of a device among those of the token
    wanted = leaving & (rank == jnp.arange(1, sizes.sent // tokens + 1)[:, None, None])  # [J, n, T]
    sent = CopySlots(ordered % tokens, jnp.sum(jnp.where(wanted, slot, 0), axis=1), jnp.any(wanted, axis=1))
    return there, back, sent, place


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _moved(form, num_rows, num_moved, rows, route, reverse):
    """Rows [num_rows, …] along a route into a buffer [num_moved, …]; what nothing is written to holds anything."""
    buffer = lax.empty((num_moved, *rows.shape[1:]), rows.dtype)
    collective = padded_all_to_all if form == "all_to_all" else lax.ragged_all_to_all
    return collective(rows, buffer, *route, axis_name=AXIS)


def _moved_forward(form, num_rows, num_moved, rows, route, reverse):
    return _moved(form, num_rows, num_moved, rows, route, reverse), (route, reverse)


def _moved_backward(form, num_rows, num_moved, saved, cotangent):
    route, reverse = saved
    return _moved(form, num_moved, num_rows, cotangent, reverse, route), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def padded_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` by a dense all-to-all whose slots hold as many rows as fit either buffer."""
    slot = jnp.arange(min(operand.shape[0], output.shape[0]))
    padded = operand.at[input_offsets[:, None] + slot].get(mode="clip")
    offsets = all_to_all(output_offsets, axis_name, 0, 0)
    places = jnp.where(slot < recv_sizes[:, None], offsets[:, None] + slot, output.shape[0])
    return output.at[places].set(all_to_all(padded, axis_name, 0, 0), mode="drop", unique_indices=True)


def _local_experts(experts, sizes, received, place, choices, weights, gate, up, down):
    """The sum of each received row's local experts, [R, D]; zeros for rows that chose none of them.

    Args:
        received: rows [R, D].
        place: the row [N] of each token, anything where none of its experts is here.
        choices, weights: [K, N] of all tokens.
    """
    key, choice, group_sizes = sorted_choices(choices, place, received.shape[0], gate.shape[0])
    key, choice = key[: sizes.expert_rows], choice[: sizes.expert_rows]
    present = key < NOWHERE
    index = segments(jnp.where(present, key % received.shape[0], NOWHERE))
    group_sizes, choice, index = checkpoint_name(
        (group_sizes, jnp.where(present, choice, choice + weights.size), index), "routing"
    )
    row_weights = weights.reshape(-1).at[choice].get(mode="fill", fill_value=0, unique_indices=True)
    rows = copies(received, index)
    rows = experts(rows, row_weights, gate, up, down, group_sizes)
    return sums(rows, index, received.shape[0])
