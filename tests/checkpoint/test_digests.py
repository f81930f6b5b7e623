"""A digest is one number per array, the same wherever and however the array lies, and finds what changed."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opendeep_jax.checkpoint import digests as module
from opendeep_jax.checkpoint.digests import deviating_devices, digest_blocks, digest_numpy, digests

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "int32", "uint32", "bool")
RANDOM = np.random.default_rng(0)


def mesh(**sizes: int) -> Mesh:
    """A mesh over as many of the 8 devices as the sizes' product."""
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes))


def random_bits(shape, dtype) -> np.ndarray:
    """Any bits that fit, NaNs with all payloads among them."""
    size = jnp.dtype(dtype).itemsize * int(np.prod(shape))
    if dtype == "bool":
        return RANDOM.integers(0, 2, shape).astype(bool)
    return np.frombuffer(RANDOM.bytes(size), jnp.dtype(dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_and_numpy_agree_for_every_dtype_and_shape(dtype):
    arrays = {str(shape): random_bits(shape, dtype) for shape in [(), (0,), (3, 0), (7,), (1,), (3, 5, 2)]}
    on_device = digests({name: jnp.asarray(array) for name, array in arrays.items()})
    assert on_device == {f"[{name!r}]": digest_numpy(array) for name, array in arrays.items()}
    assert all(re.fullmatch("[0-9a-f]{16}", text) for text in on_device.values())


def test_sharding_mesh_and_layout_change_nothing():
    array = random_bits((24, 16, 8), "float32")
    wanted = digest_numpy(array)
    specs = [
        (mesh(a=8), PartitionSpec("a")),
        (mesh(a=2, b=4), PartitionSpec("b", None, "a")),
        (mesh(a=2, b=4), PartitionSpec(None, ("a", "b"))),
        (mesh(a=2, b=4), PartitionSpec(None, "b")),
        (mesh(a=8), PartitionSpec()),
    ]
    for place, spec in specs:
        assert digests(jax.device_put(array, NamedSharding(place, spec))) == {"": wanted}
    assert digest_numpy(np.asfortranarray(array)) == digest_numpy(array[::-1][::-1]) == wanted


def test_only_sums_travel_between_devices():
    place = mesh(a=2, b=4)
    tree = [
        jax.device_put(np.ones((8, 16), np.float32), NamedSharding(place, spec))
        for spec in (PartitionSpec("a", "b"), PartitionSpec("b"), PartitionSpec())
    ]
    text = module._lanes_program(*module._placement(tree)).lower(tree).compile().as_text()
    assert set(re.findall(r"\b(all-\w+|collective-\w+|reduce-scatter)[\w-]*\(", text)) == {"all-reduce"}


def test_a_digest_is_one_pass_over_the_array_and_takes_no_memory_of_its_size():
    leaves = [jax.ShapeDtypeStruct((529, 1024), jnp.float32)] * 2
    used = module._lanes_program(None, ()).lower(leaves).compile().memory_analysis()
    assert used.temp_size_in_bytes < 65536


def test_a_program_compiled_ahead_gives_the_same_and_takes_others_too():
    array = jnp.arange(12.0).reshape(3, 4)
    start = module.compile_digests({"x": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)})
    assert module.finish_digests(start({"x": array})) == [digest_numpy(np.asarray(array))]
    assert module.finish_digests(start({"x": array.T})) == [digest_numpy(np.asarray(array).T)]


def test_what_numbers_hide_the_digest_shows():
    nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    arrays = [np.float32([x, 1.0]) for x in (0.0, -0.0, *nans)] + [np.float32([1.0, 0.0]), np.float32([[0.0, 1.0]])]
    texts = [digest_numpy(array) for array in arrays[:-1]]
    assert len(set(texts)) == len(texts)
    square = random_bits((9, 9), "float32")
    assert len({digest_numpy(x) for x in (square, square.T, square[::-1], square[:, ::-1], np.roll(square, 1))}) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_of_an_array_is_found(dtype):
    array = random_bits((5, 3), dtype)
    seen = {digest_numpy(array)}
    raw = np.frombuffer(array.tobytes(), np.uint8)
    bits = range(8) if dtype != "bool" else range(1)
    for byte in range(len(raw)):
        for bit in bits:
            changed = raw.copy()
            changed[byte] ^= 1 << bit
            seen.add(digest_numpy(changed.view(array.dtype).reshape(array.shape)))
    assert len(seen) == 1 + len(raw) * len(bits)


def test_swapped_elements_are_found():
    array = np.arange(200, dtype=np.int32)
    seen = {digest_numpy(array)}
    for i in range(0, 200, 10):
        for j in range(i + 1, 200):
            swapped = array.copy()
            swapped[[i, j]] = swapped[[j, i]]
            seen.add(digest_numpy(swapped))
    assert len(seen) == 1 + sum(199 - i for i in range(0, 200, 10))


def test_an_array_is_read_in_blocks_and_in_any_order(monkeypatch):
    array = random_bits((5, 3, 11), "bfloat16")
    wanted = digest_numpy(array)
    parts = [((i, 0, j), array[i : i + 2, :, j : j + 4]) for i in (4, 0, 2) for j in (8, 0, 4)]
    assert digest_blocks(parts) == wanted
    for block in (1, 4, 11, 40):
        monkeypatch.setattr(module, "BLOCK", block)
        assert digest_numpy(array) == digest_blocks(parts) == wanted
        biggest = max(part.size for _, part in module._blocks(array, array.shape))
        assert biggest <= block


def test_more_elements_than_32_bits_count_are_told_apart_by_index():
    far = ((1 << 31) - 1, 3)  # an element whose linear index takes 33 bits
    part = np.ones((1, 1), ml_dtypes.bfloat16)
    assert digest_blocks([(far, part)]) != digest_blocks([((far[0], 2), part)])


def with_one_changed(array: np.ndarray, sharding: NamedSharding, *wrong: int) -> jax.Array:
    """The array with one bit flipped in the copies on the devices with these ids."""
    shards = []
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        data = array[index].copy()
        if device.id in wrong:
            data.reshape(-1).view(np.uint32)[-1] ^= 1 + device.id
        shards.append(jax.device_put(data, device))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def test_a_device_whose_copy_differs_is_named():
    place = mesh(data=4, fsdp=2)
    divided, whole = (NamedSharding(place, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    array = random_bits((8, 6), "float32")
    clean = {"a": with_one_changed(array, divided), "b": with_one_changed(array, whole)}
    assert deviating_devices(clean) == []
    wrong = {**clean, "b": with_one_changed(array, whole, 5), "c": with_one_changed(array, divided, 2)}
    assert deviating_devices(wrong) == [("['b']", 5, 0), ("['c']", 2, 0)]


def test_two_copies_that_differ_are_both_named_and_an_only_copy_never_is():
    place = mesh(data=2, fsdp=4)
    array = random_bits((8,), "float32")
    halves = with_one_changed(array, NamedSharding(place, PartitionSpec("fsdp")), 1)
    alone = with_one_changed(array, NamedSharding(place, PartitionSpec(("data", "fsdp"))), 1)
    assert deviating_devices([halves, alone, jnp.ones(3)]) == [("[0]", 1, 0), ("[0]", 5, 0)]
