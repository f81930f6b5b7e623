"""Writes small shards in the schemas of the open corpora, every column with its type, for tests without a network.

Where the schemas were seen is said in the recipes under configs/corpora. Each writer makes the files that the recipe's
glob names, below `root`, and returns the ids and texts that must be read from them.
"""

import gzip
import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

WHEN = datetime(2023, 4, 7, 10, 56, 30, 43316)
TEXTS = ("First of all, naïve text.\n", "第二篇\r\nwith two lines", "And a third.")


def write_parquet(path: Path, columns: dict[str, tuple[pa.DataType, list]], rows_per_group: int = 2) -> Path:
    """A Parquet file of named columns with types and values, cut into row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(values, type) for name, (type, values) in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=rows_per_group, compression="snappy")
    return path


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """JSON lines; compressed as the ending .gz or .zst says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def write_fineweb_edu(root: Path) -> dict[str, str]:
    """data/CC-MAIN-2013-20/train-00000-of-00014.parquet."""
    ids = [f"<urn:uuid:0d8a309d-25c5-405d-a08a-c11239f0d71{i}>" for i in range(3)]
    columns = {
        "text": (pa.string(), list(TEXTS)),
        "id": (pa.string(), ids),
        "dump": (pa.string(), ["CC-MAIN-2013-20"] * 3),
        "url": (pa.string(), [f"http://example.org/{i}" for i in range(3)]),
        "file_path": (pa.string(), ["s3://commoncrawl/crawl-data/CC-MAIN-2013-20/segments/1.warc.gz"] * 3),
        "language": (pa.string(), ["en"] * 3),
        "language_score": (pa.float64(), [0.97, 0.98, 0.99]),
        "token_count": (pa.int64(), [8, 9, 4]),
        "score": (pa.float64(), [2.7, 3.1, 4.2]),
        "int_score": (pa.int64(), [3, 3, 4]),
    }
    write_parquet(root / "data/CC-MAIN-2013-20/train-00000-of-00014.parquet", columns)
    return dict(zip(ids, TEXTS, strict=True))


def write_dclm_baseline(root: Path) -> dict[str, str]:
    """global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst."""
    ids = [f"<urn:uuid:a57efb1b-c977-4b38-8f2a-4aefb27e00a{i}>" for i in range(3)]
    records = [
        {
            "bff_contained_ngram_count_before_dedupe": 20,
            "language_id_whole_page_fasttext": {"en": 0.9382619857788086},
            "metadata": {
                "Content-Length": "61769",
                "Content-Type": "application/http; msgtype=response",
                "WARC-Block-Digest": "sha1:O62W52EPMTRDM7TLTF2EUN6LW7D55B7S",
                "WARC-Concurrent-To": "<urn:uuid:55042cfb-1487-48d0-9c6a-04e8c186c250>",
                "WARC-Date": "2014-03-13T14:49:13Z",
                "WARC-IP-Address": "192.0.2.24",
                "WARC-Identified-Payload-Type": None,
                "WARC-Payload-Digest": "sha1:VW3U6F6VXBN4HTCLVDUXUJ6IZWNOHWRV",
                "WARC-Record-ID": id,
                "WARC-Target-URI": "http://example.org/questions/1",
                "WARC-Truncated": None,
                "WARC-Type": "response",
                "WARC-Warcinfo-ID": "<urn:uuid:b5e3a9ec-69eb-4339-b321-68508bcb76fa>",
            },
            "previous_word_count": 268,
            "text": text,
            "url": "http://example.org/questions/1",
            "warcinfo": "robots: classic\r\nformat: WARC File Format 1.0\r\n",
            "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.08555358648300171,
        }
        for id, text in zip(ids, TEXTS, strict=True)
    ]
    shard = "global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst"
    write_jsonl(root / shard, records)
    return dict(zip(ids, TEXTS, strict=True))


def write_dolma3_mix(root: Path) -> dict[str, str]:
    """A directory of web pages, and one of code whose records have other metadata."""
    page = {
        "id": "dolma3-page-1",
        "text": TEXTS[0],
        "metadata": {"warc_url": "http://example.org/dolma", "weborganizer_max": "__label__crime_and_law"},
    }
    code = {
        "added": "2024-11-18T18:05:43.375397+00:00",
        "created": "2023-06-27T19:37:42",
        "id": "0a1b2c",
        "int_score": 3,
        "metadata": {"blob_id": "0a1b2c", "detected_licenses": ["MIT"], "path": "/src/a.py", "language": "Python"},
        "score": 3.2,
        "source": "stack-edu/Python",
        "text": TEXTS[1],
        "version": "v0",
    }
    write_jsonl(root / "data/common_crawl-crime_and_law-0007/shard_00000112.jsonl.zst", [page])
    write_jsonl(root / "data/stack_edu-Python/shard_00000009.jsonl.zst", [code])
    return {"dolma3-page-1": TEXTS[0], "0a1b2c": TEXTS[1]}


