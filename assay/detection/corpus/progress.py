"""Progress of a corpus run on a terminal: share of the input bytes, documents per second, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[int, int, int], None]
"""Called with the input bytes that are done, and documents and rejects since the start."""


@contextmanager
def shown(enabled: bool, total_bytes: int) -> Iterator[Update]:
    """A progress bar on stderr where that is a terminal, else nothing.

    Parameters
    ----------
    enabled
        False: never a bar.
    total_bytes
        Size of the inputs.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda done_bytes, documents, rejects: None
        return
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TextColumn("{task.fields[rejects]:,} rejected"),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total_bytes, documents=0, rejects=0, rate=0.0)
        begun = time.monotonic()

        def update(done_bytes: int, documents: int, rejects: int) -> None:
            rate = documents / max(1e-9, time.monotonic() - begun)
            bar.update(task, completed=done_bytes, documents=documents, rejects=rejects, rate=rate)

        yield update
