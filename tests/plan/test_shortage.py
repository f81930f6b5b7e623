"""What a compiler ran short of is told apart by its words, each with a fix that fits; unknown words are quoted."""

import json
import math
import signal
import subprocess
import sys

import pytest
from small_models import DENSE, run_config

from opendeep_jax.plan import estimate as module
from opendeep_jax.plan.compile import OutOfResource
from opendeep_jax.plan.estimate import make_plan
from opendeep_jax.plan.report import plan_page
from opendeep_jax.plan.shortage import CURES, HOST, MEMORY, PATTERNS, shortage_in
from opendeep_jax.plan.table import plan_table
from opendeep_jax.plan.topology import parse_topology

SHARED, TENSOR, VMEM, SMEM = "shared memory", "tensor memory", "vector memory (VMEM)", "scalar memory (SMEM)"
ALLOCATION = "RESOURCE_EXHAUSTED: Allocation (size={}) would exceed memory (size={}) :: #allocation2 [shape = "
WORDS = [
    # As libtpu and XLA for GPUs gave them when each was made to run short.
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (640.00G) "
     "exceeds available HBM (15.75G).", MEMORY, 640 * 2**30),
    ("Ran out of memory in memory space hbm. Used 97.19G of 95.74G hbm. Exceeded by 1.45G.", MEMORY, 97.19 * 2**30),
    ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 294912, available: 232448, context: []",
     SHARED, 294912),
    ("Mosaic GPU kernel exceeds available shared memory: smem_bytes=1048576 > max_smem_bytes=232448", SHARED, 2**20),
    ("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while allocating on "
     "stack for %flash_mla_backward.1 = f32[4096,4096]{1,0:T(8,128)} custom-call(%p). Scoped allocation with size "
     "128.00M and limit 16.00M exceeded scoped vmem limit by 112.00M. It should not be possible", VMEM, 2**27),
    (ALLOCATION.format(268435456, 134217728) + "'f32[8192,8192]{1,0:T(8,128)}', space=vmem, size = 0x10000000, scoped, "
     "tag = 'scratch operand'] :: shard_map.12", VMEM, 2**28),
    (ALLOCATION.format(8000000, 1048576) + "'u8[8000000]{0}', space=smem, size = 0x7a1200, scoped, tag = 'prefetched "
     "SMEM operand 0'] :: shard_map.19", SMEM, 8e6),
    (ALLOCATION.format(400000, 2048) + "'s32[100000]{0}', space=sflag, size = 0x61a80, tag = 'scratch operand']",
     "semaphores", 4e5),
    # As the strings in the compilers' libraries are.
    ("Tensor memory size limit exceeded: requested 640, available: 512", TENSOR, 640),
    ("ptxas error   : Entry function 'k' uses too much shared data (0x1c000 bytes, 0xc000 max)", SHARED, 0x1C000),
    ("ptxas fatal   : (C7600) Register allocation failed with register count of '64'.", "registers", None),
    ("INTERNAL: std::bad_alloc", HOST, None),
]  # fmt: skip
UNKNOWN = "INTERNAL: Mosaic failed to compile TPU kernel: no such layout"


@pytest.mark.parametrize("words, resource, needed", WORDS, ids=[f"{row[1]} {i}" for i, row in enumerate(WORDS)])
def test_the_compilers_words_name_the_resource_that_is_short(words, resource, needed):
    found = shortage_in(words)
    assert found.resource == resource
    assert found.needed == needed if needed else math.isnan(found.needed)


def test_every_row_of_the_table_has_a_cure_and_is_met_by_some_words():
    assert {resource for _, resource in PATTERNS} == set(CURES) == {resource for _, resource, _ in WORDS}


def refused(words, topology="h100:1x8"):
    def refuse(*_):
        raise OutOfResource(shortage_in(words), 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_step", refuse)
        return make_plan(run_config(DENSE), parse_topology(topology))


@pytest.mark.parametrize("words", [row[0] for row in WORDS if row[1] not in (MEMORY, HOST)])
def test_a_lack_inside_the_chip_is_not_called_one_of_memory_nor_met_by_what_saves_memory(words):
    plan = refused(words)
    why = plan.why_not()
    assert not plan.fits and shortage_in(words).resource in why and "75.16 GiB" not in why
    assert "--model.remat" not in why
    assert "=blocks" in why and plan.verdict in plan_table(plan) and plan.verdict in plan_page(plan)
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["shortage"]["resource"] in why and data["memory"]["total_bytes"] is None


def test_the_kernel_that_the_compiler_names_is_the_one_to_replace():
    why = refused(next(words for words, *_ in WORDS if "flash_mla" in words)).why_not()
    assert "--model.execution.attention=blocks" in why and "grouped_matmul" not in why


def test_words_that_nobody_knows_are_quoted_and_no_cure_is_made_up():
    plan = refused(UNKNOWN)
    assert UNKNOWN in plan.why_not() and "--" not in plan.why_not()
    assert "refused by the compiler" in plan_table(plan) and json.dumps(plan.to_json(), allow_nan=False)


def test_a_lack_of_this_machines_memory_is_told_from_the_chips():
    assert "machine that compiles" in refused("std::bad_alloc").why_not()


@pytest.mark.parametrize("end, said", [("os.kill(os.getpid(), signal.SIGKILL)", True), ("pass", False)])
def test_a_compiler_that_linux_kills_does_not_end_without_a_word(end, said):
    script = "import os, signal\nfrom opendeep_jax.plan.shortage import report_if_killed\n"
    script += f"with report_if_killed():\n    {end}\n"
    process = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.returncode == (-signal.SIGKILL if said else 0)
    assert ("memory of the machine that compiles" in process.stderr) is said
