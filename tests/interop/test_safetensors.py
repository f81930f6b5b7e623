"""The safetensors format: what is written is what is read, and nothing malformed is."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.interop.safetensors import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    TensorSpec,
    read_directory,
    read_file,
    write_directory,
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def spec_of(name: str, array: np.ndarray) -> TensorSpec:
    return TensorSpec(name, array.dtype, array.shape)


def write(directory, arrays: dict[str, np.ndarray], max_shard_bytes: int = 10**9) -> None:
    write_directory(directory, [spec_of(*item) for item in arrays.items()], arrays.values(), max_shard_bytes)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5), st.integers(1, 200))
def test_what_is_written_in_any_number_of_shards_is_read_back_to_the_bit(tmp_path_factory, kinds, max_shard_bytes):
    directory = tmp_path_factory.mktemp("model")
    random = np.random.default_rng(0)
    arrays = {}
    for number, (dtype, shape) in enumerate(kinds):
        size = int(np.prod(shape)) * DTYPES[dtype].itemsize
        raw = random.integers(0, 2 if dtype == "BOOL" else 256, size, dtype=np.uint8)
        arrays[f"tensor.{number}"] = raw.view(DTYPES[dtype]).reshape(shape)
    write(directory, arrays, max_shard_bytes)
    stored = read_directory(directory)
    assert set(stored) == set(arrays)
    for name, array in arrays.items():
        value = stored[name].read()
        assert (value.dtype, value.shape, value.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_shards_stay_under_their_limit_and_are_indexed(tmp_path):
    write(tmp_path, {f"t{i}": np.full(10, i, np.float32) for i in range(5)}, max_shard_bytes=80)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(sum(t.read().nbytes for t in read_file(tmp_path / shard).values()) <= 80 for shard in shards)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"]["t4"] == shards[2]


def test_the_header_is_what_the_format_asks_for(tmp_path):
    write(tmp_path, {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), ml_dtypes.bfloat16)})
    data = (tmp_path / SINGLE_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header == {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [12, 20]},
    }
    assert data[8 + length :] == np.arange(3, dtype="<f4").tobytes() + b"\x80\x3f" * 4


@pytest.mark.parametrize("cut", [0, 5, 30, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    write(tmp_path, {"a": np.arange(30, dtype=np.float32)})
    path = tmp_path / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match="model.safetensors"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[" * 100_000,
        "[1, 2]",
        '{"a": 3}',
        '{"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header):
    path = tmp_path / SINGLE_NAME
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ConfigError, match="write the file again"):
        read_file(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_refused(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(ConfigError, match="index"):
        read_directory(tmp_path)


@pytest.mark.parametrize("shard", ["missing.safetensors", "../outside/model.safetensors"])
def test_an_index_cannot_name_a_file_that_is_absent_or_elsewhere(tmp_path, shard):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    write(outside, {"a": np.zeros(1, np.float32)})
    (inside / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ConfigError, match="safetensors"):
        read_directory(inside)


def test_a_tensor_that_the_index_lists_must_be_in_the_shards(tmp_path):
    write(tmp_path, {"a": np.zeros(1, np.float32)})
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": SINGLE_NAME, "b": SINGLE_NAME}}))
    with pytest.raises(ConfigError, match=": b. "):
        read_directory(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no .*safetensors"):
        read_directory(tmp_path)
