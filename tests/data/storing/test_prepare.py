import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import small_store
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data import store as stores
from opendeep_jax.data.sources import Part, SourceFile
from opendeep_jax.data.store import check_files, open_store
from opendeep_jax.data.storing import shards
from opendeep_jax.data.storing.prepare import group_parts, prepare_store
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer, train_bpe

TEXTS = small_store.texts(60)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_store.write_source(tmp_path_factory.mktemp("source"), TEXTS)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """The files of the store that one process makes without a break."""
    directory = tmp_path_factory.mktemp("undisturbed") / "store"
    prepare(directory, source)
    return files(directory)


def prepare(directory, source, tokenizer=None, workers=1, shard_bytes=3000, advance=lambda size: None):
    tokenizer, parts = tokenizer or byte_tokenizer(), small_store.parts_of(source)
    return prepare_store(directory, source, parts, tokenizer, small_store.FACTS, workers, advance, shard_bytes)


def files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@given(sizes=st.lists(st.integers(0, 50)), shard_bytes=st.integers(1, 60))
def test_shards_hold_consecutive_parts_up_to_their_size(sizes, shard_bytes):
    parts = [Part(SourceFile(f"f{i}", f"/f{i}", size, ""), 0, size, size) for i, size in enumerate(sizes)]
    groups = group_parts(parts, shard_bytes)
    assert [part for group in groups for part in group] == parts
    for group in groups:
        assert sum(part.size for part in group[:-1]) < shard_bytes
    for group in groups[:-1]:
        assert sum(part.size for part in group) >= shard_bytes


def test_shards_grow_with_the_source_between_2_and_256_mebibytes():
    file = SourceFile("f", "/f", 0, "")

    def largest(megabytes: int) -> int:
        groups = group_parts([Part(file, i, i + 1, 1 << 20) for i in range(megabytes)])
        return max(len(group) for group in groups)

    assert [largest(megabytes) for megabytes in (1, 40, 640, 2048, 20_000)] == [1, 2, 10, 32, 256]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(source, undisturbed, tmp_path, workers):
    prepare(tmp_path / "store", source, workers=workers)
    assert files(tmp_path / "store") == undisturbed


def test_progress_adds_up_to_the_parts_however_much_is_there(source, tmp_path):
    total = sum(part.size for part in small_store.parts_of(source))
    for remove in ((), ("00000001", "00000003"), ()):
        for name in remove:
            shutil.rmtree(tmp_path / "store/shards" / name)
        sizes = []
        prepare(tmp_path / "store", source, advance=sizes.append)
        assert sum(sizes) == total and min(sizes) >= 0


def test_nothing_of_a_whole_store_is_touched_again(source, tmp_path):
    prepare(tmp_path / "store", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    prepare(tmp_path / "store", source)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


@pytest.mark.parametrize("name", ["shard.json", "documents.arrow", "tokens/c/0", "tokens/zarr.json", ""])
@pytest.mark.parametrize("finished", [True, False])
def test_only_missing_and_cut_off_shards_are_made_anew(source, undisturbed, tmp_path, name, finished):
    directory = tmp_path / "store"
    prepare(directory, source)
    kept = (directory / "shards/00000000/shard.json").stat().st_ino
    if name:
        os.truncate(directory / "shards/00000001" / name, 5)
    else:
        shutil.rmtree(directory / "shards/00000001")
    if not finished:
        (directory / "store.json").unlink()
    check_files(prepare(directory, source))
    assert files(directory) == undisturbed
    assert (directory / "shards/00000000/shard.json").stat().st_ino == kept


@pytest.mark.parametrize("name", ["store.json", "shards.arrow"])
def test_damaged_index_is_made_anew_from_the_shards(source, undisturbed, tmp_path, name):
    directory = tmp_path / "store"
    prepare(directory, source)
    kept = (directory / "shards/00000000/shard.json").stat().st_ino
    os.truncate(directory / name, 20)
    prepare(directory, source)
    assert files(directory) == undisturbed
    assert (directory / "shards/00000000/shard.json").stat().st_ino == kept


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_whose_text_has_changed_is_not_mixed_with_the_others(tmp_path, index):
    source = small_store.write_source(tmp_path / "source", TEXTS)
    directory = tmp_path / "store"
    prepare(directory, source)
    shutil.rmtree(directory / "shards/00000001")
    if not index:
        (directory / "shards.arrow").unlink()
    for path in Path(source.path).iterdir():
        path.write_text(path.read_text("utf-8").replace("words", "wards"), "utf-8")
    with pytest.raises(ConfigError, match="text of source 'small' .* has changed since .*prepare all of it anew"):
        prepare(directory, source)
    with pytest.raises(ConfigError, match="is damaged"):
        check_files(open_store(directory))


def test_store_of_another_tokenizer_is_refused(source, undisturbed, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 300), "utf-8")
    prepare(tmp_path / "store", source)
    with pytest.raises(ConfigError, match="made with the tokenizer bytes"):
        prepare(tmp_path / "store", source, load_tokenizer(path))
    assert files(tmp_path / "store") == undisturbed


def test_documents_left_out_are_counted_with_examples(tmp_path):
    texts = ["" if i % 2 else text for i, text in enumerate(small_store.texts(100))]
    store = small_store.make_store(tmp_path, texts)
    assert store.documents == 50 and store.manifest["left_out"] == {"empty text": 50}
    shard = json.loads((store.shard_directory(0) / "shard.json").read_text())
    examples = shard["left_out"]["empty text"]["examples"]
    assert shard["left_out"]["empty text"]["documents"] == 50 and examples == [f"id{i}" for i in range(1, 41, 2)]


