"""Writes small sources of English-looking text with copies, near-copies and evaluation items planted in them."""

import json
import random
import struct
from pathlib import Path

import numpy as np

from opendeep_jax.config.schema import CurationConfig, DataConfig, SourceConfig

SYLLABLES = "ba ke li mo nu ra se ti vo zu da fe gi ho lu".split()
NOUNS = [first + second + third for first in SYLLABLES for second in SYLLABLES for third in ("n", "r", "st")]
STOP_WORDS = "the be to of and that have with in a for on".split()


def prose(salt: object, sentences: int = 20) -> str:
    """Text that passes the quality filters; two salts give texts with almost no five words in common."""
    chance = random.Random(str(salt))

    def sentence() -> str:
        words = [chance.choice(STOP_WORDS if chance.random() < 0.3 else NOUNS) for _ in range(chance.randint(8, 14))]
        return " ".join(words).capitalize() + "."

    paragraphs = [" ".join(sentence() for _ in range(4)) for _ in range(sentences // 4)]
    return "\n".join(paragraphs)


def changed(text: str, salt: object = 0) -> str:
    """A near-copy: one word is another."""
    words = text.split(" ")
    words[len(words) // 2 + hash_of(salt) % 5] = "otherwise"
    return " ".join(words)


def hash_of(salt: object) -> int:
    """A small number that depends on the salt."""
    return sum(map(ord, str(salt)))


def write_source(path: Path, texts: list[str]) -> Path:
    """A .jsonl file with a record for each text; ids are `name-place`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for place, text in enumerate(texts):
            file.write(json.dumps({"id": f"{path.stem}-{place}", "text": text}) + "\n")
    return path


def configure(directory: Path, *paths: Path, workers: int = 1, license_field: str = "", **recipe) -> DataConfig:
    """A DataConfig over .jsonl files, each a source of its own, named like the file."""
    sources = tuple(
        SourceConfig(path.stem, str(path), license="CC0-1.0", citation=f"{path.stem} et al.", id_field="id")
        for path in paths
    )
    return DataConfig(
        sources=sources, directory=str(directory), tokenizer="bytes", workers=workers, curation=CurationConfig(**recipe)
    )


def write_language_model(path: Path, languages: str = "ab") -> Path:
    """A fastText model.bin (its format 12) of made-up languages: all words of the language a begin with an a.

    Written by hand, because training ends with `Encountered NaN` on some machines.
    """
    size = len(languages)
    words = [language + noun for language in languages for noun in NOUNS]
    entries = [*((word, 0) for word in words), *((f"__label__{language}", 1) for language in languages)]
    supervised, softmax = 3, 3
    with open(path, "wb") as file:
        file.write(struct.pack("<2i", 793712314, 12))
        file.write(struct.pack("<12id", size, 5, 1, 1, 5, 1, softmax, supervised, 0, 0, 0, 100, 1e-4))
        file.write(struct.pack("<3iqq", len(entries), len(words), size, len(entries), -1))
        for text, kind in entries:
            file.write(text.encode() + struct.pack("<bqb", 0, 1, kind))
        for matrix in (np.repeat(np.eye(size), len(NOUNS), axis=0), 10 * np.eye(size)):
            file.write(struct.pack("<b2q", 0, *matrix.shape) + matrix.astype("<f4").tobytes())
    return path
