"""Compressed files: which endings say so, the bytes inside, and damage that is named."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.reading.remote import open_binary

COMPRESSED = re.compile(r"\.(gz|bz2|xz|zstd?)$", re.IGNORECASE)
"""Endings of compressed files."""

OUTPUT_BYTES = 2**20
"""What a decompressor gives at one time, about, however dense the file is."""


@contextlib.contextmanager
def open_content(path: str, name: str) -> Iterator[BinaryIO]:
    """Open a file or URL for reading its bytes, decompressed where the ending of `name` says so.

    Raises ConfigError, also while it is read, for a file that is out of reach, damaged or cut short.
    """
    with open_binary(path) as content:
        ending = COMPRESSED.search(name)
        try:
            yield _decompressed(content, ending[1].lower(), path) if ending else content
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise damaged(path, error) from error
        except OSError as error:
            if ending and ending[1].lower() == "bz2" and error.errno is None:  # bz2's word for damage
                raise damaged(path, error) from error
            raise


def _decompressed(content: BinaryIO, ending: str, path: str) -> BinaryIO:
    openers = {"gz": lambda c: gzip.GzipFile(fileobj=c), "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}
    reader = openers[ending](content) if ending in openers else _ZstandardReader(content, path)
    return io.BufferedReader(reader, 2**20)


def damaged(path: str, error: object) -> ConfigError:
    """Return the error for a file that is not whole."""
    return ConfigError(
        f"{path} is damaged or cut short: {error}. Fetch or write the file again, or leave it out of data.sources."
    )


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of a .zst file. zstandard's own reader takes a file that is cut short for a whole one."""

    def __init__(self, content: BinaryIO, path: str):
        import zstandard

        self.content, self.path, self.pending, self.error = content, path, memoryview(b""), zstandard.ZstdError
        # Frames with long windows (--long) are read too.
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self.frame, self.rest, self.step = self.decompressor.decompressobj(), b"", 2**12

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.pending:
            data = self.rest[: self.step] or self.content.read(self.step)
            self.rest = self.rest[self.step :]
            if not data:
                if self.frame is not None:
                    raise damaged(self.path, "it ends inside a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.pending = memoryview(self.frame.decompress(data))
            except self.error as error:
                raise damaged(self.path, error) from error
            dense = len(self.pending) > OUTPUT_BYTES // 2
            self.step = max(1, self.step // 2) if dense else min(2**16, self.step * 2)
            if self.frame.eof:
                self.frame, self.rest = None, self.frame.unused_data + self.rest
        size = min(len(buffer), len(self.pending))
        buffer[:size], self.pending = self.pending[:size], self.pending[size:]
        return size
