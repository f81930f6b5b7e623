"""The benchmarks of the data pipeline, at sizes that say nothing about speed: each still measures what it says."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import open_data
import packing
import pytest
import read_batches
import where_at_scale


def rows_of(printed: str) -> list[str]:
    """The lines of the printed table, without its head."""
    return printed.split("\n\n")[1].splitlines()[1:]


def test_packing_prints_a_line_for_each_packing_with_its_rates(tmp_path, capsys):
    packing.main(["--documents=3000", "--length=512", f"--directory={tmp_path}"])
    rows = rows_of(capsys.readouterr().out)
    assert [row.split()[0] for row in rows] == list(packing.PACKINGS)
    padding, cut = ([float(row.split()[column].rstrip("%")) for row in rows] for column in (-2, -1))
    assert padding[0] < 1 and padding[2] < padding[1] and cut[0] > 5 and cut[1:] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_lengths_are_as_the_docstring_says():
    tokens = packing.document_tokens(100_000)
    assert tokens.min() >= 1 and tokens.max() <= 200_000
    assert 530 < np.median(tokens) < 560 and 1050 < tokens.mean() < 1200


def test_tables_are_aligned_and_leave_no_end_of_a_line_to_guess(capsys):
    packing.print_table([{"name": "a", "n": "1,000"}, {"name": "longer", "n": ""}])
    assert capsys.readouterr().out == "name        n\na       1,000\nlonger       \n"


@pytest.mark.slow
def test_read_batches_measures_all_readers(tmp_path, capsys):
    read_batches.main(["--tokens=100000", "--seconds=0.05", "--batch=4", f"--directory={tmp_path}"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 1 + len(read_batches.GROUPS) + 3 + len(read_batches.KINDS)
    assert all(float(row.split()[-1]) > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_readers_give_the_tokens_that_were_written(tmp_path):
    read_batches.write_text(tmp_path / "text", 100_000)
    read_batches.prepare_all(tmp_path, 4)
    read_batches.write_others(tmp_path)
    offsets = np.load(tmp_path / "offsets.npy")
    flat = np.fromfile(tmp_path / "flat.bin", np.uint16)
    assert len(flat) == offsets[-1] and len(offsets) == 91
    for group in read_batches.GROUPS:
        path = tmp_path / f"{group}.array_record"
        records = read_batches.random_reader(path).read_all()
        assert b"".join(records) == flat.tobytes() and len(records) == 90
    batch = next(read_batches.grain_batches(tmp_path / "1.array_record", 64, 4, 1))
    assert batch["tokens"].shape == (4, 65)


@pytest.mark.slow
def test_where_and_when_find_the_planted_document(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(where_at_scale.__file__).parents[1]))
    sizes = ["--gigabytes=0.0002", "--documents=100", "--batch=4", "--rounds=1"]
    where_at_scale.main([*sizes, f"--directory={tmp_path}"])
    printed = capsys.readouterr().out
    assert re.match(r"1,\d00 documents, 1\d shards", printed) and printed.endswith("`where` too\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("datatrove"), reason="needs the extra `curation`")
def test_open_data_goes_all_the_way_and_finds_what_was_planted(tmp_path, capsys):
    open_data.main(["--megabytes=2", "--tokenizer=bytes", "--seconds=0.1", "--workers=1", f"--directory={tmp_path}"])
    printed = capsys.readouterr().out
    stages = [row.split()[0].strip(",") for row in rows_of(printed)]
    assert stages == ["curate", "tokenizer", "tokenize", "pack", "batches"]
    planted = "1 near copies", "2 exact copies", "1 with evaluation items"
    removed = "1 near duplicate", "2 exact duplicate", "1 evaluation overlap"
    assert all(words in printed for words in (*planted, *removed))
    assert list(tmp_path.iterdir()) == []


def test_planted_copies_are_copies_and_near_ones_differ_by_a_word(tmp_path):
    facts = open_data.write_sources(tmp_path, 2)
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(tmp_path / "text" / "web").column("text").to_pylist()
    assert facts["exact copies"] == len(texts) - len(set(texts)) > 0
    near = [set(text.split()) for text in texts if re.search(r"otherwise\d", text)]
    assert len(near) == facts["near copies"] > 0
    others = [set(text.split()) for text in texts if not re.search(r"otherwise\d", text)]
    assert all(any(len(words - other) == 1 and len(other - words) <= 1 for other in others) for words in near)
    assert 1.9e6 < facts["bytes"] < 2.2e6