def test_a_source_without_documents_makes_an_empty_store(tmp_path):
    store = small_store.make_store(tmp_path, ["", ""])
    assert (store.documents, store.tokens, store.shards) == (0, 0, 1)
    assert store.lengths(0, 0).shape == (0,) and store.read([]) == [] and store.find("id0") == []
    check_files(store)


def test_tokens_of_a_large_shard_are_divided_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "INNER_CHUNK", 16)
    monkeypatch.setattr(stores, "OUTER_CHUNK", 64)
    monkeypatch.setattr(shards, "OUTER_CHUNK", 64)
    texts = ["a" * 300, "b", "c" * 62, "d" * 63]
    made = small_store.make_store(tmp_path, texts)
    assert len(list((made.shard_directory(0) / "tokens/c").iterdir())) == -(-made.tokens // 64)
    for i, text in enumerate(texts):
        (ids,) = made.read([(i, 0, len(text) + 2)])
        assert byte_tokenizer().decode(ids) == text
    (made.shard_directory(0) / "tokens/c/2").unlink()
    with pytest.raises(ConfigError, match="tokens/c/2 is damaged"):
        open_store(made.directory).read([(0, 130, 131)])


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_while_reading_arrives_as_itself(tmp_path, workers):
    source = small_store.write_source(tmp_path / "source", TEXTS)
    (Path(source.path) / "000020.jsonl").write_text('{"body": "no text"}\n')
    with pytest.raises(ConfigError, match="000020.jsonl"):
        prepare(tmp_path / "store", source, workers=workers)
    assert not (tmp_path / "store/store.json").exists()


def test_full_disk_leaves_nothing_behind_and_says_what_to_do(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_arrow", full)
    with pytest.raises(ConfigError, match="Cannot write .*0000000[0-9]: No space left on device.*--data.directory"):
        prepare(tmp_path / "store", source)
    assert list(files(tmp_path / "store")) == [".lock"]


def test_what_killed_processes_left_is_swept(source, undisturbed, tmp_path):
    directory = tmp_path / "store"
    for name in (".store.json.12", "shards/.00000000.ab/tokens/c/0"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("half")
    prepare(directory, source)
    assert files(directory) == undisturbed


def test_two_at_a_time_take_turns(source, undisturbed, tmp_path):
    threads = [threading.Thread(target=prepare, args=(tmp_path / "store", source)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / "store") == undisturbed


SCRIPT = """
    import os, random, signal, sys, time
    sys.path[:0] = {path!r}
    import pyarrow, tensorstore
    from test_prepare import prepare
    from opendeep_jax.config.schema import SourceConfig
    source, directory = SourceConfig(**{source!r}), {directory!r}
"""


def start(source, directory, code: str) -> subprocess.Popen:
    """Runs `code` in a process of its own, where it can be killed; `prepare`, `source`, `directory` are there."""
    fields = {name: getattr(source, name) for name in source.__dataclass_fields__}
    paths = [str(ROOT), str(ROOT / "tests/data"), str(Path(__file__).parent)]
    script = textwrap.dedent(SCRIPT).format(path=paths, source=fields, directory=str(directory)) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_twenty_kills_at_random_change_no_byte(source, undisturbed, tmp_path):
    # A process with everything imported forks the ones to be killed, and stretches their time over the whole work.
    code = """
        random.seed(0)
        begun = time.perf_counter()
        if not (child := os.fork()):
            prepare(directory + "-timed", source)
            os._exit(0)
        os.waitpid(child, 0)
        seconds = time.perf_counter() - begun
        kills = rounds = 0
        while kills < 20 and rounds < 100:
            rounds += 1
            if not (child := os.fork()):
                prepare(directory, source)
                os._exit(0)
            time.sleep(random.uniform(0.05, 0.5) * seconds)
            os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] == signal.SIGKILL
            if os.path.exists(directory + "/store.json"):
                os.rename(directory, f"{directory}-{rounds}")
        print(kills)
    """
    process = start(source, tmp_path / "store", code)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output == "20\n"
    prepare(tmp_path / "store", source)
    stores = list(tmp_path.glob("store*"))
    for directory in stores:
        prepare(directory, source)
        assert files(directory) == undisturbed


def wait_for(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_prepare_with_workers_that_is_stopped_is_continued(source, undisturbed, tmp_path, kill):
    directory = tmp_path / "store"
    process = start(source, directory, "prepare(directory, source, workers=2)")
    assert wait_for(lambda: any((directory / "shards").glob("0*"))), process.communicate()
    process.send_signal(kill)
    _, errors = process.communicate(timeout=30)
    assert "In a worker" not in errors and "Fatal" not in errors
    prepare(directory, source)
    assert files(directory) == undisturbed


def letters(path):
    """A tokenizer of English letters only."""
    names = {name: i for i, name in enumerate(["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.\n"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(names, [], unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(path))
    return load_tokenizer(path)


def test_text_that_the_tokenizer_cannot_write_is_refused_with_a_document_and_a_cure(tmp_path):
    tokenizer = letters(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"100.0%.*Document .* as of 'Каждый'") as refusal:
        small_store.make_store(tmp_path / "a", ["Каждый"] * 3, tokenizer)
    assert "--data.tokenizer=bpe:8192" in str(refusal.value) and not (tmp_path / "a/store/store.json").exists()


def test_a_few_lost_bytes_are_counted_in_the_manifest(tmp_path):
    texts = ["the quick brown fox " * 30 + "é", "a b"]
    store = small_store.make_store(tmp_path, texts, letters(tmp_path / "tokenizer.json"))
    assert store.manifest["lost_bytes"] == len("é".encode())
    whole = small_store.make_store(tmp_path / "whole", texts)
    assert whole.manifest["lost_bytes"] == 0
