"""Model directories made to harm: refused with a reason, before anything is allocated or run."""

import json
import pickle
import shutil
import time

import ml_dtypes
import numpy as np
import pytest
from hf_directories import changed_copy, family, raw_config, tensors_of, write_tensors

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.interop import load_hf
from opendeep_jax.interop.safetensors import INDEX_NAME, MAX_HEADER_BYTES, SINGLE_NAME, read_file


class Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_named_and_never_opened(name, tmp_path):
    shutil.copy(family("llama3") / "config.json", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(ConfigError, match=f"{name}, which can run any code.*safetensors"):
        load_hf(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path):
    shutil.copytree(family("llama3"), tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    load_hf(tmp_path / "model")
    assert not (tmp_path / "harm").exists()


def with_header(path, header: str, data: bytes = b"") -> None:
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data)


def entry(shape, begin: int, end: int, dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a": {entry([2], 0, 8)}, "b": {entry([2], 4, 12)}}}',  # one over the other
        f'{{"a": {entry([2], 0, 8)}, "b": {entry([2], 0, 8)}}}',
        f'{{"a": {entry([2], 0, 8)}, "b": {entry([1], 12, 16)}}}',  # a gap
        f'{{"a": {entry([2], 0, 8)}, "a": {entry([2], 8, 16)}}}',  # one name twice
        f'{{"a": {entry([10**12, 10**12], 0, 4 * 10**24)}}}',
        f'{{"a": {entry([2**62, 4], 0, 2**66)}}}',
        f'{{"a": {entry([True], 0, 4)}}}',
        f'{{"a": {entry([1.0], 0, 4)}}}',
        f'{{"a": {entry([1] * 100, 0, 4)}}}',
        '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        '{"a": ' * 50_000,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    with_header(tmp_path / SINGLE_NAME, header, bytes(16))
    with pytest.raises(ConfigError, match=SINGLE_NAME):
        read_file(tmp_path / SINGLE_NAME)


def test_a_huge_header_is_refused_unread(tmp_path):
    path = tmp_path / SINGLE_NAME
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="header"):
        read_file(path)
    assert time.monotonic() - begin < 1


def test_a_tensor_of_two_shards_is_refused(tmp_path):
    shutil.copytree(family("llama3"), tmp_path / "model")
    shutil.copy(tmp_path / "model" / SINGLE_NAME, tmp_path / "model" / "another.safetensors")
    with pytest.raises(ConfigError, match="another.safetensors holds too"):
        load_hf(tmp_path / "model")


@pytest.mark.parametrize("content", ['{"weight_map": ' * 50_000, b"\xff\xfe", '{"weight_map": {"a": ["b"]}}'])
def test_a_malformed_index_is_refused(tmp_path, content):
    shutil.copytree(family("llama3"), tmp_path / "model")
    (tmp_path / "model" / INDEX_NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="index"):
        load_hf(tmp_path / "model")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_weights_without_fractions_are_refused(dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = np.ones(tensors_of(family("llama3"))[name].shape, dtype)
    with pytest.raises(ConfigError, match=f"1 of the wrong type: {name} .is {np.dtype(dtype)}, must be float64 or"):
        load_hf(changed_copy(family("llama3"), tmp_path / "model", **{name: weight}))


def test_float8_without_scales_is_refused(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors_of(family("llama3"))[name].astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(ConfigError, match="1 of the wrong type"):
        load_hf(changed_copy(family("llama3"), tmp_path / "model", **{name: weight}))


@pytest.mark.parametrize("change", ["blocks", "scales"])
def test_mxfp4_of_another_shape_is_refused(change, tmp_path):
    name = f"model.layers.1.mlp.experts.down_proj_{change}"
    cut = tensors_of(family("gpt_oss_mxfp4"))[name][:, :-1].copy()
    with pytest.raises(ConfigError, match=f"1 misshapen: {name}"):
        load_hf(changed_copy(family("gpt_oss_mxfp4"), tmp_path / "model", **{name: cut}))


def test_mxfp4_without_its_scales_is_refused(tmp_path):
    name = "model.layers.1.mlp.experts.down_proj_scales"
    with pytest.raises(ConfigError, match=f"1 missing: {name}"):
        load_hf(changed_copy(family("gpt_oss_mxfp4"), tmp_path / "model", **{name: None}))


@pytest.mark.parametrize("value", [10**6, 10**12, 10**30])
@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("llama3", "hidden_size"),
        ("llama3", "num_hidden_layers"),
        ("llama3", "vocab_size"),
        ("llama3", "intermediate_size"),
        ("llama3", "head_dim"),
        ("qwen3_moe", "num_experts"),
        ("qwen3_moe", "num_hidden_layers"),
        ("moonlight", "n_routed_experts"),
        ("moonlight", "kv_lora_rank"),
        ("moonlight", "num_nextn_predict_layers"),
        ("gemma3", "num_hidden_layers"),
        ("gpt_oss", "num_local_experts"),
    ],
)
def test_a_config_of_absurd_size_is_refused_at_once(case, key, value, tmp_path):
    directory = changed_copy(family(case), tmp_path / "model", {key: value, "layer_types": None})
    if key == "num_nextn_predict_layers":
        layer = raw_config(family(case))["num_hidden_layers"]
        write_tensors(directory, tensors_of(family(case)) | {f"model.layers.{layer}.x": np.zeros(1, np.float32)})
    begin = time.monotonic()
    with pytest.raises(ConfigError):
        load_hf(directory)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("value", [-1, 0, 1.5, "30", [30], {}, True])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
@pytest.mark.parametrize("case", ["llama3", "gemma3", "gpt_oss", "moonlight"])
def test_a_size_that_is_none_is_refused(case, key, value, tmp_path):
    directory = changed_copy(family(case), tmp_path / "model", {key: value})
    with pytest.raises(ConfigError):
        load_hf(directory)


def test_a_model_type_that_is_a_path_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model_type"):
        load_hf(changed_copy(family("llama3"), tmp_path / "model", {"model_type": "../../etc/passwd"}))
