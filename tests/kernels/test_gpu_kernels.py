"""The GPU kernels in Pallas' interpreter against float64, and what the H100 compiler makes of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.flash_mla import gpu as flash_mla_gpu
from kernels_pallas.grouped_matmul import gpu as grouped_matmul_gpu
from kernels_pallas.mla_decode import gpu as mla_decode_gpu

grouped_matmul = partial(grouped_matmul_gpu.grouped_matmul, interpret=True)
grouped_swiglu = partial(grouped_matmul_gpu.grouped_swiglu, interpret=True)


def close(result, want, tolerance=1e-5):
    want = np.asarray(want, np.float64)
    scale = max(np.abs(want).max(initial=0), 1)
    np.testing.assert_allclose(np.asarray(result, np.float64), want, atol=tolerance * scale, rtol=0)


# ------------------------------------------------------------------------------------------------------ grouped matmul
ROWS, INNER, WIDTH = 150, 70, 36  # multiples of no block, and more than one of rows and of the inner size


def grouped_products(lhs, rhs, sizes, cotangent):
    """The definition of grouped_matmul in numpy, and the gradients of sum(out * cotangent)."""
    out, d_lhs, d_rhs, start = np.zeros(cotangent.shape), np.zeros(lhs.shape), np.zeros(rhs.shape), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows], d_lhs[rows] = lhs[rows] @ rhs[group], cotangent[rows] @ rhs[group].T
        d_rhs[group] = lhs[rows].T @ cotangent[rows]
        start += size
    return out, d_lhs, d_rhs


def experts(lhs, gate, up, sizes, weights, cotangent):
    """The definition of grouped_swiglu in numpy, and its gradients for lhs, gate, up and weights."""
    gated, upped = (grouped_products(lhs, matrices, sizes, cotangent)[0] for matrices in (gate, up))
    sigmoid = 1 / (1 + np.exp(-gated))
    silu, slope = gated * sigmoid, sigmoid * (1 + gated * (1 - sigmoid))
    _, from_gate, d_gate = grouped_products(lhs, gate, sizes, cotangent * weights[:, None] * upped * slope)
    _, from_up, d_up = grouped_products(lhs, up, sizes, cotangent * weights[:, None] * silu)
    d_weights = np.sum(cotangent * silu * upped, axis=1)
    return silu * upped * weights[:, None], from_gate + from_up, d_gate, d_up, d_weights


def grouped_operands(groups, rows=ROWS):
    """lhs, gate, up, row weights and a cotangent, float32."""
    random = np.random.default_rng(0)
    shapes = (rows, INNER), (groups, INNER, WIDTH), (groups, INNER, WIDTH), (rows,), (rows, WIDTH)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@jax.jit
def pulled_matmul(lhs, rhs, sizes, cotangent):
    out, pull = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes), lhs, rhs)
    return out, *pull(cotangent)


@jax.jit
def pulled_swiglu(lhs, gate, up, sizes, row_weights, cotangent):
    function = lambda *x: grouped_swiglu(*x[:3], sizes, x[3])  # noqa: E731
    out, pull = jax.vjp(function, lhs, gate, up, row_weights)
    return out, *pull(cotangent)


def check_grouped(sizes, rows=ROWS):
    lhs, gate, up, row_weights, cotangent = grouped_operands(len(sizes), rows)
    used = sum(sizes)
    # What lies beyond the groups may be anything.
    dirty = [np.where(np.arange(rows) < used, x.T, np.nan).T for x in (lhs, row_weights, cotangent)]
    clean = [np.where(np.arange(rows) < used, x.T, 0).T.astype(np.float64) for x in (lhs, row_weights, cotangent)]
    sizes_array = np.array(sizes, np.int32)
    gate64, up64 = gate.astype(np.float64), up.astype(np.float64)
    results = pulled_matmul(dirty[0], gate, sizes_array, dirty[2])
    for result, want in zip(results, grouped_products(clean[0], gate64, sizes, clean[2]), strict=True):
        close(result, want)
    results = pulled_swiglu(dirty[0], gate, up, sizes_array, *dirty[1:])
    for result, want in zip(results, experts(clean[0], gate64, up64, sizes, *clean[1:]), strict=True):
        close(result, want)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1, 100, 7, 42], id="ragged"),
        pytest.param([0, 130, 0, 0], id="empty groups"),
        pytest.param([0, 0, 0, 0], id="nothing at all"),
        pytest.param([64, 33, 0, 17], id="rows beyond the sum"),
    ],
)
def test_groups_meet_their_matrices_forwards_and_backwards(sizes):
    check_grouped(sizes)


def test_there_may_be_more_groups_than_rows():
    check_grouped([0, 1, 0, 2, 0, 1, 0, 1], rows=5)


@settings(max_examples=6)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=4, max_size=4))
def test_any_group_sizes(cuts):
    check_grouped([int(size) for size in np.diff(sorted(cuts), prepend=0)])


row_tiles = jax.jit(grouped_matmul_gpu._row_tiles, static_argnums=(1, 2))


@given(cuts=st.lists(st.integers(0, ROWS), min_size=6, max_size=6))
def test_every_row_is_in_exactly_one_tile_which_no_group_shares(cuts):
    sizes, rows, block = np.diff(sorted(cuts), prepend=0), ROWS, 16
    tiles = row_tiles(sizes, rows, block)
    seen = np.full(rows, -1)
    for group, start, end in zip(*map(np.asarray, tiles), strict=True):
        mine = slice(start, min(start + block, end))
        assert np.all(seen[mine] == -1)
        seen[mine] = group
    np.testing.assert_array_equal(seen, np.repeat(np.arange(7), [*sizes, rows - sum(sizes)]))


def test_bfloat16_is_summed_in_float32():
    lhs, rhs = jnp.full((4, 512), 1.0, jnp.bfloat16), jnp.full((1, 512, 16), 1 + 2**-7, jnp.bfloat16)
    out = grouped_matmul(lhs, rhs, jnp.array([4]))
    assert out.dtype == jnp.bfloat16 and np.all(np.asarray(out, np.float32) == 516)


def test_operands_of_two_dtypes_are_refused():
    with pytest.raises(NotImplementedError, match="float32 and bfloat16"):
        grouped_matmul(jnp.ones((4, 16)), jnp.ones((1, 16, 16), jnp.bfloat16), jnp.array([4]))


# ------------------------------------------------------------------------------------------------------ attention
HEADS, NOPE, ROPE, VALUE = 3, 16, 8, 12  # the value's size is no power of two
SCALE = 0.3


def visible_pairs(query_segments, key_segments, query_order, key_order):
    return (query_segments[:, :, None] == key_segments[:, None]) & (query_order[:, :, None] >= key_order[:, None])


def attention(query_nope, query_rope, key_nope, key_rope, value, visible, cotangent):
    """The definition in numpy, and the gradients of sum(out * cotangent)."""
    heads = lambda x: x.reshape(*x.shape[:2], HEADS, -1)  # noqa: E731
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731
    query = np.concatenate([heads(query_nope), heads(query_rope)], axis=3)
    ropes = np.broadcast_to(key_rope[:, :, None], (*key_rope.shape[:2], HEADS, ROPE))
    key = np.concatenate([heads(key_nope), ropes], axis=3)
    scores = np.where(visible[:, None], np.einsum("blhq,bshq->bhls", query, key) * SCALE, -1e30)
    weights = np.exp(scores - np.max(scores, axis=3, keepdims=True)) * visible[:, None]
    weights /= np.maximum(np.sum(weights, axis=3, keepdims=True), 1e-30)
    d_weights = np.einsum("blhv,bshv->bhls", heads(cotangent), heads(value))
    d_scores = SCALE * weights * (d_weights - np.sum(weights * d_weights, axis=3, keepdims=True))
    d_query, d_key = np.einsum("bhls,bshq->blhq", d_scores, key), np.einsum("bhls,blhq->bshq", d_scores, query)
    return (
        flat(np.einsum("bhls,bshv->blhv", weights, heads(value))),
        *(flat(d_query[..., :NOPE]), flat(d_query[..., NOPE:])),
        *(flat(d_key[..., :NOPE]), np.sum(d_key[..., NOPE:], axis=2)),
        flat(np.einsum("bhls,blhv->bshv", weights, heads(cotangent))),
    )


def attention_operands(batch, length, size):
    random = np.random.default_rng(0)
    widths = [(length, HEADS * NOPE), (length, HEADS * ROPE), (size, HEADS * NOPE), (size, ROPE), (size, HEADS * VALUE)]
    return [random.normal(size=(batch, *shape)).astype(np.float32) for shape in [*widths, (length, HEADS * VALUE)]]


@jax.jit
def pulled_attention(operands, segments, orders, cotangent):
    function = partial(flash_mla_gpu.flash_mla, num_heads=HEADS, scale=SCALE, interpret=True)
    out, pull = jax.vjp(lambda *operands: function(*operands, *segments, *orders), *operands)
    return out, *pull(cotangent)


def check_attention(segments, orders, dtype=jnp.float32, tolerance=1e-5):
    *operands, cotangent = attention_operands(segments[0].shape[0], segments[0].shape[1], segments[1].shape[1])
    operands, cotangent = [jnp.asarray(x, dtype) for x in operands], jnp.asarray(cotangent, dtype)
    indices = [np.broadcast_to(np.arange(x.shape[1]), x.shape) for x in segments] if orders[0] is None else orders
    wide = [np.asarray(x, np.float64) for x in (*operands, cotangent)]
    wanted = attention(*wide[:5], visible_pairs(*segments, *indices), wide[5])
    results = pulled_attention(operands, segments, orders, cotangent)
    for result, want in zip(results, wanted, strict=True):
        assert result.dtype == dtype
        close(result, want, tolerance)


def packed(length, *cuts):
    """Segment ids [1, L]: documents 1, 2, … and from the last cut on padding."""
    ids = 1 + np.searchsorted(np.array(cuts), np.arange(length), side="right")
    return np.where(ids > len(cuts), 0, ids)[None].astype(np.int32)


def test_packed_documents_see_themselves_backwards_in_time():
    ids = np.concatenate([packed(100, 37, 90), packed(100, 1, 64, 65, 100)])
    check_attention((ids, ids), (None, None))


def test_bfloat16_stays_within_its_rounding():
    ids = packed(300, 70, 290)
    check_attention((ids, ids), (None, None), jnp.bfloat16, 2e-2)


def test_order_and_segments_of_queries_and_keys_may_be_anything():
    """As in context parallelism, where a device holds an early and a late part of each row; and worse."""
    ids, index, random = packed(100, 60, 100), np.arange(100, dtype=np.int32)[None], np.random.default_rng(1)
    parts = np.r_[10:40, 70:97]
    check_attention((ids[:, parts], ids), (index[:, parts], index))
    check_attention((ids[:, parts], ids), (random.permutation(100)[None, :57].astype(np.int32), index[:, ::-1]))


def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient():
    ids, index = packed(100, 100), np.arange(100, dtype=np.int32)[None]
    queries = np.where(np.arange(57) < 50, 1, 2)[None].astype(np.int32)
    check_attention((queries, ids), (index[:, :57], index))


BLOCKS = flash_mla_gpu.LARGEST[4].forward
spans_of = jax.jit(lambda marks: flash_mla_gpu._spans(*flash_mla_gpu._block_visibility(marks, BLOCKS)))


@given(seed=st.integers(0, 2**32 - 1), shuffled=st.booleans())
def test_no_visible_pair_is_outside_its_span_and_no_hidden_one_inside_a_run(seed, shuffled):
    random, block = np.random.default_rng(seed), BLOCKS.q
    query_segments, key_segments = (np.sort(random.integers(0, 3, (1, size))) for size in (130, 230))
    query_order, key_order = np.sort(random.integers(0, 230, (1, 130))), np.arange(230)[None]
    if shuffled:
        query_order, key_segments = random.permuted(query_order), random.permuted(key_segments)
    marks = flash_mla_gpu._Marks(query_order, query_segments, key_order, key_segments)
    pairs = visible_pairs(query_segments, key_segments, query_order, key_order)[0]
    for i, (first, start, stop, end) in enumerate(zip(*(np.asarray(span)[0] for span in spans_of(marks)), strict=True)):
        seen = pairs[i * block : (i + 1) * block]
        assert first <= start <= stop <= end
        assert not seen[:, : first * block].any() and not seen[:, end * block :].any()
        assert seen[:, start * block : stop * block].all() and (start == stop or stop * block <= 230)


def test_rematerialization_can_keep_what_the_backward_pass_needs(capsys):
    *operands, _ = attention_operands(1, 40, 40)
    ids = packed(40, 40)
    function = partial(flash_mla_gpu.flash_mla, num_heads=HEADS, scale=SCALE, interpret=True)
    policy = jax.checkpoint_policies.save_only_these_names("attention_output")
    attend = jax.checkpoint(lambda *x: function(*x, ids, ids, None, None), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(attend, *operands)
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "attention_output" in line]
    assert set(kept) == {f"f32[1,40,{HEADS * VALUE}]", f"f32[1,{HEADS},40]"}


# ------------------------------------------------------------------------------------------------------ decoding
def decoded(query_latent, query_rope, cache, page_table, lengths, scale):
    """The definition in numpy, row by row; a row without a past gives zeros."""
    out = np.zeros(query_latent.shape)
    for row, length in enumerate(lengths):
        keys = cache[page_table[row]].reshape(-1, cache.shape[2])[:length].astype(np.float64)
        scores = np.concatenate([query_latent[row], query_rope[row]], axis=1) @ keys.T * scale
        weights = np.exp(scores - np.max(scores, axis=1, keepdims=True, initial=-1e30))
        if length:
            out[row] = weights / np.sum(weights, axis=1, keepdims=True) @ keys[:, : query_latent.shape[2]]
    return out


@pytest.mark.parametrize("page", [pytest.param(32, id="a page in blocks"), pytest.param(5, id="a page within a block")])
def test_decoding_reads_its_rows_pages_up_to_their_lengths(page, monkeypatch):
    monkeypatch.setattr(mla_decode_gpu, "PROGRAMS", 18)  # 3 parts of each row's cache
    random, rows, heads, pages = np.random.default_rng(0), 6, 5, 7
    query_latent, query_rope = (random.normal(size=(rows, heads, size)).astype(np.float32) for size in (16, 16))
    cache = random.normal(size=(rows * pages + 1, page, 32)).astype(np.float32)
    page_table = random.permutation(rows * pages).reshape(rows, pages).astype(np.int32)
    lengths = np.array([0, 1, page, page + 1, 3 * page - 1, pages * page], np.int32)
    arguments = query_latent, query_rope, cache, page_table, lengths, 0.3
    dirty = cache.copy()
    used = {page_table[row, at // page] * page + at % page for row in range(rows) for at in range(lengths[row])}
    dirty.reshape(-1, 32)[sorted(set(range(dirty.shape[0] * page)) - used)] = np.nan
    out = jax.jit(partial(mla_decode_gpu.mla_decode, interpret=True), static_argnums=5)(
        *arguments[:2], dirty, *arguments[3:]
    )
    close(out, decoded(*arguments))


def test_decoding_refuses_latents_that_no_block_holds():
    query, cache, table = jnp.ones((1, 4, 24)), jnp.ones((1, 4, 40)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match="24 \\+ 16: both must be powers of two"):
        mla_decode_gpu.mla_decode(query, query[..., :16], cache, table, jnp.array([1]), 1.0)


# ------------------------------------------------------------------------------------------------------ the compiler
def test_the_kernels_compile_for_an_h100_that_is_not_there_and_say_what_they_cost():
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the extra gpu-compiler is not installed")
    from jax.experimental import topologies

    from opendeep_jax.plan.gpu_target import gpu_target

    h100 = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=gpu_target("h100")
    )
    mesh = topologies.make_mesh(h100, (1,), ("x",))
    everywhere = jax.sharding.PartitionSpec()
    heads, length, rows, groups, inner, width = 2, 512, 512, 4, 256, 256

    def loss(query_nope, query_rope, key_rope, ids, lhs, matrices, sizes):
        arguments = query_nope, query_rope, query_nope, key_rope, query_nope, ids, ids, None, None
        attended = flash_mla_gpu.flash_mla(*arguments, num_heads=heads, scale=SCALE)
        hidden = grouped_matmul_gpu.grouped_swiglu(lhs, matrices, matrices, sizes)
        out = grouped_matmul_gpu.grouped_matmul(hidden, matrices, sizes)
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in (attended, out))

    gradients = jax.grad(loss, argnums=(0, 1, 2, 4, 5))
    program = jax.shard_map(gradients, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    sharding = jax.sharding.NamedSharding(mesh, everywhere)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    bf16 = partial(array, jnp.bfloat16)
    compiled = (
        jax.jit(program)
        .trace(
            bf16(1, length, heads * 128),
            bf16(1, length, heads * 64),
            bf16(1, length, 64),
            array(jnp.int32, 1, length),
            bf16(rows, inner),
            bf16(groups, inner, width),
            array(jnp.int32, groups),
        )
        .lower(lowering_platforms=("cuda",))
        .compile()
    )
    text, pairs = compiled.as_text(), heads * length * (length + 1) // 2
    product = 2 * rows * inner * width
    costs = {
        "flash_mla": 2 * pairs * 320,
        "flash_mla_d_keys": 4 * pairs * 320,
        "flash_mla_d_queries": pairs * (4 * 192 + 2 * 128),
        "grouped_swiglu": 2 * product,
        "grouped_matmul": product,
        "grouped_matmul_d_lhs": 2 * product,
        "grouped_matmul_d_rhs": product,
    }
    for name, flops in costs.items():
        calls = [line for line in text.splitlines() if f'name = "{name}"' in line]
        assert any(rf"\22flops\22: \22{flops}\22" in line for line in calls), name
