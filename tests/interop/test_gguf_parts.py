"""GGUF models that are split into several files, as llama-gguf-split and the gguf package write them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hf_directories import arrays_of
from small_models import V3, random_model

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.interop import reading
from opendeep_jax.interop.gguf import load_gguf, read_gguf, save_gguf
from opendeep_jax.models.parameters import split

COUNT = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    save_gguf(random_model(V3), path, "f32", {"tokenizer.ggml.tokens": ["a", "b"]})
    return path


@pytest.fixture
def parts(whole, tmp_path) -> list[Path]:
    """The model again, written by the gguf package in COUNT files."""
    file = read_gguf(whole)
    writer = gguf.GGUFWriter(
        tmp_path / "model.gguf", "deepseek2", split_max_tensors=-(-len(file.tensors) // COUNT), small_first_shard=False
    )
    adding = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in file.fields.items():
        if key != "general.architecture":
            adding.get(type(value), writer.add_array)(key, value)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.read()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == [f"model-{k:05}-of-00004.gguf" for k in range(1, COUNT + 1)]
    return found


@pytest.mark.parametrize("named", range(COUNT))
def test_a_model_in_several_files_is_read_by_the_name_of_any(named, parts, whole):
    together, one = read_gguf(parts[named]), read_gguf(whole)
    assert list(together.tensors) == list(one.tensors)
    assert one.fields.items() <= together.fields.items()
    expected = arrays_of(load_gguf(whole))
    found = arrays_of(load_gguf(parts[named]))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_part_that_is_not_there_is_named(parts):
    parts[2].unlink()
    with pytest.raises(ConfigError, match="model-00003-of-00004.gguf cannot be read"):
        read_gguf(parts[0])


def test_a_part_whose_name_does_not_say_which_it_is_is_refused(parts, tmp_path):
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="one of 4 parts.*its name does not say which"):
        read_gguf(renamed)


def test_parts_that_have_changed_places_are_refused(parts, tmp_path):
    parts[1].rename(tmp_path / "aside")
    parts[2].rename(parts[1])
    (tmp_path / "aside").rename(parts[2])
    with pytest.raises(ConfigError, match="00002-of-00004.gguf is not part 2 of 4"):
        read_gguf(parts[0])


def test_two_parts_with_the_same_tensors_are_refused(parts):
    content = bytearray(parts[0].read_bytes())
    place = content.index(b"split.no") + len("split.no") + 4
    content[place] = 1
    parts[1].write_bytes(content)
    with pytest.raises(ConfigError, match="tensors of one name"):
        read_gguf(parts[0])


def test_an_embedding_larger_than_what_is_read_at_once_comes_back_whole(whole, monkeypatch):
    expected = arrays_of(load_gguf(whole))
    monkeypatch.setattr("opendeep_jax.interop.gguf.ELEMENTS_AT_ONCE", 100)  # 64 rows of 16 numbers: 6 at a time
    found = arrays_of(load_gguf(whole))
    for name in ("embedding.embedding", "head.kernel"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_what_is_read_becomes_the_models_without_another_copy(whole, monkeypatch):
    made = []

    def remembered(*arguments):
        made.append(reading.empty(*arguments))
        return made[-1]

    monkeypatch.setattr("opendeep_jax.interop.gguf.empty", remembered)
    _, params, router_bias = split(load_gguf(whole))
    places = {array.unsafe_buffer_pointer() for array in (params | router_bias).values()}
    assert places == {array.ctypes.data for array in made}
