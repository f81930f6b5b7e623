"""Cross-entropy on TPUs whose logits never leave VMEM: tiles of tokens by tiles of the vocabulary, in Mosaic.

Forward keeps a running maximum and sum of exponentials of each token (Milakov and Gimelshein 2018). Backward makes
the logits of a tile again, once for each gradient: `d_hidden` adds up over the vocabulary, `d_head` over the tokens,
each in VMEM in float32. The vocabulary is filled up with zero columns to whole tiles, and these are masked.

T tokens and R of a tile, D model width, V vocabulary and C columns of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chips import MIB
from kernels_pallas.fitting import ON_TPU, check_dtypes, fit
from kernels_pallas.target import on_chip

COLUMNS = (640, 512, 384, 256, 128)
"""Sizes that a tile of the vocabulary may have."""


def loss(hidden, head, targets, mask, z_loss_weight, chunk, softcap=0.0, interpret=False):
    """See `api.fused_cross_entropy`; `chunk` is not read.

    Raises:
        NotImplementedError: for a soft cap, for operands that are not bfloat16 or float32, for a model of width 1,
            which Mosaic cannot multiply in bfloat16, or for one too wide for the vector memory.
    """
    if hidden.shape[1] == 1:
        raise NotImplementedError("cross_entropy: mosaic_tpu takes models of width 2 or more: choose chunks.")
    if softcap:
        raise NotImplementedError("cross_entropy: mosaic_tpu has no soft cap of the logits: choose chunks.")
    check_dtypes("cross_entropy", ON_TPU, hidden, head)
    sizes = tile_sizes(hidden.shape[0], *head.shape, hidden.dtype.itemsize, on_chip("tpu").memory)
    total, each = _loss(z_loss_weight, sizes, interpret, hidden, head, targets, mask)
    return total, each


def tile_sizes(tokens: int, width: int, vocab: int, itemsize: int, memory: int) -> tuple[int, int]:
    """R and C: blocks of at most 4M and 2M numbers, and of those sizes the ones with the fewest filled columns.

    With these, and half of R where float32 sums are as large as a block of tokens, each kernel fits the 64 MB of VMEM
    that v5p and v7x have in bfloat16, and the head is read seldom enough for the matrix units to be what bounds it.
    Where that is more than `memory` bytes they are halved.

    Raises:
        NotImplementedError: where the smallest don't fit.
    """
    rows = max(min((1 << 22) // width // 128 * 128, 512), 128)

    def smaller():
        for most_rows, most in ((rows, 1 << 21), (max(rows // 2, 128), 1 << 21), (128, 1 << 20), (128, 0)):
            fitting = [size for size in COLUMNS if size * width <= most] or COLUMNS[-1:]
            columns = min(fitting, key=lambda size: (-(-vocab // size) * size, -size))
            yield min(most_rows, -(-tokens // 16) * 16), columns

    def needed(sizes):
        rows, columns = sizes
        results = (rows, 0), (_half(rows), _half(rows)), (rows, columns)
        return max(vmem(each, columns, result, width, itemsize) for each, result in results)

    return fit("cross_entropy", smaller(), needed, memory - MIB, "vector memory")


def _half(rows):
    return rows if rows % 256 else rows // 2


def vmem(rows: int, columns: int, result: int, width: int, itemsize: int) -> int:
    """Bytes of both operands and a result of so many rows, each twice, its sum, and temporaries like the logits."""
    operands = rows * width + columns * width + result * width
    return 2 * itemsize * operands + 4 * result * width + 32 * rows * columns + 12 * MIB


def _filled(hidden, head, targets, rows, columns):
    fill = -hidden.shape[0] % rows
    hidden = jnp.pad(hidden, ((0, fill), (0, 0)))
    head = jnp.pad(head, ((0, 0), (0, -head.shape[1] % columns)))
    return hidden, head, jnp.pad(targets, (0, fill))[:, None]


def _logits(hidden, head, vocab, first):
    """A tile's logits, -inf beyond the vocabulary, and its columns' numbers."""
    logits = jnp.dot(hidden[...], head[...], preferred_element_type=jnp.float32)
    column = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(column < vocab, logits, -jnp.inf), column


def _forward_kernel(hidden, head, target, log_z, target_logit, largest, total, hit, *, vocab):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        hit[...] = jnp.zeros_like(hit)

    logits, column = _logits(hidden, head, vocab, tile * head.shape[1])
    new = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
    total[...] = total[...] * jnp.exp(largest[...] - new) + jnp.sum(jnp.exp(logits - new), axis=1, keepdims=True)
    largest[...] = new
    hit[...] += jnp.sum(jnp.where(column == target[...], logits, 0.0), axis=1, keepdims=True)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        log_z[...] = largest[...] + jnp.log(total[...])
        target_logit[...] = hit[...]


def _d_logits(hidden, head, target, log_z, slope, weight, vocab, first):
    """d loss / d logits of a tile, softmax * slope - onehot(target) * weight, in the operands' type."""
    logits, column = _logits(hidden, head, vocab, first)
    softmax = jnp.exp(logits - log_z[...])
    return (softmax * slope[...] - jnp.where(column == target[...], weight[...], 0.0)).astype(hidden.dtype)


