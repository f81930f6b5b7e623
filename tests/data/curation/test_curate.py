"""Curation end to end: what is planted is removed and counted, and the bytes of the result depend on nothing else."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curation_corpus import NOUNS, changed, configure, prose, write_language_model, write_source

pytest.importorskip("datatrove")
pytest.importorskip("rensa")

from opendeep_jax.config.checks import ConfigError  # noqa: E402
from opendeep_jax.config.schema import SourceConfig  # noqa: E402
from opendeep_jax.data.curation import (  # noqa: E402
    check_curation,
    curate,
    curation_directory,
    stages,  # noqa: E402
)
from opendeep_jax.data.curation import pipeline as module  # noqa: E402
from opendeep_jax.data.curation.plan import cut_tasks  # noqa: E402
from opendeep_jax.data.sources import Part, SourceFile, list_files, list_parts, read_part  # noqa: E402

ALL = {
    "quality": ("gopher_quality", "gopher_repetition", "fineweb"),
    "exact_deduplication": True,
    "minhash_deduplication": True,
    "mask_personal_data": True,
}


@pytest.fixture
def planted(tmp_path) -> tuple[Path, Path, Path]:
    """Two sources, and a set of evaluation items."""
    item = "when the quick brown fox jumps over the lazy dog near the bank of a river it sings of dawn"
    ours = [prose(i) for i in range(8)]
    texts = [
        *ours,
        ours[0],  # 8: an exact copy
        changed(ours[1]),  # 9: a near-copy
        "Too short to be of any worth.",  # 10
        "\n".join(["the same line of the text to have again"] * 30),  # 11
        prose("mail") + "\nWrite to jane.doe@company.org or to bob@corp.co.uk from 8.8.8.8, not from 10.0.0.1.",  # 12
        prose("contaminated") + "\n" + item[: item.index(" it sings")].upper() + "!",  # 13: an n-gram of several
    ]
    others = [*(prose(i + 100) for i in range(5)), ours[2], changed(ours[3]), prose("b") + "\n" + item[20:]]
    evaluation = tmp_path / "fox.jsonl"
    evaluation.write_text(json.dumps({"question": item, "choices": ["yes", "no"]}) + '\n{"question": "Why?"}\n')
    return write_source(tmp_path / "first.jsonl", texts), write_source(tmp_path / "second.jsonl", others), evaluation


def accounting_of(config) -> dict:
    return json.loads((curation_directory(config) / "curation.json").read_text())


def documents_of(source: SourceConfig) -> list:
    """The documents of a source as everyone else reads them."""

    def refuse(reason, id):
        raise AssertionError(f"{id}: {reason}")

    parts = list_parts(source, list_files(source))
    return [document for part in parts for document in read_part(source, part, refuse)]


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a curation by name; of the accounting what is not a time."""
    found = {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
    accounting = json.loads(found.pop("curation.json"))
    del accounting["seconds"]
    return found | {"curation.json": json.dumps(accounting)}


def test_what_is_planted_is_removed_and_counted_under_its_reason(planted, tmp_path):
    first, second, evaluation = planted
    config = configure(tmp_path / "data", first, second, **ALL, evaluation_sets=(str(evaluation),))
    one, two = curate(config, progress=False)
    assert [document.id for document in documents_of(one)] == [f"first-{i}" for i in (*range(8), 12)]
    assert [document.id for document in documents_of(two)] == [f"second-{i}" for i in range(5)]
    accounting = accounting_of(config)
    dropped = {
        name: {reason: count["documents"] for reason, count in source["dropped"].items()}
        for name, source in accounting["sources"].items()
    }
    assert dropped == {
        "first": {
            "exact duplicate": 1,
            "near duplicate": 1,
            "evaluation overlap": 1,
            "gopher_quality: gopher_short_doc": 1,
            "gopher_repetition: dup_line_frac": 1,
        },
        "second": {"exact duplicate": 1, "near duplicate": 1, "evaluation overlap": 1},
    }
    assert accounting["duplicate_clusters"] == {"2": 4}
    assert accounting["sources"]["first"]["masked"] == {"email": 2, "ip": 1}
    assert accounting["evaluation_sets"] == {
        "fox.jsonl": {"items": 2, "ngrams": 10, "too_short": 1, "documents_removed": 2}
    }
    assert accounting["engines"]["datatrove"]


@pytest.mark.parametrize("quality", [("c4",), ("fineweb", "c4"), ()])
def test_every_document_and_byte_is_accounted_for(planted, tmp_path, quality):
    first, second, evaluation = planted
    recipe = ALL | {"quality": quality, "evaluation_sets": (str(evaluation),)}
    config = configure(tmp_path / "data", first, second, **recipe)
    curated = curate(config, progress=False)
    accounts = accounting_of(config)["sources"].values()
    for source, account, path in zip(curated, accounts, (first, second), strict=True):
        given = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        left = documents_of(source)
        dropped = account["dropped"].values()
        assert account["documents_in"] == len(given)
        assert account["bytes_in"] == sum(len(text.encode()) for text in given)
        assert account["documents_out"] == len(left)
        assert account["bytes_out"] == sum(len(document.text.encode()) for document in left)
        assert account["documents_in"] == account["documents_out"] + sum(count["documents"] for count in dropped)
        assert account["bytes_in"] == account["bytes_out"] + account["bytes_trimmed"] + sum(
            count["bytes"] for count in dropped
        )


def test_dropped_documents_can_be_looked_at_with_the_reason_beside_them(planted, tmp_path):
    first, second, evaluation = planted
    config = configure(tmp_path / "data", first, second, **ALL, evaluation_sets=(str(evaluation),))
    curate(config, progress=False)
    directory = curation_directory(config) / "dropped"
    assert sorted(path.name for path in directory.iterdir()) == [
        "evaluation_overlap.jsonl.gz",
        "exact_duplicate.jsonl.gz",
        "gopher_quality_gopher_short_doc.jsonl.gz",
        "gopher_repetition_dup_line_frac.jsonl.gz",
        "near_duplicate.jsonl.gz",
    ]
    with gzip.open(directory / "evaluation_overlap.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    assert [(record["id"], record["source"]) for record in records] == [("first-13", "first"), ("second-7", "second")]
    assert records[0]["evaluation_set"] == "fox.jsonl"
    assert records[0]["shared"] == "when the quick brown fox jumps over the lazy dog near the bank"


def test_the_curated_source_keeps_its_name_weight_and_what_is_to_be_cited(planted, tmp_path):
    config = configure(tmp_path / "data", planted[0], exact_deduplication=True)
    source = dataclasses.replace(config.sources[0], weight=0.25, epochs=3.0)
    (curated,) = curate(dataclasses.replace(config, sources=(source,)), progress=False)
    same = "name", "weight", "epochs", "license", "citation"
    assert [getattr(curated, name) for name in same] == [getattr(source, name) for name in same]
    assert documents_of(curated)[0].license == "CC0-1.0"
    size = sum(len(document.text) for document in documents_of(curated))
    assert accounting_of(config)["sources"]["first"]["licenses"] == {"CC0-1.0": {"documents": 13, "bytes": size}}


def test_personal_data_is_replaced_and_private_addresses_stay(planted, tmp_path):
    config = configure(tmp_path / "data", planted[0], mask_personal_data=True)
    (curated,) = curate(config, progress=False)
    text = documents_of(curated)[12].text
    assert "Write to email@example.com or to email@example.com from 22.214.171.124, not from 10.0.0.1." in text


def test_the_bytes_are_the_same_with_any_number_of_workers(planted, tmp_path):
    first, second, evaluation = planted
    others = [write_source(tmp_path / f"more{i}.jsonl", [prose(f"{i}/{j}") for j in range(3)]) for i in range(2)]
    results = []
    for workers in (1, 2):
        recipe = ALL | {"evaluation_sets": (str(evaluation),)}
        config = configure(tmp_path / f"data{workers}", first, second, *others, workers=workers, **recipe)
        curate(config, progress=False)
        results.append(contents(curation_directory(config)))
    assert results[0] == results[1]


def test_tasks_take_the_parts_in_order_and_none_is_larger_than_need_be():
    file = SourceFile("a", "/a", 0, "")
    parts = [[Part(file, i, i + 1, 3 << 20) for i in range(100)], [Part(file, 0, 1, 100 << 20)], []]
    tasks = cut_tasks(parts)
    for source, of_source in enumerate(parts):
        mine = [task for task in tasks if task.source == source]
        assert [part for task in mine for part in task.parts] == of_source
        assert [task.number for task in mine] == list(range(len(mine)))
    assert [len(task.parts) for task in tasks if task.source == 0] == [2] * 50  # 400 MiB / 64
    many = cut_tasks([parts[0] * 100])
    assert {len(task.parts) for task in many[:-1]} == {21}  # 63 of at most 64 MiB


def test_what_is_done_is_returned_without_the_engines(planted, tmp_path, monkeypatch):
    config = configure(tmp_path / "data", planted[0], exact_deduplication=True)
    once = curate(config, progress=False)
    monkeypatch.setattr(module, "check_curation", lambda config: pytest.fail("looked for engines"))
    assert curate(config, progress=False) == once


def test_another_recipe_or_another_source_is_another_curation(planted, tmp_path):
    first, second, evaluation = planted
    config = configure(tmp_path / "data", first, evaluation_sets=(str(evaluation),))
    others = [
        configure(tmp_path / "data", second, evaluation_sets=(str(evaluation),)),
        configure(tmp_path / "data", first, evaluation_sets=(str(evaluation),), mask_personal_data=True),
    ]
    directories = {curation_directory(one) for one in (config, *others)}
    evaluation.write_text('{"question": "another"}\n')
    assert len(directories | {curation_directory(config)}) == 4


def test_an_error_half_way_keeps_the_finished_tasks_and_the_second_attempt_ends_alike(planted, tmp_path, monkeypatch):
    first, second, evaluation = planted
    recipe = ALL | {"evaluation_sets": (str(evaluation),)}
    undisturbed = configure(tmp_path / "data", first, second, **recipe)
    curate(undisturbed, progress=False)
    config = configure(tmp_path / "again", first, second, **recipe)
    for stage, rank in (("filter", 1), ("duplicates", 0), ("finish", 1), ("account", 0)):
        original = stages.STAGES[stage]

        def fails(plan, at, advance, original=original, rank=rank):
            if at == rank:
                raise KeyboardInterrupt
            return original(plan, at, advance)

        with monkeypatch.context() as patch:
            patch.setitem(stages.STAGES, stage, fails)
            with pytest.raises(KeyboardInterrupt):
                curate(config, progress=False)
        assert not (curation_directory(config) / "curation.json").exists()
    filtered = curation_directory(config) / "work" / "filter" / "00000.parquet"
    before = filtered.stat().st_mtime_ns
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)  # so that it can be looked at
    curate(config, progress=False)
    assert filtered.stat().st_mtime_ns == before
    monkeypatch.undo()
    curate(config, progress=False)
    assert contents(curation_directory(config)) == contents(curation_directory(undisturbed))


@pytest.mark.slow
def test_a_curation_killed_at_any_moment_ends_like_an_undisturbed_one(tmp_path):
    paths = [write_source(tmp_path / f"s{i}.jsonl", [prose(f"{i} {j % 35}") for j in range(40)]) for i in range(6)]
    undisturbed = configure(tmp_path / "data", *paths, **ALL)
    curate(undisturbed, progress=False)
    script = tmp_path / "unguarded.py"  # workers must not run it again
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom curation_corpus import configure\n"
        "from opendeep_jax.data.curation import curate\n"
        f"paths = [Path(path) for path in {[str(path) for path in paths]!r}]\n"
        f"curate(configure(Path({str(tmp_path / 'killed')!r}), *paths, workers=2, **{ALL!r}), progress=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    config = configure(tmp_path / "killed", *paths, **ALL)
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, str(script)], env=environment)
        time.sleep(0.4 + 0.35 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, str(script)], env=environment, check=True)
    assert contents(curation_directory(config)) == contents(curation_directory(undisturbed))


