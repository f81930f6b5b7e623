"""From a RunConfig to batches. A batch is a pure function of the configuration and the step.

    data = open_data(config)            # tokenizes what is not there yet
    data.batch(0)                       # the Batch of step 0
    for batch in data.iterate(1000):    # the batches from step 1000 on, prepared ahead in the background

What is prepared stays in data.directory, named by a hash of everything it was made from.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schedule import batch_size_at, rows_before
from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig
from opendeep_jax.data.batch import Batch
from opendeep_jax.data.files import file_name, writing
from opendeep_jax.data.mixture import make_mixture
from opendeep_jax.data.packing import PackedRows, empty_batch
from opendeep_jax.data.sources import Corpus, SourceFile, Split, fraction_of, list_files, read_split, survey
from opendeep_jax.data.store import VERSION, Store, open_store, write_store
from opendeep_jax.data.tokenizer import Tokenizer, open_tokenizer

# Text that a BPE is trained on: more costs start-up time and gains little.
SAMPLE_BYTES = 4_000_000
# Batches that are prepared ahead.
PREFETCH = 8

Found = tuple[SourceConfig, list[SourceFile], Corpus]


class Data:
    """Everything prepared: the tokenizer, batches to train on, and held-out text.

    `process_index` of `process_count` processes gets its equal part of a batch's rows: put one after the other, the
    parts are the global batch, whatever the count.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, found: list[Found], stores: dict[Split, list[Store]]):
        self.config, self.tokenizer, self.found, self.stores = config, tokenizer, found, stores
        self.mixture = make_mixture([source.weight for source in config.data.sources])
        length, mask = config.data.sequence_length, config.data.segment_mask
        self.train_rows = [
            PackedRows(store.tokens, store.offsets, length, (config.seed, i), mask)
            for i, store in enumerate(stores["train"])
        ]
        self.held_out_rows = [
            PackedRows(store.tokens, store.offsets, length, None, mask) for store in stores["held_out"]
        ]

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The Batch of `step` (from 0) as numpy arrays: int32 and bool, [rows of this process, L]."""
        train, length = self.config.train, self.config.data.sequence_length
        begin = rows_before(train, length, step)
        rows = _part(batch_size_at(train, length, step), process_index, process_count)
        batch = empty_batch(len(rows), length)
        for b, row in enumerate(rows):
            source, index = self.mixture.locate(begin + row)
            self.train_rows[source].write(index, batch, b)
        return batch

    def where(self, step: int) -> Iterator[dict]:
        """Where the tokens of `step` come from, for example

        `{"row": 0, "source": "python_stdlib", "document": "json/decoder.py", "first_token": 512, "end_token": 1025}`.
        A document's token 0 is its beginning mark; the last token of a row is only a target.
        """
        length = self.config.data.sequence_length
        begin = rows_before(self.config.train, length, step)
        for row in range(batch_size_at(self.config.train, length, step)):
            i, index = self.mixture.locate(begin + row)
            source, names = self.config.data.sources[i].name, self.stores["train"][i].names
            for document, first, end in self.train_rows[i].pieces(index):
                place = {"source": source, "document": names[document], "first_token": first, "end_token": end}
                yield {"row": row, **place}

    def iterate(self, start_step: int = 0, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """The batches of `start_step` and all later steps, without end, prepared ahead in a background thread."""
        import grain  # Half a second, which only a run needs to spend.

        steps = grain.MapDataset.range(start_step, 2**62)
        batches = steps.map(lambda step: self.batch(int(step), process_index, process_count))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)))

    def held_out(
        self, batch_size: int, max_batches: int = 0, process_index: int = 0, process_count: int = 1
    ) -> "HeldOut":
        """Held-out batches: documents in order, the last batch filled with padding.

        With `max_batches` above 0, at most that many, of rows spread evenly over the held-out text.
        """
        return HeldOut(self.held_out_rows, batch_size, max_batches, process_index, process_count)

    @property
    def held_out_text(self) -> bytes:
        """All held-out documents, one after the other."""
        return b"".join(store.text for store in self.stores["held_out"])

    @property
    def content_hash(self) -> str:
        """SHA-256 over the tokenizer and all tokens: equal when, and only when, the same tokens are trained on."""
        hashes = [store.manifest["tokens_sha256"] for split in self.stores.values() for store in split]
        return hashlib.sha256(json.dumps([self.tokenizer.content_hash, hashes]).encode()).hexdigest()

    def describe(self) -> dict:
        """Counts for summaries and reports: documents, bytes, tokens and skipped documents, in all and by source."""
        sources = []
        weights = sum(source.weight for source in self.config.data.sources)
        for i, (source, _, corpus) in enumerate(self.found):
            train, held_out = self.stores["train"][i].manifest, self.stores["held_out"][i].manifest
            sources.append(
                {
                    "name": source.name,
                    "license": source.license,
                    "share": source.weight / weights,
                    **{f"train_{key}": train[key] for key in ("documents", "bytes", "tokens")},
                    **{f"held_out_{key}": held_out[key] for key in ("documents", "bytes", "tokens")},
                    "skipped": corpus.skipped,
                }
            )
        totals = {
            f"{split}_{key}": sum(source[f"{split}_{key}"] for source in sources)
            for split in self.stores
            for key in ("documents", "bytes", "tokens")
        }
        return {
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            **totals,
            "bytes_per_token": totals["train_bytes"] / totals["train_tokens"],
            "skipped": [f"{source['name']}: {name}" for source in sources for name in source["skipped"]],
            "content_hash": self.content_hash,
            "sources": sources,
        }


class HeldOut(Sequence[Batch]):
    """Held-out batches, each made when it is asked for. See `Data.held_out`."""

    def __init__(
        self, packed: list[PackedRows], batch_size: int, max_batches: int, process_index: int, process_count: int
    ):
        self.packed, self.batch_size = packed, batch_size
        self.part = _part(batch_size, process_index, process_count)
        self.ends = np.cumsum([rows.rows_per_epoch for rows in packed])
        total = int(self.ends[-1])
        chosen = min(total, max_batches * batch_size) if max_batches else total
        self.rows = np.arange(chosen) * total // max(chosen, 1)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        begin = index % len(self) * self.batch_size
        batch = empty_batch(len(self.part), self.packed[0].length)
        for b, row in enumerate(self.rows[begin : begin + self.batch_size][self.part.start : self.part.stop]):
            source = int(np.searchsorted(self.ends, row, "right"))
            first = int(self.ends[source - 1]) if source else 0
            self.packed[source].write(int(row) - first, batch, b)
        return batch


def _part(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a global batch that belong to one process."""
    if batch_size % process_count:
        raise ConfigError(
            f"A batch of {batch_size} rows cannot be divided evenly over {process_count} processes. Choose "
            f"train.batch_size, every stage of train.batch_ramp and evaluation.batch_size as multiples of "
            f"{process_count}."
        )
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def open_data(config: RunConfig, progress: bool = True) -> Data:
    """Opens the data of a run, tokenizing first what is not in data.directory yet, with a progress bar.

    Raises ConfigError for sources, tokenizers and directories that cannot serve.
    """
    found = _find(config.data)
    tokenizer = _open_tokenizer(config.data, found, progress)
    _check_vocabulary(tokenizer, config)
    stores: dict[Split, list[Store]] = {
        split: [_open_split(config.data, tokenizer, one, split, progress) for one in found]
        for split in ("train", "held_out")
    }
    return Data(config, tokenizer, found, stores)


