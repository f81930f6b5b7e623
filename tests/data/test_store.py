import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import small_store
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data import store as stores
from opendeep_jax.data.sources import hash_id
from opendeep_jax.data.store import check_files, open_store
from opendeep_jax.text.files import byte_tokenizer

TEXTS = small_store.texts(60)
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store.make_store(tmp_path_factory.mktemp("store"), TEXTS, shard_bytes=3000)


@pytest.fixture
def damaged(store, tmp_path):
    """A copy of the store, to be damaged."""
    shutil.copytree(store.directory, tmp_path / "copy")
    return tmp_path / "copy"


def expected(document: int) -> list[int]:
    return [TOKENIZER.bos_id, *TEXTS[document].encode("utf-8"), TOKENIZER.eos_id]


def test_each_document_is_whole_between_its_marks(store):
    assert store.documents == len(TEXTS) and store.shards > 3
    lengths = store.lengths(0, store.documents)
    tokens = store.read([(i, 0, int(lengths[i])) for i in range(store.documents)])
    for i, ids in enumerate(tokens):
        assert ids.dtype == np.uint16 and ids.tolist() == expected(i)
    assert store.tokens == lengths.sum()
    assert store.byte_lengths(0, len(TEXTS)).tolist() == [len(text.encode("utf-8")) for text in TEXTS]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_spans_are_read_together_as_alone(store, data):
    spans = []
    for document in data.draw(st.lists(st.integers(0, len(TEXTS) - 1), max_size=8)):
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(expected(document)))] * 2)))
        spans.append((document, begin, end))
    read = store.read(spans)
    assert [ids.tolist() for ids in read] == [expected(document)[begin:end] for document, begin, end in spans]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_lengths_and_hashes_of_any_range_are_those_of_its_documents(store, data):
    first, end = sorted(data.draw(st.tuples(*[st.integers(0, len(TEXTS))] * 2)))
    assert store.lengths(first, end).tolist() == [len(expected(i)) for i in range(first, end)]
    ids = [store.describe(i)["id"] for i in range(first, end)]
    assert store.id_hashes(first, end).tolist() == [hash_id(id) for id in ids]
    assert store.id_hashes(first, end).dtype == np.uint64 and store.lengths(first, end).dtype == np.int64


def test_a_document_says_what_it_is(store):
    described = store.describe(7)
    assert described == {
        "id": "id7",
        "url": "https://example.org/7",
        "license": "MIT",
        "shard": described["shard"],
        "bytes": len(TEXTS[7].encode("utf-8")),
        "tokens": len(expected(7)),
    }
    assert (store.directory / "shards" / described["shard"]).is_dir()


def test_documents_are_found_by_their_id(store):
    for i in range(len(TEXTS)):
        assert store.find(f"id{i}") == [i]
    assert store.find("nobody") == []


def test_all_documents_of_one_id_are_found(tmp_path):
    store = small_store.make_store(tmp_path, TEXTS, shard_bytes=3000, ids=["twin" if i % 7 else "x" for i in range(60)])
    assert store.find("twin") == [i for i in range(60) if i % 7]


def test_documents_and_tokens_that_are_not_there_are_refused(store):
    for document in (-1, store.documents):
        with pytest.raises(IndexError, match=f"of a store with {store.documents}"):
            store.read([(0, 0, 1), (document, 0, 1)])
        with pytest.raises(IndexError):
            store.describe(document)
    for begin, end in ((-1, 2), (3, 2), (0, len(expected(5)) + 1)):
        with pytest.raises(IndexError, match="of document 5"):
            store.read([(5, begin, end)])
    with pytest.raises(IndexError):
        store.lengths(0, store.documents + 1)


def test_manifest_tells_source_tokenizer_licences_and_totals(store):
    manifest = store.manifest
    assert manifest["source"]["name"] == "small" and "weight" not in manifest["source"]
    assert manifest["tokenizer"] == "bytes" and manifest["tokenizer_hash"] == TOKENIZER.content_hash
    licenses = manifest["licenses"]
    assert set(licenses) == {"MIT", "CC0-1.0"}
    for key in ("documents", "tokens", "bytes"):
        assert sum(counts[key] for counts in licenses.values()) == manifest[key]
    assert manifest["bytes"] == sum(len(text.encode("utf-8")) for text in TEXTS)
    assert manifest["curation"] == {"quality": ["c4"]}


def test_a_shard_has_its_own_manifest(store):
    shards = [json.loads((store.shard_directory(i) / "shard.json").read_text()) for i in range(store.shards)]
    assert sum(shard["documents"] for shard in shards) == store.documents
    assert [part["file"] for shard in shards for part in shard["parts"]] == sorted(
        part["file"] for shard in shards for part in shard["parts"]
    )
    for shard in shards:
        assert shard["tokenizer_hash"] == TOKENIZER.content_hash and len(shard["curation_hash"]) == 64
        assert set(shard["files"]) == {"documents.arrow", "tokens/c/0", "tokens/zarr.json"}


def test_opening_reads_nothing_of_the_shards(damaged):
    shutil.rmtree(damaged / "shards")
    store = open_store(damaged)
    assert store.documents == len(TEXTS)
    with pytest.raises(ConfigError, match="documents.arrow is damaged: No such file.*only that shard is made anew"):
        store.lengths(0, 1)


def test_more_shards_than_may_stay_open_are_read_all_the_same(store, monkeypatch):
    monkeypatch.setattr(stores, "OPEN_SHARDS", 2)
    again = open_store(store.directory)
    np.testing.assert_array_equal(again.lengths(0, again.documents), store.lengths(0, store.documents))
    assert again.read([(i, 0, 3) for i in (0, 59, 1)])[1].tolist() == expected(59)[:3]
    assert again.shard.cache_info().currsize == 2


