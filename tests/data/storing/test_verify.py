import json
import os
import shutil

import pytest
import small_store

from opendeep_jax.data.store import open_store
from opendeep_jax.data.storing.verify import verify_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_store.make_store(tmp_path_factory.mktemp("whole"), small_store.texts(60), shard_bytes=3000)


@pytest.fixture
def directory(whole, tmp_path):
    shutil.copytree(whole.directory, tmp_path / "store")
    return tmp_path / "store"


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_store_has_no_problems(directory):
    assert verify_store(open_store(directory)) == []


@pytest.mark.parametrize("name", ["shard.json", "documents.arrow", "tokens/zarr.json", "tokens/c/0"])
def test_each_damaged_file_is_named_and_no_other(directory, name):
    flip(directory / "shards/00000001" / name, 30)
    os.truncate(directory / "shards/00000003" / name, 10)
    (directory / "shards/00000002" / name).unlink()
    problems = verify_store(open_store(directory))
    words = ("00000001", "SHA-256"), ("00000002", "is missing"), ("00000003", "has 10 bytes instead of")
    assert len(problems) == 3
    for problem, (shard, what) in zip(problems, words, strict=True):
        assert problem.startswith(str(directory / "shards" / shard / name)) and what in problem


def test_missing_shard_is_named_once_with_its_cure(directory):
    shutil.rmtree(directory / "shards/00000001")
    problems = verify_store(open_store(directory))
    assert len(problems) == 1 and "00000001 is damaged: it is missing. Delete" in problems[0]


def test_totals_that_the_shards_do_not_make_are_noticed(directory):
    path = directory / "store.json"
    manifest = json.loads(path.read_text())
    manifest["tokens"] += 1
    path.write_text(json.dumps(manifest))
    (problem,) = verify_store(open_store(directory))
    assert "store.json says tokens" in problem


def test_index_damaged_after_opening_is_noticed(directory):
    store = open_store(directory)
    content = (directory / "shards.arrow").read_bytes()
    (directory / "shards.arrow").unlink()  # and a new file: the mapped one stays as it was
    (directory / "shards.arrow").write_bytes(content)
    flip(directory / "shards.arrow", 500)
    assert any("shards.arrow is damaged: its SHA-256 is" in problem for problem in verify_store(store))
