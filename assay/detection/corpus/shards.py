"""Shards: consecutive rows of the corpus, cut the same way on every run.

A shard ends before the row that would exceed its number of rows or of characters; a document longer than that is a
shard of its own, so that one that needs too much memory takes no other with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from assay.detection.corpus.reading import Document, Reject, Row


@dataclass(slots=True)
class Shard:
    """Consecutive rows of the corpus.

    Attributes
    ----------
    index
        Number of the shard, from 0.
    documents, rejects
        Its rows, in order.
    """

    index: int
    documents: list[Document] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def last(self) -> Row:
        """The last row, a document or a reject."""
        return max((rows[-1] for rows in (self.documents, self.rejects) if rows), key=lambda row: (row.file, row.row))


def cut(rows: Iterable[Row], *, first: int, max_rows: int, max_characters: int) -> Iterator[Shard]:
    """Rows as shards.

    Parameters
    ----------
    rows
        All rows from the beginning of shard `first` on.
    first
        Index of the first shard.
    max_rows, max_characters
        Largest number of rows, and of characters of text unless one document alone exceeds it.
    """
    shard, characters = Shard(first), 0
    for row in rows:
        size = len(row.text) if isinstance(row, Document) else 0
        count = len(shard.documents) + len(shard.rejects)
        if count and (count == max_rows or characters + size > max_characters):
            yield shard
            shard, characters = Shard(shard.index + 1), 0
        characters += size
        if isinstance(row, Document):
            shard.documents.append(row)
        else:
            shard.rejects.append(row)
    if shard.documents or shard.rejects:
        yield shard
