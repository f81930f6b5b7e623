"""The tokenizer of a run, as data.tokenizer says: bytes, a file, or a BPE trained on a sample of the run's text."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.config.storage import write_file
from opendeep_jax.data.reading.listing import is_store, list_files
from opendeep_jax.data.sources import fingerprint, fraction_of, hash_id, held_out, list_parts, read_part
from opendeep_jax.display.progress import progress_bar
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer, train_bpe
from opendeep_jax.text.pieces import WORDS
from opendeep_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

# Text that a BPE is trained on: more costs start-up time and gains little. It is drawn from at most so many times as
# much, so that a trillion tokens need not be read for it, and from no document more than a megabyte.
SAMPLE_BYTES = 4_000_000
SAMPLED_FROM = 16
SAMPLED_CHARACTERS = 1_000_000
# Where text is less of a source than this, the rest is not counted as text that could be sampled.
WIDE = 0.5

logger = logging.getLogger(__name__)


def prepare_tokenizer(config: RunConfig, progress: bool = True, sources: list[SourceConfig] | None = None) -> Tokenizer:
    """Return the tokenizer, trained first if it is a BPE that is not in data.directory yet. Raises ConfigError."""
    data = config.data
    if not data.tokenizer.startswith("bpe:"):
        return open_tokenizer(data.tokenizer, "", list, Path(data.directory, "tokenizers"))
    if sources is None:
        from opendeep_jax.data.curation import curate

        sources = curate(data, progress=progress)
    for source in filter(is_store, sources):
        raise ConfigError(
            f"data.tokenizer is {data.tokenizer}, which is trained on text, but source {source.name!r} ({source.path}) "
            "is tokenized already. Set --data.tokenizer to the tokenizer.json that it was made with."
        )
    files = [list_files(source) for source in sources]
    weights = [source.weight or 1.0 for source in sources]
    shares = [weight / sum(weights) for weight in weights]
    hashes = [fingerprint(source, listed) for source, listed in zip(sources, files, strict=True)]
    content = [list(zip(hashes, shares, strict=True)), data.held_out_fraction, SAMPLE_BYTES]

    def sample() -> Iterator[str]:
        with progress_bar("Training the tokenizer", SAMPLE_BYTES, progress) as advance:
            for source, listed, share in zip(sources, files, shares, strict=True):
                parts = list_parts(source, listed)
                for text in _sample(source, parts, SAMPLE_BYTES * share, data.held_out_fraction):
                    yield text
                    advance(len(text))

    corpus_hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return open_tokenizer(data.tokenizer, corpus_hash, sample, Path(data.directory, "tokenizers"))


def open_tokenizer(
    specification: str, corpus_hash: str, sample: Callable[[], Iterator[str]], directory: Path
) -> Tokenizer:
    """The Tokenizer of `data.tokenizer`: `bytes`, `bpe:SIZE` or a path.

    A BPE is trained on `sample()` the first time and kept in `directory` under `corpus_hash`, which must stand for
    the sample's content. Raises ConfigError.
    """
    if specification == "bytes":
        return byte_tokenizer()
    kind, colon, size = specification.partition(":")
    if kind != "bpe" or not colon:
        return load_tokenizer(Path(specification).expanduser())
    if not size.isdecimal():
        raise ConfigError(
            f"data.tokenizer is {specification!r}, but after `bpe:` comes the number of tokens, as in bpe:8192."
        )
    key = hashlib.sha256(json.dumps([corpus_hash, int(size), WORDS, SPECIAL_TOKENS]).encode()).hexdigest()
    path = directory / f"bpe-{int(size)}-{key[:16]}.json"
    if path.exists():
        try:
            return load_tokenizer(path, specification)
        except ConfigError as error:
            logger.warning("Training the tokenizer again, because %s", error)
    write_file(path, train_bpe(sample(), int(size)))
    return load_tokenizer(path, specification)


def _sample(source: SourceConfig, parts: list, budget: float, held_out_fraction: float) -> Iterator[str]:
    """Training documents of about `budget` bytes, from parts and documents that a hash of their names chooses."""
    parts = sorted(parts, key=lambda part: hash_id(f"{part.file.name} {part.begin}"))
    share = _text_share(source, parts)
    size = kept = 0
    while parts and kept < len(parts) and size < SAMPLED_FROM * budget:
        size += parts[kept].size * share
        kept += 1
    found, first = False, None
    for part in parts[:kept]:
        for document in read_part(source, part, lambda reason, name: None):
            id_hash = hash_id(document.id)
            if held_out(id_hash, held_out_fraction):
                continue
            first = document.text if first is None else first
            if fraction_of(id_hash, "tokenizer") < budget / (size * (1 - held_out_fraction)):
                found = True
                yield document.text[:SAMPLED_CHARACTERS]
    if not found and first is not None:
        yield first[:SAMPLED_CHARACTERS]


def _text_share(source: SourceConfig, parts: list) -> float:
    """Bytes of text in a byte of the parts, by the first: 1 unless it is below a half, as beside embeddings."""
    if not parts or source.text_url or not parts[0].size:
        return 1.0
    texts = (document.text for document in read_part(source, parts[0], lambda reason, name: None))
    share = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts) / parts[0].size
    return share if 0 < share < WIDE else 1.0


def check_tokenizer(tokenizer: Tokenizer, config: RunConfig) -> None:
    """Raise ConfigError for a tokenizer that the model, or data.fim_rate, cannot be used with."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than model.vocab_size="
            f"{config.model.vocab_size} rows of the embedding. Set --model.vocab_size={tokenizer.vocab_size} or more."
        )
    if config.data.fim_rate and tokenizer.fim_ids is None:
        raise ConfigError(
            f"data.fim_rate = {config.data.fim_rate}, but the tokenizer {tokenizer.name} has no special tokens for "
            "fill-in-the-middle. Set --data.fim_rate=0, or use a tokenizer that has them, such as DeepSeek's or a "
            "bpe:SIZE of ours."
        )