def write_the_stack_v2(root: Path) -> dict[str, str]:
    """data/Python/train-00000-of-00001.parquet, whose records only point at their text, in contents/, gzipped.

    Of its five records the third has no license and the fourth an encoding that its text does not have.
    """
    ids = [f"{i}29dd2b33082d2b98541c66ba3620ae054991503" for i in range(5)]
    encodings = ["UTF-8", "UTF-8", "UTF-8", "ascii", "ISO-8859-1"]
    texts = [TEXTS[0], TEXTS[1], TEXTS[2], "naïve", "# café\r\n"]
    same = {
        "directory_id": "71568d223947f51cb007a8564e5f808e0987779e",
        "content_id": "072b3138be512a71cf4e8bbbdb657497e808d2f6",
        "snapshot_id": "8cdc521178da47c9c7d2daa502dc71688835fd0a",
        "revision_id": "1064b0dca1a491bc28f325e42ca6b97d406d6558",
        "branch_name": "refs/heads/master",
        "gha_license_id": None,
        "gha_language": None,
    }
    string, time, whole = pa.string(), pa.timestamp("us"), pa.int64()
    columns = {
        "blob_id": (string, ids),
        "directory_id": (string, [same["directory_id"]] * 5),
        "path": (string, [f"/src/{i}.py" for i in range(5)]),
        "content_id": (string, [same["content_id"]] * 5),
        "detected_licenses": (pa.list_(string), [["MIT", "Apache-2.0"], ["MIT"], [], ["MIT"], []]),
        "license_type": (string, ["permissive", "permissive", "no_license", "permissive", "permissive"]),
        "repo_name": (string, ["someone/something"] * 5),
        **{name: (string, [same[name]] * 5) for name in ("snapshot_id", "revision_id", "branch_name")},
        **{name: (time, [WHEN] * 5) for name in ("visit_date", "revision_date", "committer_date")},
        "github_id": (whole, [123] * 5),
        "star_events_count": (whole, [4] * 5),
        "fork_events_count": (whole, [2] * 5),
        "gha_license_id": (string, [None] * 5),
        "gha_event_created_at": (time, [None] * 5),
        "gha_created_at": (time, [None] * 5),
        "gha_language": (string, [None] * 5),
        "src_encoding": (string, encodings),
        "language": (string, ["Python"] * 5),
        "is_vendor": (pa.bool_(), [False] * 5),
        "is_generated": (pa.bool_(), [False] * 5),
        "length_bytes": (whole, [len(text.encode()) for text in texts]),
        "extension": (string, ["py"] * 5),
        "filename": (string, [f"{i}.py" for i in range(5)]),
    }
    write_parquet(root / "data/Python/train-00000-of-00001.parquet", columns)
    (root / "contents").mkdir()
    for id, text, encoding in zip(ids, texts, encodings, strict=True):
        content = text.encode("utf-8" if encoding == "ascii" else encoding)
        (root / "contents" / id).write_bytes(gzip.compress(content))
    return {ids[0]: texts[0], ids[1]: texts[1], ids[4]: texts[4]}


def write_open_web_math(root: Path) -> dict[str, str]:
    """data/train-00000-of-00114.parquet."""
    urls = [f"https://math.example.org/{i}" for i in range(3)]
    columns = {
        "url": (pa.string(), urls),
        "text": (pa.string(), list(TEXTS)),
        "date": (pa.string(), ["2014-08-22 04:05:16"] * 3),
        "metadata": (pa.string(), ['{"extraction_info": {"found_math": true}}'] * 3),
    }
    write_parquet(root / "data/train-00000-of-00114.parquet", columns)
    return dict(zip(urls, TEXTS, strict=True))


def write_proof_pile_2(root: Path) -> dict[str, str]:
    """One shard of each of the three subsets, and one for testing, which must not be read."""
    paper = {
        "text": TEXTS[0],
        "meta": {
            "timestamp": "2017-09-09T17:00:22.000Z",
            "yymm": "0907",
            "arxiv_id": "0907.1234",
            "language": "en",
            "url": "https://arxiv.org/abs/0907.1234",
        },
    }
    write_jsonl(root / "arxiv/train/arXiv_000.jsonl.zst", [paper])
    write_jsonl(root / "arxiv/test/arXiv_000.jsonl.zst", [{"text": "not this", "meta": {}}])
    write_jsonl(root / "open-web-math/train/shard-0000.jsonl.zst", [{"text": TEXTS[1], "meta": {}}])
    write_jsonl(root / "algebraic-stack/train/python0000.jsonl.zst", [{"text": TEXTS[2], "meta": {"lang": "py"}}])
    names = ("arXiv_000", "shard-0000", "python0000")
    return {f"{name}.jsonl.zst#1": text for name, text in zip(names, TEXTS, strict=True)}


def write_wikipedia(root: Path) -> dict[str, str]:
    """20231101.en/train-00000-of-00041.parquet."""
    columns = {
        "id": (pa.string(), ["12", "25", "39"]),
        "url": (pa.string(), [f"https://en.wikipedia.org/wiki/{title}" for title in ("Anarchism", "Autism", "Albedo")]),
        "title": (pa.string(), ["Anarchism", "Autism", "Albedo"]),
        "text": (pa.string(), list(TEXTS)),
    }
    write_parquet(root / "20231101.en/train-00000-of-00041.parquet", columns)
    return dict(zip(columns["id"][1], TEXTS, strict=True))
