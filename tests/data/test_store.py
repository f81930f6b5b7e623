import errno
import json

import numpy as np
import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.sources import Document
from opendeep_jax.data.store import open_store, write_store
from opendeep_jax.data.tokenizer import byte_tokenizer

DOCUMENTS = [Document("a.txt", "one"), Document("é.txt", "zwölf"), Document("z.jsonl#3", "three")]


@pytest.fixture
def directory(tmp_path):
    write_store(tmp_path / "store", DOCUMENTS, byte_tokenizer(), {"license": "CC0-1.0"}, keep_text=True)
    return tmp_path / "store"


def test_documents_are_stored_between_their_boundaries(directory):
    store, tokenizer = open_store(directory), byte_tokenizer()
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16
    for i, document in enumerate(DOCUMENTS):
        ids = store.tokens[store.offsets[i] : store.offsets[i + 1]]
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(ids) == document.text
        assert store.byte_lengths[i] == len(document.text.encode())
    assert store.names == [document.name for document in DOCUMENTS]
    assert store.text.decode() == "onezwölfthree"


def test_manifest_counts_and_names_the_tokenizer(directory):
    manifest = open_store(directory).manifest
    assert (manifest["documents"], manifest["bytes"], manifest["tokens"]) == (3, 14, 20)
    assert manifest["license"] == "CC0-1.0" and manifest["tokenizer_hash"] == byte_tokenizer().content_hash


def test_progress_adds_up_to_the_bytes(tmp_path):
    sizes = []
    write_store(tmp_path / "store", DOCUMENTS, byte_tokenizer(), {}, advance=sizes.append)
    assert sum(sizes) == 14


def test_no_documents_make_an_empty_store(tmp_path):
    write_store(tmp_path / "store", [], byte_tokenizer(), {})
    store = open_store(tmp_path / "store")
    assert len(store.tokens) == 0 and store.offsets.tolist() == [0] and store.text == b""


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "byte_lengths.npy", "names.json", "text.bin"])
def test_missing_or_cut_off_part_is_noticed(directory, name):
    path = directory / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"damaged: {name} has"):
        open_store(directory)
    path.unlink()
    with pytest.raises(ValueError, match="damaged"):
        open_store(directory)


def test_damaged_manifest_is_noticed(directory):
    path = directory / "manifest.json"
    for text in (path.read_text()[:-5], "{}", "[]", "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            open_store(directory)


def test_full_disk_leaves_nothing_behind_and_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ConfigError, match="Cannot write .*store: No space left on device.*--data.directory"):
        write_store(tmp_path / "store", DOCUMENTS, byte_tokenizer(), {})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_nothing_behind(tmp_path):
    def documents():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", documents(), byte_tokenizer(), {})
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="Cannot write .*file/store"):
        write_store(tmp_path / "file/store", DOCUMENTS, byte_tokenizer(), {})


def test_store_that_another_process_finished_first_is_kept(directory):
    before = (directory / "manifest.json").stat().st_ino
    write_store(directory, DOCUMENTS, byte_tokenizer(), {})
    assert (directory / "manifest.json").stat().st_ino == before
    assert [path.name for path in directory.parent.iterdir()] == ["store"]


def test_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    import dataclasses

    large = dataclasses.replace(byte_tokenizer(), token_bytes=np.ones(70_000, np.int32), eos_id=69_999)
    write_store(tmp_path / "store", DOCUMENTS, large, {})
    store = open_store(tmp_path / "store")
    assert store.tokens.dtype == np.uint32 and store.tokens[-1] == 69_999
    assert json.loads((tmp_path / "store/manifest.json").read_text())["dtype"] == "uint32"