def test_a_store_travels_to_another_process(store):
    assert pickle.loads(pickle.dumps(store)).content_hash == store.content_hash


def test_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    store = small_store.make_store(tmp_path, ["zwölf"], tokenizer=small_store.large_tokenizer())
    assert store.read([(0, 0, 8)])[0].tolist() == [69_998, *"zwölf".encode(), 69_999]
    assert store.read([(0, 0, 1)])[0].dtype == np.uint32 and store.manifest["dtype"] == "uint32"


def test_directory_without_a_whole_store_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ConfigError, match="store.json is missing.*opendeep data prepare"):
        open_store(tmp_path)


def test_store_of_another_tokenizer_is_refused(store):
    with pytest.raises(ConfigError, match="made with the tokenizer bytes .*data.tokenizer"):
        open_store(store.directory, "0" * 64)
    assert open_store(store.directory, TOKENIZER.content_hash).documents == store.documents


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"version": 2}', "\xff"])
def test_damaged_store_json_is_named(damaged, text):
    (damaged / "store.json").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match="store.json is damaged.*Delete it and run `opendeep data prepare`"):
        open_store(damaged)


def test_store_of_another_format_is_refused(damaged):
    (damaged / "store.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match="has format 1"):
        open_store(damaged)


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["missing", "cut off", "flipped", "flipped, too large to be checked"])
def test_damaged_index_is_named(damaged, damage, monkeypatch):
    path = damaged / "shards.arrow"
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        os.truncate(path, path.stat().st_size - 1)
    else:
        flip(path, 1000)
    if damage.endswith("checked"):
        monkeypatch.setattr(stores, "CHECKED_INDEX_BYTES", 0)
    with pytest.raises(ConfigError, match="shards.arrow is damaged.*made anew from the shards"):
        open_store(damaged)


def test_no_flipped_byte_of_a_large_index_gives_other_tokens(damaged, monkeypatch):
    monkeypatch.setattr(stores, "CHECKED_INDEX_BYTES", 0)
    monkeypatch.setattr(stores, "sha256_of_ends", lambda path: None)  # the layout's own damage is tested above
    manifest = json.loads((damaged / "store.json").read_text())
    manifest["index"]["ends_sha256"] = None
    (damaged / "store.json").write_text(json.dumps(manifest))
    path = damaged / "shards.arrow"
    whole, noticed = path.read_bytes(), 0
    body = open_store(damaged).index.column("name").buffers()[2].to_pybytes()
    begin, end = whole.index(body), whole.rindex(b"ARROW1") - 2000
    for at in random.Random(0).sample(range(begin, end), 40):
        flip(path, at)
        try:
            store = open_store(damaged)
            lengths = store.lengths(0, store.documents)
            for i in range(0, len(TEXTS), 9):
                assert store.read([(i, 0, int(lengths[i]))])[0].tolist() == expected(i)
        except ConfigError as error:
            assert "is damaged" in str(error)
            noticed += 1
        path.write_bytes(whole)
    assert noticed > 5


def test_cut_off_missing_and_flipped_tokens_are_named_with_the_cure(damaged):
    path = damaged / "shards/00000001/tokens/c/0"
    document = open_store(damaged).shard(1).first_document
    whole = path.read_bytes()
    for damage in (
        lambda: flip(path, 10),
        lambda: os.truncate(path, len(whole) // 2),
        lambda: os.truncate(path, 0),
        path.unlink,
    ):
        damage()
        with pytest.raises(ConfigError, match="00000001/tokens/c/0 is damaged: .*Delete .*00000001 and run"):
            open_store(damaged).read([(0, 0, 2), (document, 0, 2)])
        assert open_store(damaged).read([(0, 0, 2)])[0].tolist() == expected(0)[:2]
        path.write_bytes(whole)
    assert open_store(damaged).read([(document, 0, 2)])[0].tolist() == expected(document)[:2]


def test_cut_off_missing_and_flipped_documents_are_named_with_the_cure(damaged):
    path = damaged / "shards/00000001/documents.arrow"
    document = open_store(damaged).shard(1).first_document
    whole = path.read_bytes()
    for damage in (
        lambda: flip(path, whole.index(b"https://")),
        lambda: os.truncate(path, len(whole) - 100),
        lambda: os.truncate(path, 0),
        path.unlink,
    ):
        damage()
        for use in (lambda store: store.describe(document), lambda store: store.lengths(0, store.documents)):
            with pytest.raises(ConfigError, match="00000001/documents.arrow is damaged: .*Delete .*00000001 and run"):
                use(open_store(damaged))
        assert open_store(damaged).describe(0)["id"] == "id0"
        path.write_bytes(whole)


def test_check_files_names_missing_and_cut_off_files(damaged):
    check_files(open_store(damaged))
    for name in ("shard.json", "documents.arrow", "tokens/zarr.json", "tokens/c/0"):
        path = damaged / "shards/00000002" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ConfigError, match=f"{name} is damaged: it has {len(whole) - 1} bytes instead of"):
            check_files(open_store(damaged))
        path.unlink()
        with pytest.raises(ConfigError, match=f"{name} is damaged: No such file"):
            check_files(open_store(damaged))
        path.write_bytes(whole)
    shutil.rmtree(damaged / "shards/00000002")
    with pytest.raises(ConfigError, match="Delete .*2 and run `opendeep data prepare` again .*: only that shard"):
        check_files(open_store(damaged))
