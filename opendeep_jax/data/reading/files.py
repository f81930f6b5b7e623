"""Files on this machine and, through fsspec, elsewhere (gs://, s3://, hf://, ...): listing them, opening them, and the
bytes inside of compressed ones, with damage that is named."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from opendeep_jax.config.checks import ConfigError

BLOCK_BYTES = 16 * 2**20
"""Bytes that are asked of a remote file at one time: large enough that the way there and back hardly counts."""

LISTING_THREADS = 16
"""Files that are looked into at one time to find their sizes or parts; mostly they wait for a remote host."""

STAMPS = ("xet_hash", "blob_id", "ETag", "etag", "md5Hash", "crc32c", "generation", "checksum", "mtime", "created")
"""Names that file systems have for a file's version, a hash of its content before a time."""


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL rather than a place on this machine."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it. Raises ConfigError where its driver is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(
            f"Cannot read {url}: the driver of {url.split('://')[0]}:// is not installed ({error}). "
            "Run: pip install 'opendeep-jax[remote]'."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"Cannot read {url}: {error}. Paths begin with gs://, s3://, hf:// or another name that fsspec knows; a "
            "path on this machine has none."
        ) from error
    except Exception as error:
        raise _unreachable(url, error) from error


@contextlib.contextmanager
def reaching(path: str) -> Iterator[None]:
    """Turn a file that cannot be read, or a host that cannot be reached, into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(
            f"Cannot read {path}: No such file or directory. Correct the path of the source in data.sources."
        ) from error
    except Exception as error:
        if is_remote(path):  # each driver has its own kinds of errors
            raise _unreachable(path, error) from error
        if isinstance(error, OSError):
            raise ConfigError(
                f"Cannot read {path}: {error.strerror or error}. Make the file readable, or leave it out of "
                "data.sources."
            ) from error
        raise


def _unreachable(url: str, error: Exception) -> ConfigError:
    hint = ""
    if url.startswith("s3://"):
        hint = """ (a public bucket needs none: set FSSPEC_S3='{"anon": true}' in the environment)"""
    return ConfigError(
        f"Cannot read {url}: {type(error).__name__}: {error}. Check the address, the network and your "
        f"credentials{hint}, then run the same command again."
    )


def open_binary(path: str) -> BinaryIO:
    """Open a file or URL for reading bytes. Raises ConfigError, also while it is read, if it is out of reach."""
    if not is_remote(path):
        with reaching(path):
            return open(path, "rb", buffering=2**20)
    files, inside = filesystem(path)
    with reaching(path):
        return io.BufferedReader(_RemoteFile(files.open(inside, "rb", block_size=BLOCK_BYTES), path), 2**20)


class _RemoteFile(io.RawIOBase):
    """An open remote file whose every failure is a ConfigError that names the URL."""

    def __init__(self, file: Any, url: str):
        self.file, self.url = file, url

    def readinto(self, buffer) -> int:
        with reaching(self.url):
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with reaching(self.url):
            return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self):
        if not self.closed:
            self.file.close()
        super().close()


def read_all(url: str) -> bytes | None:
    """All bytes at a URL, or None where there is nothing. Raises ConfigError if its host cannot be reached."""
    files, inside = filesystem(url)
    with reaching(url):
        try:
            return files.cat_file(inside)
        except FileNotFoundError:
            return None


def list_remote(url: str) -> list[tuple[str, str, int, str]]:
    """(name below the root, URL, bytes, stamp) of the files of a remote file, directory or glob, in no order.

    Names are relative to the directory, or to what precedes the glob's first sign. A size that a listing does not
    tell, as an HTTP server's, is asked for, or else counted. Raises ConfigError if there is nothing, or the host cannot
    be reached.
    """
    files, path = filesystem(url)
    http = url.startswith(("http://", "https://"))
    with reaching(url):
        magic = [position for position in map(path.find, "*[" if http else "*?[") if position >= 0]
        if magic and not _is_file(files, path):
            root, found = path[: min(magic)].rpartition("/")[0], files.glob(path, detail=True)
        elif not (http and _names_a_file(path)) and files.isdir(path):
            root, found = path.rstrip("/"), files.find(path, detail=True)
        else:
            root, found = path.partition("?")[0].rpartition("/")[0], {path: files.info(path)}
    inside = [(name, info) for name, info in found.items() if name.startswith(f"{root}/")] if root else [*found.items()]
    inside = [(name, info) for name, info in inside if info.get("type") != "directory" and not name.endswith("/")]
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        known = list(pool.map(lambda entry: _with_size(files, *entry), inside))
    listed = []
    for (name, _), info in zip(inside, known, strict=True):
        short = name.removeprefix(root).lstrip("/")
        short = short.partition("?")[0] if http else short
        if short:  # a listing's links to itself in another order have none
            listed.append((short, files.unstrip_protocol(name), info["size"], _stamp(info)))
    return listed


def _is_file(files: Any, path: str) -> bool:
    """Return whether there is a file whose name is `path` to the letter, brackets and all."""
    try:
        return bool(files.isfile(path))
    except Exception:  # a pattern that is no valid address
        return False


def _names_a_file(path: str) -> bool:
    """Return whether an HTTP address ends in a name with a dot: no directory is there, though it may hold links."""
    return "." in path.partition("?")[0].rpartition("://")[2].partition("/")[2].rpartition("/")[2]


def _with_size(files: Any, name: str, info: dict) -> dict:
    if info.get("size") is not None:
        return info
    url = files.unstrip_protocol(name)
    with reaching(url):
        info = files.info(name)
    if info.get("size") is None:
        size = 0
        with open_binary(url) as content:
            while block := content.read(2**20):
                size += len(block)
        info = info | {"size": size}
    return info


def _stamp(info: dict) -> str:
    lfs = info.get("lfs")  # hf://: the SHA-256 of a large file
    if lfs:
        return str(lfs["sha256"])
    return next((str(info[name]) for name in STAMPS if info.get(name)), "")


COMPRESSED = re.compile(r"\.(gz|bz2|xz|zstd?)$", re.IGNORECASE)
"""Endings of compressed files."""

OUTPUT_BYTES = 2**20
"""Bytes that a decompressor gives at one time, about, however dense the file is."""


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
