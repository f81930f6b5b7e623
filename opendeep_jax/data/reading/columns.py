"""Documents in columns: Parquet files, and Hugging Face datasets, which are Arrow tables in memory-mapped files.

Only the columns that are asked for are read. Text is handed on as bytes, so that one row that is not UTF-8 is found
and named instead of failing its whole batch.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.reading.files import open_binary
from opendeep_jax.data.reading.formats import (
    DATASETS,
    MISSING,
    PART_BYTES,
    Fields,
    Part,
    SourceFile,
    check_names,
    divisions,
    format_of,
)

BATCH_BYTES = 8 * 2**20
"""Size of the batches of rows that are in memory at one time, about."""

BATCH_ROWS = 1024
"""Most rows of a batch."""

DATASET_OPTIONS = ("name", "split", "revision", "data_dir", "data_files")
"""Options that may follow the `?` of a `datasets:` path."""


def cut(file: SourceFile, fields: Fields) -> list[Part]:
    """Parts of about PART_BYTES: row groups of Parquet (one each where records only point at texts), rows of a dataset.

    Raises ConfigError for a damaged file, and for columns that do not fit `fields`.
    """
    if format_of(file) == "datasets":
        rows, size = len(load_dataset(file.path)), max(1, file.size)
        check_columns(file, load_dataset(file.path).data.schema, fields)
        step = max(1, PART_BYTES * rows // size)
        bounds = [*range(0, rows, step), rows]
        pairs = zip(bounds, bounds[1:], strict=False)
        return [Part(file, begin, end, size * (end - begin) // rows) for begin, end in pairs]
    with _parquet(file) as parquet:
        check_columns(file, parquet.schema_arrow, fields)
        groups = parquet.metadata.num_row_groups
        sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(groups)]
    parts, begin = [], 0
    for end in range(1, groups + 1):
        size = sum(sizes[begin:end])
        if not fields.text or size >= PART_BYTES or end == groups:
            parts.append(Part(file, begin, end, size))
            begin = end
    return parts


def read_records(part: Part, fields: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row in the file, from 1; values by field) of the rows of a part. Raises ConfigError for a damaged file."""
    if format_of(part.file) == "datasets":
        yield from _read_dataset(part, fields)
        return
    with _parquet(part.file) as parquet:
        check_columns(part.file, parquet.schema_arrow, fields)
        groups = [parquet.metadata.row_group(group) for group in range(part.end)]
        rows = sum(group.num_rows for group in groups[part.begin :])
        number = 1 + sum(group.num_rows for group in groups[: part.begin])
        paths = [path for name in fields.names if (path := resolve(parquet.schema_arrow, name))]
        batches = parquet.iter_batches(
            batch_size=_batch_rows(rows, part.size),
            row_groups=range(part.begin, part.end),
            columns=list({".".join(path) for path in paths}),
            use_threads=False,
        )
        for batch in batches:
            yield from enumerate(_rows(batch, fields), start=number)
            number += len(batch)


