"""Shards on their way to those who test them: read a little ahead, handed out, given again after a death, answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from assay.detection.corpus.ledger import ShardRecord
from assay.detection.corpus.shards import Shard


@dataclass(frozen=True)
class Lost:
    """A shard that its workers died of: how the last of them ended, and how many there were."""

    shard: Shard
    ending: str
    times: int = 2


Answer = ShardRecord | Lost


class Queue:
    """Shards that wait for someone to test them; no more are read ahead than can be tested at once.

    Parameters
    ----------
    shards
        Read one by one.
    ahead
        Largest number of shards that wait, >= 1.
    """

    def __init__(self, shards: Iterator[Shard], ahead: int) -> None:
        self._shards = shards
        self._ahead = ahead
        self._waiting: deque[Shard] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Shard:
        """The shard that has waited longest."""
        return self._waiting.popleft()

    def put_back(self, shard: Shard) -> None:
        """A shard to be tested again, and next."""
        self._waiting.appendleft(shard)

    def read(self) -> bool:
        """Read one more shard; False where enough wait or none is left."""
        shard = next(self._shards, None) if len(self) < self._ahead else None
        if shard is not None:
            self._waiting.append(shard)
        return shard is not None


class Team(Protocol):
    """Those who test shards: worker processes, or the slots of a cluster."""

    @property
    def busy(self) -> bool:
        """Whether one of them holds a shard."""

    def hand_out(self, queue: Queue) -> None:
        """Give shards to all that are free; start further ones where shards wait for want of them."""

    def receive(self, queue: Queue, timeout: float | None) -> Iterator[Answer]:
        """What has come within some seconds, at once with 0, at last with None; a shard to be tested again goes back.

        Raises
        ------
        RunError
            If the run cannot go on.
        """


def answers(queue: Queue, team: Team) -> Iterator[Answer]:
    """The answers to all shards, as they come."""
    while True:
        team.hand_out(queue)
        # Reading goes on while others test: an answer is waited for only where nothing can be read.
        read = queue.read()
        if not (read or queue or team.busy):
            return
        yield from team.receive(queue, 0 if read else None)
