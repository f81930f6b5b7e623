"""A bar on the error stream while something is worked on."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `total` bytes, or one without a length where that is 0; gives the function that moves it."""
    if not show:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    sized = (DownloadColumn(), TimeRemainingColumn()) if total else (TimeElapsedColumn(),)
    with Progress(TextColumn("{task.description}"), BarColumn(), *sized, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda size: bar.advance(task, size)
        bar.update(task, total=total or 1, completed=total or 1)