def _d_hidden_kernel(hidden, head, target, log_z, slope, weight, out, total, *, vocab):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    d_logits = _d_logits(hidden, head, target, log_z, slope, weight, vocab, tile * head.shape[1])
    contract_vocab = (((1,), (1,)), ((), ()))
    total[...] += jax.lax.dot_general(d_logits, head[...], contract_vocab, preferred_element_type=jnp.float32)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


def _d_head_kernel(hidden, head, target, log_z, slope, weight, out, total, *, vocab):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    d_logits = _d_logits(hidden, head, target, log_z, slope, weight, vocab, pl.program_id(0) * head.shape[1])
    # Transposed, [C, D]: d_logits is the smaller operand to turn round in each step, the sum is turned once.
    contract_tokens = (((0,), (0,)), ((), ()))
    total[...] += jax.lax.dot_general(d_logits, hidden[...], contract_tokens, preferred_element_type=jnp.float32)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        out[...] = total[...].T.astype(out.dtype)


def _call(kernel, name, tokens_first, operands, outputs, scratch, sizes, matmuls, interpret):
    """Run a kernel over tiles of tokens and of the vocabulary, the latter innermost if `tokens_first`.

    `operands` are hidden, head and then columns [T, 1] that belong to the tokens.
    """
    rows, columns = sizes
    hidden, head, *per_token = operands
    (tokens, width), vocab = hidden.shape, head.shape[1]
    place = (lambda i, j: (i, j)) if tokens_first else (lambda i, j: (j, i))
    blocks = {
        "hidden": pl.BlockSpec((rows, width), lambda i, j: (place(i, j)[0], 0)),
        "head": pl.BlockSpec((width, columns), lambda i, j: (0, place(i, j)[1])),
        "token": pl.BlockSpec((rows, 1), lambda i, j: (place(i, j)[0], 0)),
    }
    grid = tokens // rows, vocab // columns
    moved = hidden.size * hidden.dtype.itemsize * (1 if tokens_first else grid[1])
    moved += head.size * head.dtype.itemsize * (grid[0] if tokens_first else 1)
    moved += sum(shape.size * shape.dtype.itemsize for _, shape in outputs)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid if tokens_first else grid[::-1],
        in_specs=[blocks["hidden"], blocks["head"], *[blocks["token"]] * len(per_token)],
        out_specs=[blocks[kind] for kind, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem(rows, columns, max(scratch)[0] if matmuls > 1 else 0, width, hidden.dtype.itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * width * vocab * matmuls, bytes_accessed=moved, transcendentals=tokens * vocab
        ),
        interpret=interpret,
    )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(z_loss_weight, sizes, interpret, hidden, head, targets, mask):
    return _forward(z_loss_weight, sizes, interpret, hidden, head, targets, mask)[0]


def _forward(z_loss_weight, sizes, interpret, hidden, head, targets, mask):
    (tokens, vocab), (rows, columns) = (hidden.shape[0], head.shape[1]), sizes
    operands = _filled(hidden, head, targets, rows, columns)
    column = jax.ShapeDtypeStruct((operands[0].shape[0], 1), jnp.float32)
    log_z, target_logit = _call(
        functools.partial(_forward_kernel, vocab=vocab),
        "cross_entropy_forward",
        True,
        operands,
        [("token", column)] * 2,
        [(rows, 1)] * 3,
        sizes,
        1,
        interpret,
    )
    log_z, target_logit = log_z[:tokens, 0], target_logit[:tokens, 0]
    each = jnp.where(mask, log_z - target_logit, 0.0)
    total = jnp.sum(each) + z_loss_weight * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return (total, each), (hidden, head, targets, mask, log_z)


def _backward(z_loss_weight, sizes, interpret, saved, cotangents):
    hidden, head, targets, mask, log_z = saved
    tokens, (width, vocab) = hidden.shape[0], head.shape
    rows, columns = sizes
    weight = jnp.where(mask, cotangents[0], 0.0)
    slope = weight * (1.0 + 2.0 * z_loss_weight * log_z)
    per_token = [jnp.pad(x, (0, -tokens % rows))[:, None] for x in (log_z, slope, weight)]
    operands = *_filled(hidden, head, targets, rows, columns), *per_token
    (d_hidden,), (d_head,) = (
        _call(
            functools.partial(kernel, vocab=vocab),
            name,
            name == "cross_entropy_d_hidden",
            operands,
            [(kind, jax.ShapeDtypeStruct(like.shape, like.dtype))],
            [scratch],
            (tile_rows, columns),
            2,
            interpret,
        )
        for kernel, name, kind, like, tile_rows, scratch in (
            (_d_hidden_kernel, "cross_entropy_d_hidden", "hidden", operands[0], _half(rows), (_half(rows), width)),
            (_d_head_kernel, "cross_entropy_d_head", "head", operands[1], rows, (columns, width)),
        )
    )
    return d_hidden[:tokens], d_head[:, :vocab], None, None


_loss.defvjp(_forward, _backward)
