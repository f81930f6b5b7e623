"""The work of one instruction: floating-point operations, and bytes to and from HBM.

FLOPs count matmuls, as MFU does: dots, convolutions, library calls, and kernels that carry a cost estimate.

Bytes count what crosses the boundary of a kernel, operands and results that lie in HBM: a lower bound, as a kernel may
read an operand more than once. A slice read inside a fusion counts the slice, an update in place counts the update.
"""

import json
import math
import re

from opendeep_jax.plan.hlo import HBM, VIEWS, ArrayShape, Computation, Instruction, Module, dtype_bytes

NO_KERNEL = frozenset(
    "parameter constant tuple get-tuple-element bitcast iota after-all partition-id replica-id add-dependency domain "
    "opt-barrier optimization-barrier get-dimension-size while conditional call async-start send recv send-done "
    "recv-done broadcast-start".split()
)
"""Operations that run nothing by themselves."""

KERNEL_TARGETS = re.compile(r"tpu_custom_call|mosaic|triton|cublas|cudnn|Gemm|TODO")
"""Custom calls that are kernels, whose FLOPs should be known."""

NO_BYTES = re.compile(r"AllocateBuffer|.*[Ss]harding|MoveToHost|MoveToDevice|PrepareAsync.*|AssumeGatherIndicesInBound")
"""Custom calls that tell the compiler something and move nothing."""

_LARGEST_WINDOW = 2_000_000
"""Positions of a convolution's window along one dimension beyond which its padding isn't looked at."""


def matmul_flops(computation: Computation, x: Instruction) -> float:
    """FLOPs of a dot or a convolution, 2 for each multiply-add; 0 for anything else."""
    if x.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        left = computation.operand_shape(x, 0).dims
        dims = contracted.group(1).split(",") if contracted else ()
        return 2.0 * math.prod(x.shapes[0].dims) * math.prod(left[int(dim)] for dim in dims if dim)
    return _convolution_flops(computation, x) if x.op == "convolution" else 0.0