def test_the_language_mix_of_what_is_left_is_counted(tmp_path):
    pytest.importorskip("fasttext")
    model = write_language_model(tmp_path / "model.bin", "abc")
    texts = [" ".join(name + noun for noun in NOUNS[i : i + 20]) for i, name in enumerate("aababcab")]
    config = configure(
        tmp_path / "data",
        write_source(tmp_path / "mixed.jsonl", texts),
        languages=("a", "b"),
        language_model=str(model),
    )
    (curated,) = curate(config, progress=False)
    account = accounting_of(config)["sources"]["mixed"]
    assert account["languages"] == {"a": 4, "b": 3}
    assert account["dropped"] == {"language: c": {"documents": 1, "bytes": len(texts[5])}}
    assert len(documents_of(curated)) == 7


def test_records_without_text_are_counted_when_they_are_left_out(tmp_path):
    path = write_source(tmp_path / "holes.jsonl", [prose(1), "", prose(2)])
    config = configure(tmp_path / "data", path, exact_deduplication=True)
    source = dataclasses.replace(config.sources[0], bad_documents="leave_out")
    config = dataclasses.replace(config, sources=(source,))
    curate(config, progress=False)
    account = accounting_of(config)["sources"]["holes"]
    assert account["dropped"] == {"empty text": {"documents": 1, "bytes": 0}}
    assert (account["documents_in"], account["documents_out"]) == (3, 2)


