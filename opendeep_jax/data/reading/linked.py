"""Texts that records only point at, as The Stack v2's records point at files of Software Heritage."""

import gzip
import re
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.reading.files import read_all
from opendeep_jax.data.reading.formats import MISSING

LINK = re.compile(r"\{([^{}]+)\}")
"""A field's name in a source's text_url."""

ENCODING = "src_encoding"
"""Field with the encoding of the text, where records have it."""

FETCHERS = 32
"""Texts that are fetched at one time. As many again wait, so that a slow one holds up no other."""

GZIP_MAGIC = b"\x1f\x8b"

Record = tuple[str, str, dict[str, Any]]


def fetch_texts(text_url: str, text_field: str, records: Iterator[Record]) -> Iterator[Record]:
    """Yield the (place, id, values) of `records`, in order, each with the bytes at its text_url under `text_field`.

    MISSING stands for a URL where there is nothing, None for one that a null field leaves unknown. Raises ConfigError
    for a host that is out of reach, a damaged text, and a record without the fields that text_url names.
    """
    pool, waiting = ThreadPoolExecutor(FETCHERS), deque()
    try:
        for record in records:
            known = text_field in record[2]  # a line that could not be parsed stands for itself
            address = None if known else _address(text_url, *record)
            waiting.append((record, address and pool.submit(_fetch, address)))
            if len(waiting) >= 2 * FETCHERS:
                yield _with_text(text_field, *waiting.popleft())
        while waiting:
            yield _with_text(text_field, *waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _with_text(text_field: str, record: Record, fetched: Future | None) -> Record:
    where, id, values = record
    return where, id, {text_field: fetched.result() if fetched else None} | values


def _address(text_url: str, where: str, id: str, values: dict[str, Any]) -> str | None:
    for name in LINK.findall(text_url):
        if values[name] is MISSING:
            raise ConfigError(
                f"{where} (id {id!r}) has no field {name!r}, which text_url={text_url!r} names. Correct "
                "--data.sources.N.text_url, or remove that record."
            )
        if values[name] is None:
            return None
        value = values[name].decode("utf-8", "replace") if isinstance(values[name], bytes) else str(values[name])
        text_url = text_url.replace(f"{{{name}}}", value)
    return text_url


def _fetch(url: str) -> Any:
    content = read_all(url)
    if content is None:
        return MISSING
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{url} is damaged: {error}. Run the same command again; if it stays so, remove the record that names it."
        ) from error
