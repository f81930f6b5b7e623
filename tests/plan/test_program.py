"""A program's totals: on text written by hand, and on small compiled programs whose work is known."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from opendeep_jax.plan.program import Collective, Program, analyze

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=4\n"
LOOP = """
%body (t: (s32[], bf16[256,512], bf16[512,512], s32[], s32[])) -> (s32[], bf16[256,512], bf16[512,512], s32[], s32[]) {
  %t = (s32[], bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[256,512]{1,0} get-tuple-element(%t), index=1
  %w = bf16[512,512]{1,0} get-tuple-element(%t), index=2
  %limit = s32[] get-tuple-element(%t), index=3
  %step = s32[] get-tuple-element(%t), index=4
  %y = bf16[256,512]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = s32[] add(%i, %step)
  ROOT %o = (s32[], bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[], s32[]) tuple(%next, %y, %w, %limit, %step)
}

%condition (u: (s32[], bf16[256,512], bf16[512,512], s32[], s32[])) -> pred[] {
  %u = (s32[], bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[], s32[]) parameter(0)
  %ci = s32[] get-tuple-element(%u), index=0
  %cl = s32[] get-tuple-element(%u), index=3
  ROOT %lt = pred[] compare(%ci, %cl), direction=LT
}
"""
FUSIONS = """
%slice (p: bf16[16,256,512]) -> bf16[256,512] {
  %p = bf16[16,256,512]{2,1,0} parameter(0)
  %i = s32[] constant(3)
  %z = s32[] constant(0)
  ROOT %ds = bf16[256,512]{1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,256,512}
}

%nested (q: bf16[16,256,512]) -> f32[256,512] {
  %q = bf16[16,256,512]{2,1,0} parameter(0)
  %in = bf16[256,512]{1,0} fusion(%q), kind=kLoop, calls=%slice
  ROOT %c = f32[256,512]{1,0} convert(%in)
}

%update (s: f32[16,256,512], n: f32[1,256,512]) -> f32[16,256,512] {
  %s = f32[16,256,512]{2,1,0} parameter(0)
  %n = f32[1,256,512]{2,1,0} parameter(1)
  %k = s32[] constant(3)
  ROOT %dus = f32[16,256,512]{2,1,0} dynamic-update-slice(%s, %n, %k, %k, %k)
}

%scatter (r: bf16[512,512]) -> bf16[128,512] {
  %r = bf16[512,512]{1,0} parameter(0)
  %g = s32[] constant(0)
  %ar = bf16[512,512]{1,0} all-reduce(%r), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %own = bf16[128,512]{1,0} dynamic-slice(%ar, %g, %g), dynamic_slice_sizes={128,512}
}
"""
MATMUL = 2 * 256 * 512 * 512


def entry(*lines: str) -> str:
    """A program whose entry computation has these lines, the last its root."""
    body = "\n".join(f"  {'ROOT ' * (line is lines[-1])}{line}" for line in lines)
    return f"{HEADER}{LOOP}{FUSIONS}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"


@pytest.mark.parametrize("start, limit, step, trips", [(2, 20, 3, 6), (0, 7, 1, 7), (5, 5, 1, 0), (0, 1, 100, 1)])
def test_a_loop_without_a_written_count_is_evaluated(start, limit, step, trips):
    state = "(s32[], bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[], s32[])"
    program = analyze(
        entry(
            "%x = bf16[256,512]{1,0} parameter(0)",
            "%w = bf16[512,512]{1,0} parameter(1)",
            f"%a = s32[] constant({start})",
            f"%b = s32[] constant({limit})",
            f"%c = s32[] constant({step})",
            f"%t = {state} tuple(%a, %x, %w, %b, %c)",
            f"%loop = {state} while(%t), condition=%condition, body=%body",
        )
    )
    assert program.flops == trips * MATMUL and program.unknown_loops == 0
    assert sum(program.kernels.values()) == 2 * trips  # the dot, and the counter's addition


def test_a_loop_that_depends_on_data_is_counted_once_and_said_so():
    state = "(s32[], bf16[256,512]{1,0}, bf16[512,512]{1,0}, s32[], s32[])"
    program = analyze(entry(f"%t = {state} parameter(0)", f"%l = {state} while(%t), condition=%condition, body=%body"))
    assert program.flops == MATMUL and program.unknown_loops == 1


def test_a_slice_read_in_a_nested_fusion_counts_the_slice():
    program = analyze(
        entry(
            "%s = bf16[16,256,512]{2,1,0} parameter(0)", "%f = f32[256,512]{1,0} fusion(%s), kind=kLoop, calls=%nested"
        )
    )
    assert program.hbm_bytes == 256 * 512 * (2 + 4)


def test_an_update_in_place_counts_the_update():
    program = analyze(
        entry(
            "%s = f32[16,256,512]{2,1,0} parameter(0)",
            "%n = f32[1,256,512]{2,1,0} parameter(1)",
            "%f = f32[16,256,512]{2,1,0} fusion(%s, %n), kind=kLoop, calls=%update",
        )
    )
    assert program.hbm_bytes == 2 * 4 * 256 * 512


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
    program = analyze(
        entry(
            "%r = bf16[512,512]{1,0} parameter(0)", "%f = bf16[128,512]{1,0} fusion(%r), kind=kCustom, calls=%scatter"
        )
    )
    (message,) = program.collectives
    assert (message.kind, message.group, message.is_async) == ("reduce-scatter", (0, 1, 2, 3), False)
    assert message.sent == 512 * 512 * 2 * 3 / 4


@pytest.mark.parametrize("start, mark, hidden", [("", "", False), ("-start", "", True), ("-start", "true", False)])
def test_a_message_with_a_start_runs_beside_the_kernels(start, mark, hidden):
    config = f', backend_config={{"collective_backend_config":{{"is_sync":{mark}}}}}' if mark else ""
    program = analyze(
        entry(
            "%x = bf16[128,512]{1,0} parameter(0)",
            f"%g = bf16[512,512]{{1,0}} all-gather{start}(%x), replica_groups={{{{0,1,2,3}}}}{config}",
            *(["%d = bf16[512,512]{1,0} all-gather-done(%g)"] if start else []),
        )
    )
    (message,) = program.collectives
    assert message.is_async is hidden and message.payload == 512 * 512 * 2


def test_a_sum_over_slices_goes_through_the_hosts():
    attributes = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="sum_0",%s}'
    what = '_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"'
    program = analyze(
        entry(
            "%x = bf16[128,512]{1,0} parameter(0)",
            "%token = token[] after-all()",
            f"%send = (bf16[128,512]{{1,0}}, u32[], token[]) send(%x, %token), {attributes % what}",
            f"%recv = (bf16[128,512]{{1,0}}, u32[], token[]) recv(%token), {attributes % what}",
            "%d = (bf16[128,512]{1,0}, token[]) recv-done(%recv), is_host_transfer=true",
        )
    )
    (message,) = program.collectives
    assert (message.kind, message.group, message.is_async) == ("all-reduce", (0, 4), True)
    assert message.sent == 128 * 512 * 2
    assert [event.name for event in program.schedule["main", False]] == ["sum_0", "sum_0"]


def test_a_kernels_own_estimate_counts_and_one_without_is_named():
    call = 'bf16[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'
    program = analyze(
        entry(
            "%x = bf16[8,8]{1,0} parameter(0)",
            f'%known = {call}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"1234"}}}}}}',
            f"%mystery = {call}",
            # As Triton kernels tell it: quotes are written \\22.
            '%ours = bf16[8,8]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config='
            '{serialized_metadata = "{\\22flops\\22: \\2210000\\22, \\22bytes_accessed\\22: \\2276\\22}"}',
        )
    )
    assert program.flops == 11234
    assert list(program.uncounted) == ["tpu_custom_call mystery"]


def test_the_dearest_branch_of_a_conditional_counts():
    text = entry(
        "%p = s32[] parameter(0)",
        "%x = bf16[256,512]{1,0} parameter(1)",
        "%c = bf16[] conditional(%p, %x, %x), branch_computations={%big, %small}",
    )
    branch = """
%{name} (x: bf16[256,512]) -> bf16[256,256] {{
  %x = bf16[256,512]{{1,0}} parameter(0)
  ROOT %y = bf16[256,256]{{1,0}} dot(%x, %x), lhs_contracting_dims={{{dims}}}, rhs_contracting_dims={{{dims}}}
}}
"""
    text = text.replace(
        "\nENTRY", branch.format(name="big", dims="1") + branch.format(name="small", dims="") + "\nENTRY"
    )
    assert analyze(text).flops == 2 * 256 * 256 * 512


@given(
    payload=st.integers(1, 2**40),
    n=st.integers(2, 512),
)
def test_an_all_reduce_sends_what_a_scatter_and_a_gather_send(payload, n):
    group = tuple(range(n))
    sent = {
        kind: Collective(kind, group, payload, 0.0, False).sent
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert math.isclose(sent["all-reduce"], sent["all-gather"] + sent["reduce-scatter"])
    assert sent["all-gather"] < payload


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_totals_add_up(parts):
    whole = Program()
    for part in parts:
        whole.add(Program(flops=part), 2)
    assert whole.flops == 2 * sum(parts)


def compiled(function, *arguments) -> Program:
    """The totals of a function compiled for this machine's (virtual) devices."""
    return analyze(jax.jit(function).lower(*arguments).compile().as_text())


def spec(*dims: int, sharding=None) -> jax.ShapeDtypeStruct:
    """A float32 array that isn't made."""
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)