def test_an_error_in_the_sources_arrives_as_itself(tmp_path):
    path = write_source(tmp_path / "holes.jsonl", [prose(1), ""])
    with pytest.raises(ConfigError, match="empty text"):
        curate(configure(tmp_path / "data", path, exact_deduplication=True), progress=False)


def test_a_source_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path):
    path = write_source(tmp_path / "short.jsonl", ["Too short.", "Also too short."])
    config = configure(tmp_path / "data", path, quality=("gopher_quality",))
    for _ in range(2):  # also when it is all done already
        with pytest.raises(ConfigError, match=r"none of the 2 documents.*gopher_short_doc \(2\)"):
            curate(config, progress=False)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"language_model": "nowhere/lid.176.bin"}, r"nowhere/lid\.176\.bin.*fasttext\.cc"),
        ({"evaluation_sets": ("nowhere/items.jsonl",)}, r"nowhere/items\.jsonl"),
        ({"evaluation_sets": ("items.csv",)}, r"items\.csv.*\.jsonl"),
        ({"evaluation_sets": ("a/items.jsonl", "b/items.jsonl")}, "two files of the same name"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_read(tmp_path, recipe, message):
    config = configure(tmp_path / "data", tmp_path / "never_read.jsonl", **recipe)
    with pytest.raises(ConfigError, match=message):
        check_curation(config)
    assert not (tmp_path / "data").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "rensa" else find(name))
    config = configure(tmp_path / "data", tmp_path / "never_read.jsonl", minhash_deduplication=True)
    with pytest.raises(ConfigError, match=r"rensa.*pip install 'opendeep-jax\[curation\]'"):
        check_curation(config)


