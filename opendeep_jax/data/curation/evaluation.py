"""The n-grams of evaluation sets that documents must not share, in the files that datatrove's filter reads.

datatrove has a block for this too, but it starts from lighteval, which needs PyTorch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import CurationConfig
from opendeep_jax.config.storage import file_name
from opendeep_jax.data.curation.words import simplify, split_words, tells

SUFFIXES = (".jsonl", ".parquet", ".txt")


def read_items(path: Path) -> Iterator[str]:
    """Yield the items of an evaluation set: all texts of a record joined with spaces, however deep; a .txt is one item.

    Raises ConfigError for a file that is not what its name says.
    """
    try:
        if path.suffix == ".txt":
            yield path.read_text("utf-8")
        elif path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            for batch in parquet.ParquetFile(path).iter_batches(1024):
                yield from (" ".join(_texts(record)) for record in batch.to_pylist())
        else:
            with open(path, "rb") as lines:
                yield from (" ".join(_texts(json.loads(line))) for line in lines if line.strip())
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise ConfigError(
            f"Cannot read the evaluation set {path}: {error}. data.curation.evaluation_sets names whole files of "
            "JSON lines (.jsonl), Parquet (.parquet) or UTF-8 text (.txt)."
        ) from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def write_index(curation: CurationConfig, directory: Path) -> dict[str, dict[str, int]]:
    """Write one file of n-gram hashes for each evaluation set; return by set its items, n-grams, and short items.

    An item of fewer than curation.evaluation_ngram words has no n-gram, so nothing is ever removed for its sake; nor is
    it for an n-gram of numbers alone.
    """
    import numpy as np
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import ngrams

    settings = HashConfig()
    hash_of = create_hash_func(settings)
    found = {}
    for name, path in set_names(curation).items():
        hashes, items, short = set(), 0, 0
        for item in read_items(path):
            grams = [gram for gram in ngrams(split_words(simplify(item)), curation.evaluation_ngram) if tells(gram)]
            items, short = items + 1, short + (not grams)
            hashes.update(map(hash_of, map(" ".join, grams)))
        directory.mkdir(parents=True, exist_ok=True)
        np.array(sorted(hashes), settings.np_descr).tofile(directory / f"{name}.index.hashes")
        found[name] = {"items": items, "ngrams": len(hashes), "too_short": short}
    return found


def set_names(curation: CurationConfig) -> dict[str, Path]:
    """Return a file name for each evaluation set, from its path's end. Raises ConfigError if two would be the same."""
    paths = [Path(path).expanduser() for path in curation.evaluation_sets]
    names = {file_name(path.name): path for path in paths}
    if len(names) < len(paths):
        raise ConfigError(
            f"data.curation.evaluation_sets {', '.join(map(str, paths))} have two files of the same name, so the "
            "accounting could not tell them apart. Rename one."
        )
    return names
