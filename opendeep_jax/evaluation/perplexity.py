"""Perplexity and bits per byte of any text under any model, read in overlapping windows."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.sources import list_files, list_parts, read_part
from opendeep_jax.display.progress import progress_bar
from opendeep_jax.evaluation.intervals import bootstrap
from opendeep_jax.evaluation.windows import Window, windows
from opendeep_jax.generation.engine import Engine
from opendeep_jax.generation.scoring import score
from opendeep_jax.text.tokenizer import Tokenizer

ENOUGH_DOCUMENTS = 10
"""Documents are independent, windows of one document are not: with this many or more it is documents that are drawn."""


def read_documents(path: str | Path) -> list[str]:
    """The texts of a file: a .txt, .md or .py file is one, a .jsonl or .parquet file has a field `text` in each record.

    Raises ConfigError for a file that is not there, of another kind, damaged, not UTF-8, or without any text.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--text={path}: there is no such file. Give a .txt, .jsonl or .parquet file.")
    source = SourceConfig(name="text", path=str(Path(path).resolve()), license="not asked")
    parts = list_parts(source, list_files(source))
    documents = [document.text for part in parts for document in read_part(source, part, lambda reason, id: None)]
    if not any(documents):
        raise ConfigError(f"--text={path}: holds no text. Give a file with some.")
    return documents


def perplexity(
    engine: Engine, tokenizer: Tokenizer, documents: Sequence[str], stride: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Measure a model's perplexity of texts.

    Each document is read from its beginning, in windows of engine.max_length tokens. As nothing foretells a first
    token, it is not counted, unless the model expects a token that begins texts: then it is foretold from that.

    Args:
        engine: With no request running.
        documents: Texts.
        stride: Tokens that a window scores; 0 takes half a window, so that all but a document's first tokens have half
            a window of context or more.
        seed: Of the bootstrap.

    Returns:
        perplexity (exp of nats per token) and bits_per_byte, each with its 95% interval (None for a single window);
        nats, and the tokens and UTF-8 bytes that they are for; what was drawn for the intervals, and the settings.

    Raises:
        ConfigError: A stride that cannot be, or no token to score.
    """
    length = engine.max_length
    stride = stride or length // 2
    if not 1 <= stride < length:
        raise ConfigError(f"--stride={stride}: must be at least 1 and less than the window of {length} tokens.")
    pieces = [
        (index, window, size)
        for index, document in enumerate(documents)
        for window, size in _sized_windows(tokenizer, document, length, stride)
    ]
    if not pieces:
        raise ConfigError("The text has no token that another one foretells. Give a longer one.")
    together = max(engine.shards, 1)
    sums = []  # of each window: nats, tokens, bytes
    with progress_bar("windows", len(pieces), unit="pieces", transient=True) as advance:
        for begin in range(0, len(pieces), together):
            batch = pieces[begin : begin + together]
            found = score(engine, [w.tokens for _, w, _ in batch], [w.first for _, w, _ in batch])
            for (*_, size), scored in zip(batch, found, strict=True):
                sums.append((-math.fsum(scored.logprobs), len(scored.logprobs), size))
            advance(len(batch))
    rows, drawn = np.array(sums, np.float64), "windows"
    if len(documents) >= ENOUGH_DOCUMENTS:
        of = np.array([index for index, *_ in pieces])
        rows, drawn = np.stack([rows[of == index].sum(0) for index in np.unique(of)]), "documents"
    nats, tokens, size = rows.sum(0)

    def interval(value: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
        return bootstrap(rows, value, seed=seed)

    return {
        "perplexity": math.exp(nats / tokens),
        "perplexity_interval": interval(lambda sums: np.exp(sums[:, 0] / sums[:, 1])),
        "bits_per_byte": nats / math.log(2) / size,
        "bits_per_byte_interval": interval(lambda sums: sums[:, 0] / np.log(2) / sums[:, 2]),
        "nats": nats,
        "tokens": int(tokens),
        "bytes": int(size),
        "documents": len(documents),
        "windows": len(pieces),
        "window": length,
        "stride": stride,
        "drawn": drawn,
        "seed": seed,
    }


def _sized_windows(tokenizer: Tokenizer, document: str, length: int, stride: int) -> Iterator[tuple[Window, int]]:
    """A document's windows, and the bytes that each one's scored tokens stand for.

    Together with an unscored first token's they are the document's bytes: what no token says, as of an unknown letter,
    is counted with the first window.
    """
    ids = tokenizer.encode_prompt(document)
    sizes = tokenizer.byte_decoder.lengths(ids, tokenizer.special_ids)
    unsaid, at = len(document.encode("utf-8")) - sum(sizes), 1
    for window in windows(ids, length, stride):
        end = at + len(window.tokens) - window.first
        yield window, sum(sizes[at:end]) + unsaid
        unsaid, at = 0, end
