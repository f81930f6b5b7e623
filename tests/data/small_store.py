"""Small stores: JSONL files of a few documents each, and the store that is made of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.sources import Part, list_files, list_parts
from opendeep_jax.data.store import Store
from opendeep_jax.data.storing.prepare import prepare_store
from opendeep_jax.text.files import byte_tokenizer
from opendeep_jax.text.tokenizer import Tokenizer

DOCUMENTS_PER_FILE = 4
FACTS = {"curation": {"quality": ["c4"]}}


def texts(count: int) -> list[str]:
    """Texts of some hundred bytes, some of them longer in bytes than in characters."""
    return [f"Text {i}: " + ("naïve 数据 \n" if i % 3 else "plain words ") * (1 + i * 7 % 40) for i in range(count)]


def write_source(directory: Path, texts: list[str], ids: list[str] | None = None) -> SourceConfig:
    """Writes .jsonl files of a few documents each, and gives the source that reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "text": text,
            "id": ids[i] if ids else f"id{i}",
            "url": f"https://example.org/{i}",
            "license": "CC0-1.0" if i % 2 == 0 else "MIT",
        }
        for i, text in enumerate(texts)
    ]
    for first in range(0, len(records), DOCUMENTS_PER_FILE):
        lines = map(json.dumps, records[first : first + DOCUMENTS_PER_FILE])
        (directory / f"{first:06d}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    fields = {"id_field": "id", "url_field": "url", "license_field": "license"}
    return SourceConfig("small", str(directory), bad_documents="leave_out", **fields)


def parts_of(source: SourceConfig) -> list[Part]:
    """All parts of a source."""
    return list_parts(source, list_files(source))


def make_store(
    directory: Path,
    texts: list[str],
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = 0,
    ids: list[str] | None = None,
) -> Store:
    """The store of `texts` at `directory/store`, made in this process from a source at `directory/source`."""
    source = write_source(directory / "source", texts, ids)
    tokenizer = tokenizer or byte_tokenizer()
    place, parts = directory / "store", parts_of(source)
    return prepare_store(place, source, parts, tokenizer, FACTS, workers=1, shard_bytes=shard_bytes)


def large_tokenizer() -> Tokenizer:
    """The bytes, with boundaries whose ids are above 65,535."""
    sizes = np.ones(70_000, np.int32)
    arrays = dict.fromkeys(("token_bytes", "first_bytes", "solid_bytes"), sizes)
    return dataclasses.replace(byte_tokenizer(), **arrays, bos_id=69_998, eos_id=69_999)