def chain(x, weights):
    """x through each weight in turn."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_nested_scans_multiply():
    def nested(x, weights):
        return jax.lax.scan(lambda x, group: (chain(x, group), None), x, weights)[0]

    program = compiled(nested, spec(64, 64), spec(5, 7, 64, 64))
    assert program.flops == 35 * 2 * 64**3 and program.unknown_loops == 0


def test_a_countdown_is_counted():
    def countdown(x):
        return jax.lax.while_loop(lambda c: c[0] >= 1, lambda c: (c[0] - 3, jnp.tanh(c[1] @ x)), (20, x))[1]

    assert compiled(countdown, spec(64, 64)).flops == 7 * 2 * 64**3


def test_weights_gathered_layer_by_layer_are_found_with_their_group():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def layers(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)), None

        return jax.lax.scan(layer, x, weights)[0]

    rows, shards = PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp")
    function = jax.shard_map(layers, mesh=mesh, in_specs=(rows, shards), out_specs=rows, check_vma=False)
    program = compiled(
        function,
        spec(64, 32, sharding=NamedSharding(mesh, rows)),
        spec(3, 32, 32, sharding=NamedSharding(mesh, shards)),
    )
    gathers = {message: count for message, count in program.collectives.items() if message.kind == "all-gather"}
    assert sum(gathers.values()) == 3 and {message.group for message in gathers} == {(0, 1, 2, 3)}
    assert sum(count * message.sent for message, count in gathers.items()) == 3 * 32 * 32 * 4 * 3 / 4
    assert program.flops == 3 * 2 * (64 // 8) * 32 * 32