def check_data(config: RunConfig) -> None:
    """Raises ConfigError for what `open_data` would refuse, as far as it shows without tokenizing anything."""
    _find(config.data)
    if not config.data.tokenizer.startswith("bpe:"):
        _check_vocabulary(open_tokenizer(config.data.tokenizer, "", list, Path()), config)


def _check_vocabulary(tokenizer: Tokenizer, config: RunConfig) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than model.vocab_size="
            f"{config.model.vocab_size} rows of the embedding. Set --model.vocab_size={tokenizer.vocab_size} or more."
        )


def prepare_tokenizer(config: DataConfig, progress: bool = True) -> Tokenizer:
    """The tokenizer alone, trained first if it is a BPE that is not in data.directory yet. Raises ConfigError."""
    return _open_tokenizer(config, _find(config), progress)


def _find(config: DataConfig) -> list[Found]:
    found = []
    for source in config.sources:
        files = list_files(source)
        corpus = survey(source, files, config.held_out_fraction, Path(config.directory, "sources"))
        found.append((source, files, corpus))
    return found


def _open_tokenizer(config: DataConfig, found: list[Found], progress: bool) -> Tokenizer:
    weights = sum(source.weight for source, _, _ in found)
    content = [(corpus.content_hash, source.weight / weights) for source, _, corpus in found]
    corpus_hash = hashlib.sha256(json.dumps([content, config.held_out_fraction, SAMPLE_BYTES]).encode()).hexdigest()

    def sample() -> Iterator[str]:
        """Training documents in the mixture's proportions, about SAMPLE_BYTES in all, chosen by a hash of the name."""
        with _bar("Training the tokenizer", SAMPLE_BYTES, progress) as advance:
            for source, files, corpus in found:
                kept = SAMPLE_BYTES * source.weight / weights / corpus.bytes["train"]
                for document in read_split(files, "train", config.held_out_fraction):
                    if fraction_of(document.name, "tokenizer") < kept:
                        yield document.text
                        advance(len(document.text))

    return open_tokenizer(config.tokenizer, corpus_hash, sample, Path(config.directory, "tokenizers"))


def _open_split(config: DataConfig, tokenizer: Tokenizer, found: Found, split: Split, progress: bool) -> Store:
    """Opens one split of one source; tokenizes it first if that was not done, or if the store is damaged."""
    source, files, corpus = found
    facts = {
        "source": source.name,
        "license": source.license,
        "split": split,
        "held_out_fraction": config.held_out_fraction,
        "content_hash": corpus.content_hash,
    }
    key = hashlib.sha256(json.dumps([facts, tokenizer.content_hash, VERSION]).encode()).hexdigest()
    directory = Path(config.directory, "tokens", file_name(source.name, split, key[:16]))
    if directory.exists():
        try:
            return open_store(directory)
        except ValueError as error:
            logging.getLogger(__name__).warning("Tokenizing %s again, because %s", source.name, error)
            with writing(directory):
                shutil.rmtree(directory)
    with _bar(f"Tokenizing {source.name} ({split.replace('_', ' ')})", corpus.bytes[split], progress) as advance:
        documents = read_split(files, split, config.held_out_fraction)
        facts |= {"files": corpus.files, "skipped": corpus.skipped}
        write_store(directory, documents, tokenizer, facts, keep_text=split == "held_out", advance=advance)
    return open_store(directory)


@contextlib.contextmanager
def _bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on the error stream, in bytes; gives the function that moves it."""
    if not show:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
        bar.update(task, completed=total)
