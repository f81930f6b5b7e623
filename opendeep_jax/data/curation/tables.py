"""The files of a curation: Parquet of documents, the same whoever writes it, and JSON lines of dropped ones."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from opendeep_jax.config.files import replacing
from opendeep_jax.config.storage import file_name, writing

COLUMNS = ("id", "text", "url", "license", "language")
GROUP_BYTES = 8 << 20
"""Text in a row group: what is in memory at one time, and what a reader can take alone."""


class CurationTable:
    """A Parquet file of documents that is there when it is closed, or not at all. Without documents there is none."""

    def __init__(self, path: Path):
        self.path, self.rows, self.size = path, {name: [] for name in COLUMNS}, 0
        self.stack, self.writer = contextlib.ExitStack(), None

    def __enter__(self) -> "CurationTable":
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self._write()
        with writing(self.path):
            self.stack.__exit__(kind, *rest)

    def add(self, *values: str, size: int) -> None:
        """Add a document: its COLUMNS, and the bytes of its text."""
        for column, value in zip(self.rows.values(), values, strict=True):
            column.append(value)
        self.size += size
        if self.size >= GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        if not self.rows["id"]:
            return
        schema = pyarrow.schema([(name, pyarrow.large_string()) for name in COLUMNS])
        with writing(self.path):
            if self.writer is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.stack.enter_context(replacing(self.path))
                self.writer = self.stack.enter_context(
                    parquet.ParquetWriter(
                        temporary,
                        schema,
                        compression="zstd",
                        use_dictionary=["license", "language"],
                        write_page_checksum=True,
                    )
                )
            self.writer.write_table(pyarrow.table(self.rows, schema))
        self.rows, self.size = {name: [] for name in COLUMNS}, 0


def read_table(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the COLUMNS of each document of a CurationTable, in order; nothing if it has none."""
    import pyarrow.parquet as parquet

    if path.exists():
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                yield from zip(*(table.column(name).to_pylist() for name in COLUMNS), strict=True)


class Dropped:
    """Write the documents that are dropped to `directory`/REASON.jsonl.gz, for people to look at."""

    def __init__(self, directory: Path):
        self.directory, self.stack, self.files = directory, contextlib.ExitStack(), {}

    def __enter__(self) -> "Dropped":
        return self

    def __exit__(self, *error) -> None:
        with writing(self.directory):
            self.stack.__exit__(*error)

    def add(self, reason: str, **record: str) -> None:
        """Add a record to the file of its reason."""
        with writing(self.directory):
            if reason not in self.files:
                self.directory.mkdir(parents=True, exist_ok=True)
                raw = self.stack.enter_context(open(self.directory / f"{file_name(reason)}.jsonl.gz", "wb"))
                # Without a name and a time in it, the same documents make the same bytes.
                packed = gzip.GzipFile("", "wb", compresslevel=3, fileobj=raw, mtime=0)
                self.files[reason] = self.stack.enter_context(packed)
            line = json.dumps({"reason": reason, **record}, ensure_ascii=False)
            self.files[reason].write(line.encode("utf-8") + b"\n")
