"""Files on this machine and, through fsspec, elsewhere (gs://, s3://, hf://, ...): listing them and opening them."""

import contextlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from opendeep_jax.config.checks import ConfigError

BLOCK_BYTES = 16 * 2**20
"""What a remote file asks for at one time: large enough that the way there and back hardly counts."""

LISTING_THREADS = 16
"""Files that are looked into at one time to find their sizes or parts; mostly they wait for a remote host."""

STAMPS = ("xet_hash", "blob_id", "ETag", "etag", "md5Hash", "crc32c", "generation", "checksum", "mtime", "created")
"""Names that file systems have for a file's version, a hash of its content before a time."""


def is_remote(path: str) -> bool:
    """Whether `path` is a URL rather than a place on this machine."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises ConfigError where its driver is missing."""
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
    """Turns a file that cannot be read, or a host that cannot be reached, into a ConfigError that names it."""
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
    """Opens a file or URL for reading bytes. Raises ConfigError, also while it is read, if it is out of reach."""
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


def read_whole(url: str) -> bytes | None:
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
    """Whether there is a file whose name is `path` to the letter, brackets and all."""
    try:
        return bool(files.isfile(path))
    except Exception:  # a pattern that is no valid address
        return False


def _names_a_file(path: str) -> bool:
    """Whether an HTTP address ends in a name with a dot: what is there may hold links, and is no directory for that."""
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
