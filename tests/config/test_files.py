"""A file is replaced whole or stays as it was."""

import errno
import os
from pathlib import Path

import pytest

from opendeep_jax.config.files import replacing, write_atomically


def test_text_is_written_and_replaced_without_leaving_anything_else(tmp_path):
    for text in ("one\r\n", "größer\n"):
        write_atomically(tmp_path / "file", text)
        assert (tmp_path / "file").read_bytes().decode() == text
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")  # as write(2) reports it: without a name

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError) as raised:
        write_atomically(path, "new")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_failure_inside_the_block_replaces_nothing(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "picture") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_is_the_callers_to_make(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_atomically(tmp_path / "none" / "file", "text")
    assert raised.value.filename == str(tmp_path / "none" / "file")