def test_two_sources_of_one_name_are_refused(tmp_path):
    path = write_source(tmp_path / "one.jsonl", [prose(1)])
    with pytest.raises(ConfigError, match="name of its own"):
        curate(configure(tmp_path / "data", path, path, exact_deduplication=True), progress=False)


JAPANESE = "東京の港は今日も静かで、古い風車がゆっくりと回っている。新しい本を読む人が駅に集まる。" * 20
GERMAN = "Der Hafen ist heute wieder still, und die alte Mühle dreht sich langsam im Wind am Ufer. " * 20


@pytest.mark.parametrize("text", [JAPANESE, GERMAN])
def test_english_thresholds_do_not_drop_other_languages_in_silence(tmp_path, text):
    texts = [prose(i) for i in range(8)] + [f"{text} {i}" for i in range(2)]
    config = configure(tmp_path / "data", write_source(tmp_path / "mixed.jsonl", texts), quality=("gopher_quality",))
    with pytest.raises(ConfigError, match="2 that are not in English were dropped by data.curation.quality"):
        curate(config, progress=False)


def test_english_thresholds_for_other_languages_are_refused_at_once(tmp_path):
    recipe = {"quality": ("fineweb",), "languages": ("en", "ja"), "language_model": "x"}
    config = configure(tmp_path / "data", write_source(tmp_path / "a.jsonl", ["x"]), **recipe)
    with pytest.raises(ConfigError, match="keeps ja, .* fineweb, whose thresholds are those of papers on English"):
        check_curation(config)