def _convolution_flops(computation: Computation, x: Instruction) -> float:
    """Window positions that meet data only, which is what XLA counts; TPU programs write matmuls as convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    if not labels:
        return 0.0
    left, right, out = labels.groups()
    inputs, kernel = computation.operand_shape(x, 0).dims, computation.operand_shape(x, 1).dims
    outputs = x.shapes[0].dims
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    settings = dict(item.split("=", 1) for item in (window.group(1).split() if window else ()) if "=" in item)

    def setting(key: str, default: str, dim: int) -> str:
        return settings[key].split("x")[dim] if key in settings else default

    total = 2.0 * outputs[out.index("b")] * outputs[out.index("f")] * kernel[right.index("i")]
    for dim in range(sum(label.isdigit() for label in right)):
        size, count = int(setting("size", "1", dim)), outputs[out.index(str(dim))]
        if size * count > _LARGEST_WINDOW:
            total *= size * count
            continue
        stride, low = int(setting("stride", "1", dim)), int(setting("pad", "0_0", dim).split("_")[0])
        spread, dilation = int(setting("lhs_dilate", "1", dim)), int(setting("rhs_dilate", "1", dim))
        last = (inputs[left.index(str(dim))] - 1) * spread
        places = (o * stride - low + k * dilation for o in range(count) for k in range(size))
        total *= sum(0 <= place <= last and place % spread == 0 for place in places)
    groups = re.search(r"batch_group_count=(\d+)", x.attributes)
    return total / (int(groups.group(1)) if groups else 1)


def is_fp8(computation: Computation, x: Instruction) -> bool:
    """True if both operands are 8-bit floats."""
    return all(computation.operand_shape(x, place).dtype.startswith("f8") for place in (0, 1))


def custom_call_flops(computation: Computation, x: Instruction) -> float | None:
    """FLOPs of a custom call: its own estimate, or from shapes for cuBLAS. None for a kernel that says nothing."""
    estimate = re.search(r'"cost_estimate":(\{[^}]*\})', x.attributes)
    if estimate:
        return float(json.loads(estimate.group(1)).get("flops", 0))
    # Pallas drops the estimate on its way to Triton; our kernels hand it over as metadata, where \22 is a quote.
    if metadata := re.search(r"serialized_metadata = .*?flops\\22: \\22(\d+)\\22", x.attributes):
        return float(metadata.group(1))
    if "cublas" in x.target and (dims := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)):
        left = computation.operand_shape(x, 0).dims
        contracted = math.prod(left[int(dim)] for dim in re.findall(r"\d+", dims.group(1)))
        return 2.0 * math.prod(x.shapes[0].dims) * contracted
    return None if KERNEL_TARGETS.search(x.target) else 0.0


def kernel_bytes(module: Module, computation: Computation, x: Instruction) -> float:
    """Bytes that an instruction reads from HBM and writes to it."""
    if x.op == "fusion":
        return _fusion_bytes(module, computation, x)
    if x.op in ("slice-start", "dynamic-slice-start"):  # (operands, slice, context)
        arrays = [shape for shape in x.shapes if shape.dims]
        return arrays[-1].bytes * sum(shape.space == HBM for shape in (arrays[0], arrays[-1]))
    if x.op == "copy-start":  # (destination, source, context)
        return sum(shape.hbm_bytes for shape in x.shapes[:2])
    if x.op == "dynamic-update-slice":
        return 2 * computation.operand_shape(x, 1).bytes
    if x.op in ("dynamic-slice", "slice", "gather"):
        return 2 * x.result_bytes
    if x.op == "custom-call" and NO_BYTES.fullmatch(x.target):
        return 0.0
    read = sum(source.result_bytes for place in range(len(x.operands)) if (source := computation.operand(x, place)))
    return read + x.result_bytes


def _fusion_bytes(module: Module, computation: Computation, x: Instruction) -> float:
    inner = module.computations.get(x.called[0] if x.called else "", Computation())
    total = x.result_bytes + sum(_saved_in_place(module, inner, x))
    for number, parameter in inner.parameters.items():
        source = computation.operand(x, number)
        shape = parameter.shapes[0] if parameter.shapes else ArrayShape("token", (), 0.0, HBM)
        placed = source.shapes[0] if source is not None and len(source.shapes) == 1 else shape
        if placed.space != HBM:
            continue
        whole = sum(part.bytes for part in parameter.shapes)
        uses = real_uses(module, x.called[0], parameter.name)
        if uses and all(place == 0 and user.op in _PARTIAL for user, place in uses):
            taken = [user.shapes[0] for user, _ in uses if user.op != "dynamic-update-slice"]
            whole = min(whole, sum(math.prod(part.dims) for part in taken) * dtype_bytes(shape.dtype))
        total += whole
    return max(total, 0.0)


_PARTIAL = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")


def _saved_in_place(module: Module, inner: Computation, x: Instruction):
    """Return for each update in place the (negative) bytes that are not written."""
    if inner.root is None:
        return
    outputs = [inner.get(name) for name in inner.root.operands] if inner.root.op == "tuple" else [inner.root]
    for output, shape in zip(outputs, x.shapes, strict=False):
        where = inner
        while output is not None:  # the update may lie behind a view of it, or inside a nested fusion
            if output.op == "fusion" and (root := module.root(output.called[0])) is not None:
                where, output = module.computations[output.called[0]], root
            elif output.op in VIEWS and output.operands and output.operands[0] in where:
                output = where[output.operands[0]]
            else:
                break
        if output is not None and output.op == "dynamic-update-slice" and shape.space == HBM:
            update = where.operand_shape(output, 1)
            yield math.prod(update.dims) * dtype_bytes(shape.dtype) - shape.bytes


def real_uses(module: Module, name: str, value: str, depth: int = 0) -> list[tuple[Instruction, int]]:
    """Return the real users of a value of computation `name`, seen through views, conversions and nested fusions."""
    found = []
    for user, place in module.computations[name].users.get(value, ()):
        onwards: list[tuple[str, str]] | None = None
        if user.op in VIEWS and not user.is_root:
            onwards = [(name, user.name)]
        elif user.op == "fusion" and depth < 8:
            sub = module.computations.get(user.called[0], Computation())
            parameter = sub.parameters.get(place)
            shown = sub.root
            while shown is not None and shown.op in VIEWS and shown.operands:
                shown = sub.get(shown.operands[0])
            if parameter is None:
                onwards = []
            elif shown is not None and shown.name == parameter.name:  # the nested fusion is a view
                onwards = None if user.is_root else [(name, user.name)]
            else:
                onwards = [(user.called[0], parameter.name)]
        if onwards is None:
            found.append((user, place))
        else:
            for place_name, onward in onwards:
                found += real_uses(module, place_name, onward, depth + 1)
    return found
