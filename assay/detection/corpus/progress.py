"""Progress of a corpus run on a terminal: share of the input bytes, documents per second, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int, int], None]
"""Called with input bytes, documents and rejects of one shard."""


@contextmanager
def shown(enabled: bool, total_bytes: int, done_bytes: int) -> Iterator[Advance]:
    """A progress bar on stderr where that is a terminal, else nothing.

    Parameters
    ----------
    enabled
        False: never a bar.
    total_bytes, done_bytes
        Size of the inputs, and what an earlier start has done of it.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda consumed, documents, rejects: None
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
        task = bar.add_task("", total=total_bytes, completed=done_bytes, documents=0, rejects=0, rate=0.0)
        counts, begun = [0, 0], time.monotonic()

        def advance(consumed: int, documents: int, rejects: int) -> None:
            counts[0] += documents
            counts[1] += rejects
            rate = counts[0] / max(1e-9, time.monotonic() - begun)
            bar.update(task, advance=consumed, documents=counts[0], rejects=counts[1], rate=rate)

        yield advance
