"""Names of clusters: what they mean, and what is refused before anything is loaded."""

import importlib.util
import subprocess
import sys

import pytest

import kernels_pallas.chips
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.chips import CHIPS
from opendeep_jax.plan.gpu_target import GPUS
from opendeep_jax.plan.topology import GPUS_OF_NODES, JOINED_NODES, check_compiler, parse_topology


@pytest.mark.parametrize(
    "name, slices, chips, devices, count",
    [
        ("v5p:8x8x8", 0, 512, 512, 1),
        ("v5e:2x2", 0, 4, 4, 1),
        ("tpu7x:4x4x4", 0, 64, 128, 1),
        ("2*v6e:16x16", 0, 512, 512, 2),
        ("v6e:16x16", 4, 1024, 1024, 4),
        ("h100:256x8", 0, 2048, 2048, 256),
        ("B200:1x8", 0, 8, 8, 1),
        ("a100:2x16", 0, 32, 32, 2),
        ("h200:3x4", 0, 12, 12, 3),
        ("gb200:36x4", 0, 144, 144, 36),
    ],
)
def test_a_name_says_chips_and_slices(name, slices, chips, devices, count):
    topology = parse_topology(name, slices)
    assert (topology.chips, topology.device_count, topology.slices) == (chips, devices, count)


@pytest.mark.parametrize(
    "name, slices, words",
    [
        ("v5p", 0, "chip:shape"),
        ("v5q:8x8x8", 0, "Did you mean v5p?"),
        ("v5e:3x3", 0, "2x2, 2x4"),
        ("v5e:16x16x16", 0, "v5e has slices"),
        ("v5p:8x8", 0, "three multiples of 4"),
        ("v5p:6x8x8", 0, "v5p:8x8x8"),
        ("v5p:64x64x64", 0, "a pod of v5p has 8,960"),
        ("h100:256", 0, "h100:32x8"),
        ("h100:4x6", 0, "h100:3x8"),
        ("gb200:2x8", 0, "gb200:4x4"),
        ("a100:0x8", 0, "at least 1"),
        ("h100:4x8", 2, "nodes, not slices"),
        ("2*v5e:2x2", 3, "2 slices"),
        ("0*v5e:2x2", 0, "at least 1"),
    ],
)
def test_what_is_not_built_is_refused_with_the_cure(name, slices, words):
    with pytest.raises(ConfigError) as error:
        parse_topology(name, slices)
    assert words in str(error.value)


def test_a_device_of_a_chip_with_two_has_half_of_everything():
    chip = CHIPS["v7x"]
    device = chip.per_device()
    assert device.flops == chip.flops / 2 and device.memory_bytes == chip.memory_bytes / 2
    assert CHIPS["v5p"].per_device() == CHIPS["v5p"]


@pytest.mark.parametrize(
    "name, rings", [("v5e:8x16", [False, True]), ("v5p:4x4x8", [True] * 3), ("v5p:2x4x4", [False] * 3)]
)
def test_a_torus_closes_where_it_is_large_enough(name, rings):
    topology = parse_topology(name)
    assert [topology.is_ring(dimension) for dimension in range(len(rings))] == rings


@pytest.mark.parametrize("name, extra", [("v5e:2x2", "tpu-compiler"), ("h100:1x8", "gpu-compiler")])
def test_a_missing_compiler_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"pip install 'opendeep-jax\[{extra}\]'"):
        check_compiler(parse_topology(name))


def test_every_chip_of_the_plan_is_known_to_kernels_and_the_compiler_and_gpus_have_nodes():
    gpus = {name for name, chip in CHIPS.items() if chip.platform == "gpu"}
    assert set(GPUS_OF_NODES) == gpus and set(JOINED_NODES) <= gpus
    assert {CHIPS[name].compiler_name for name in gpus} == set(GPUS)
    assert set(kernels_pallas.chips.CHIPS) == set(CHIPS) - {"h800"}  # which is an H100 to its kernels
    for name in gpus:  # 95 % of the memory that the compiler is told
        assert CHIPS[name].memory_bytes == pytest.approx(0.95 * GPUS[CHIPS[name].compiler_name].memory, rel=3e-3)


def test_names_are_checked_without_jax():
    code = "import sys, opendeep_jax.plan.topology as t; t.parse_topology('v5p:8x8x8'); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
