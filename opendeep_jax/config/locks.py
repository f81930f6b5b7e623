"""One process at a time: a lock on a file that its holder's death gives back, also on file systems without flock.

Lustre without `-o flock` and NFS without lockd refuse flock. There a file FILE.owner, made by one process alone and
touched every few seconds while it lives, stands for the lock; one that nobody touches any more is taken away.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""Error codes of file systems without flock."""

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""An owner that was not heard of for so long is dead."""

POLL_SECONDS = 0.5


class Held(Exception):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(descriptor: int, owner: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of an open file until the block ends (and, with flock, until all copies of `descriptor` close).

    Args:
        owner: the file that stands for the lock where there is no flock.
        waiting: called before another process is waited for; None not to wait.

    Raises:
        Held: if another process has the lock and is not to be waited for.
        OSError: if the place cannot be written.
    """
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise Held from None
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        with _owning(owner, waiting):
            yield
        return
    yield


@contextlib.contextmanager
def _owning(path: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "key": uuid.uuid4().hex})
    first, seen, since = True, None, 0.0
    while not _create(path, mine):
        state = _state(path)
        if state is None:
            continue
        if state != seen:
            if waiting is None and (_is_here(state[0]) and not _is_dead(state[0]) or seen):
                raise Held  # its holder lives: it is a process here, or touched the file while we looked
            seen, since = state, time.monotonic()
        if _is_dead(state[0]) or time.monotonic() - since > STALE_SECONDS:
            _take_away(path, state[0])
            continue
        if waiting and first:
            waiting()
        first = False
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if (state := _state(path)) and state[0] == mine:
            path.unlink(missing_ok=True)


def _create(path: Path, content: str) -> bool:
    """Create the file; return False if it exists."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    return True


def _state(path: Path) -> tuple[str, int] | None:
    """Return the owner file's content and modification time; None if it is gone."""
    try:
        return path.read_text("utf-8"), path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _is_here(content: str) -> bool:
    try:
        return json.loads(content)["host"] == socket.gethostname()
    except (ValueError, KeyError, TypeError):
        return False  # being written, or cut off


def _is_dead(content: str) -> bool:
    """Return whether the owner is known to have ended: a former process of this machine."""
    if not _is_here(content):
        return False
    try:
        os.kill(int(json.loads(content)["pid"]), 0)
        return False
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False


def _take_away(path: Path, content: str) -> None:
    """Remove the lock file of a dead owner, unless another process has replaced it."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_text("utf-8") != content:
            aside.rename(path)
        else:
            aside.unlink()


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
