"""Text files that a reader, and a run that goes on after a crash, sees old or new and never in part."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path; what the block writes there takes the place of `path` if it ends well, and vanishes if not.

    Raises:
        OSError: where it cannot be written, with `path` as its filename; `path` is then as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a full disk is reported without a name
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` in one step, as UTF-8. Raises OSError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