def _batch_rows(rows: int, size: int) -> int:
    return max(1, min(BATCH_ROWS, rows * BATCH_BYTES // max(1, size)))


@contextlib.contextmanager
def _parquet(file: SourceFile) -> Iterator[Any]:
    """An open Parquet file. Damage found here or while it is read becomes a ConfigError that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(file.path) as content:
        try:
            # Column chunks are read page by page through a buffer: a row group can be larger than memory.
            yield pq.ParquetFile(content, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
        except ConfigError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"{file.path} is not a whole Parquet file: {str(error).splitlines()[0]} Fetch or write it again, or "
                "leave it out of data.sources."
            ) from error


def resolve(schema: Any, name: str) -> tuple[str, ...]:
    """The names that lead to a column through structs; empty if there is none. A name with a literal dot wins."""
    import pyarrow as pa

    if name in schema.names:
        return (name,)
    for head, inner in divisions(name):
        if head in schema.names and pa.types.is_struct(schema.field(head).type):
            path = resolve(pa.schema(schema.field(head).type.fields), inner)
            if path:
                return (head, *path)
    return ()


def check_columns(file: SourceFile, schema: Any, fields: Fields) -> None:
    """Raise ConfigError, with the file's columns and the nearest name, for a field without a column, or a text that
    is none."""
    import pyarrow as pa

    check_names(file, fields, schema.names, _leaves(schema), lambda name: bool(resolve(schema, name)))
    path = resolve(schema, fields.text)
    if path:
        kind = schema.field(path[0]).type
        for name in path[1:]:
            kind = kind.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_kind(kind) for is_kind in (_is_text, pa.types.is_null)):
            raise ConfigError(
                f"{file.path} has the column {fields.text!r} of type {kind}, which is no text. Name the column with "
                "the text in --data.sources.N.text_field, or leave the file out if the others of this source differ."
            )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    names = "string", "large_string", "string_view", "binary", "large_binary", "binary_view"
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _leaves(fields: Any, prefix: str = "") -> list[str]:
    import pyarrow as pa

    names = []
    for field in fields:
        nested = pa.types.is_struct(field.type)
        names += _leaves(field.type.fields, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


def _rows(batch: Any, fields: Fields) -> Iterator[dict[str, Any]]:
    columns = [_values(batch, resolve(batch.schema, name)) for name in fields.names]
    return (dict(zip(fields.names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(batch: Any, path: tuple[str, ...]) -> list:
    """Return a column's values, texts as bytes; MISSING in every row where there is no such column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not path:
        return [MISSING] * len(batch)
    column = batch.column(path[0])
    for name in path[1:]:
        column = pc.struct_field(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _read_dataset(part: Part, fields: Fields) -> Iterator[tuple[int, dict]]:
    dataset = load_dataset(part.file.path)
    check_columns(part.file, dataset.data.schema, fields)
    heads = {path[0] for name in fields.names if (path := resolve(dataset.data.schema, name))}
    tables = dataset.select_columns(sorted(heads)).with_format("arrow")
    step = _batch_rows(part.end - part.begin, part.size)
    for begin in range(part.begin, part.end, step):
        table = tables[begin : min(begin + step, part.end)].combine_chunks()
        yield from enumerate(_rows(table, fields), start=begin + 1)


def dataset_file(path: str) -> SourceFile:
    """The one SourceFile that stands for a `datasets:NAME?split=train`. Raises ConfigError if it cannot be loaded."""
    dataset = load_dataset(path)
    return SourceFile(path.removeprefix(DATASETS), path, int(dataset.data.nbytes), str(dataset._fingerprint))


@functools.lru_cache(maxsize=4)
def load_dataset(path: str) -> Any:
    """The `datasets.Dataset` that a `datasets:` path names: one on the hub, or a directory that save_to_disk wrote.

    Raises ConfigError if the library is not installed, and for names, splits and options that do not exist.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"Cannot read {path}: the library `datasets` is not installed. Run: pip install 'opendeep-jax[datasets]'."
        ) from error

    name, query, options = *path.removeprefix(DATASETS).partition("?")[::2], {}
    for option, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):  # split=train+test has a plus
        if option not in DATASET_OPTIONS or option in options or not value:
            said = "no option" if option not in DATASET_OPTIONS else "no value for" if not value else "a second"
            raise ConfigError(
                f"{path}: there is {said} {option!r}. A `datasets:` path takes {', '.join(DATASET_OPTIONS)}, each "
                "once, as in datasets:NAME?name=CONFIG&split=train."
            )
        options[option] = value
    split = options.pop("split", "")
    try:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            return datasets.load_dataset(name, split=split or "train", **options)
        if options:
            raise ValueError(f"a directory has no option {next(iter(options))!r}, only split")
        return _of_split(datasets, datasets.load_from_disk(str(directory)), split)
    except Exception as error:  # the library and its hub have many kinds
        reason = f"it has no split {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"Cannot load {path}: {reason}. Correct the name (or the directory that save_to_disk wrote), its options, "
            "or the network and your credentials."
        ) from error


def _of_split(datasets: Any, saved: Any, split: str) -> Any:
    """Return the part of a saved Dataset or DatasetDict that `split`, as `train[:10%]` or `train+test`, names.

    A Dataset, which is one split, has the name that it was saved with, or `train`; all of it is read without `split`.
    """
    if not isinstance(saved, datasets.DatasetDict):
        if not split:
            return saved
        saved = {str(saved.split or "train"): saved}
    split = split or "train"
    names = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    for name in names:
        if name not in saved:
            raise KeyError(name)
    lengths = {name: len(each) for name, each in saved.items()}
    ranges = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    parts = [
        (part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to) for part in ranges
    ]
    if all((begin, end) == (0, lengths[name]) for name, begin, end in parts) and len(parts) == 1:
        return saved[parts[0][0]]  # as it is: its fingerprint names the store
    chosen = [saved[name].select(range(begin, end)) for name, begin, end in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
