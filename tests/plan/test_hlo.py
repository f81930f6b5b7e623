"""The text of a compiled program is read as it stands: shapes, memories, groups, instructions of several lines."""

import pytest

from opendeep_jax.plan.hlo import dtype_bytes, first_group, parse, source_target_pairs

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

FileNames
1 "a.py"

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

ENTRY %main (x: bf16[8,128]) -> (bf16[8,128], f32[]) {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %fast = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %kernel = (bf16[8,128]{1,0}, f32[]{:T(128)}) custom-call(%fast, %x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"notes":"{\\"block\\": 512, \\"open\\": {"
}}, metadata={op_name="jit(f)/kernel/pallas_call"}
  %first = bf16[8,128]{1,0} get-tuple-element(%kernel), index=0
  %sums = bf16[8,128]{1,0} all-reduce(%first), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %two = f32[] get-tuple-element(%kernel), index=1
  ROOT %out = (bf16[8,128]{1,0}, /*index=1*/f32[]) tuple(%sums, /*index=1*/%two)
}
"""


def instruction(attributes: str):
    """A collective with these attributes."""
    return parse(f"ENTRY %main () -> f32[] {{\n  ROOT %x = f32[] all-gather(), {attributes}\n}}\n").computations[
        "main"
    ]["x"]


def test_computations_and_their_instructions_are_found():
    module = parse(PROGRAM)
    assert module.entry == "main" and module.devices == 8
    assert list(module.computations) == ["add", "main"]
    assert list(module.computations["main"]) == ["x", "fast", "kernel", "first", "sums", "two", "out"]
    assert module.root("main").operands == ["sums", "two"]


def test_an_instruction_of_several_lines_is_one():
    kernel = parse(PROGRAM).computations["main"]["kernel"]
    assert kernel.operands == ["fast", "x"] and kernel.target == "tpu_custom_call"
    assert kernel.op_name == "jit(f)/kernel/pallas_call"
    assert [shape.dims for shape in kernel.shapes] == [(8, 128), ()]


def test_only_what_lies_in_hbm_costs_its_bandwidth():
    main = parse(PROGRAM).computations["main"]
    assert main["x"].result_bytes == 8 * 128 * 2
    assert main["fast"].shapes[0].bytes == 8 * 128 * 2 and main["fast"].result_bytes == 0


def test_users_know_the_place_of_an_operand():
    users = parse(PROGRAM).computations["main"].users["x"]
    assert [(user.name, place) for user, place in users] == [("fast", 0), ("kernel", 1)]


@pytest.mark.parametrize(
    "attributes, group",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[4,4]<=[2,2,4]T(1,0,2)", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("channel_id=1", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_the_first_group_is_read_from_every_notation(attributes, group):
    assert first_group(instruction(attributes), 8) == group


def test_pairs_of_a_permute():
    assert source_target_pairs(instruction("source_target_pairs={{0,1},{1,0}}")) == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    "dtype, size",
    [("pred", 1), ("bf16", 2), ("f32", 4), ("f8e4m3fn", 1), ("s4", 0.5), ("f4e2m1fn", 0.5), ("c64", 8), ("token", 0)],
)
def test_sizes_of_dtypes(dtype, size):
    assert dtype_bytes(dtype) == size


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("def f(x):\n    return x\n")
