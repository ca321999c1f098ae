"""Shards on their way to those who test them: how far is read ahead, what is given again, when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from assay.detection.corpus.dispatch import Answer, Lost, Queue, answers
from assay.detection.corpus.shards import Shard


class FakeTeam:
    """`size` testers who answer one at a time, the newest first; those of `doomed` lose a shard so many times."""

    def __init__(self, size: int, doomed: dict[int, int]) -> None:
        self.size, self.doomed = size, Counter(doomed)
        self.held: list[Shard] = []
        self.tested: list[int] = []
        self.timeouts: list[float | None] = []

    @property
    def busy(self) -> bool:
        return bool(self.held)

    def hand_out(self, queue: Queue) -> None:
        while queue and len(self.held) < self.size:
            self.held.append(queue.take())

    def receive(self, queue: Queue, timeout: float | None) -> Iterator[Answer]:
        self.timeouts.append(timeout)
        if timeout == 0:  # nobody is so fast
            return
        shard = self.held.pop()
        self.tested.append(shard.index)
        if self.doomed[shard.index]:
            self.doomed[shard.index] -= 1
            queue.put_back(shard)
        else:
            yield Lost(shard, "answered")


@pytest.mark.parametrize(("shards", "size", "ahead"), [(0, 1, 1), (1, 3, 3), (7, 1, 1), (40, 3, 3), (40, 2, 5)])
def test_every_shard_is_answered_once_and_no_more_are_read_than_can_be_used(shards: int, size: int, ahead: int) -> None:
    read: list[int] = []

    def source() -> Iterator[Shard]:
        for index in range(shards):
            read.append(index)
            yield Shard(index)

    team = FakeTeam(size, {})
    for found, answer in enumerate(answers(Queue(source(), ahead), team), 1):
        assert isinstance(answer, Lost)
        assert len(read) <= found + size + ahead
    assert sorted(team.tested) == list(range(shards)) == read
    assert team.timeouts.count(0) == shards  # one look after each reading; else one waits


def test_a_shard_that_lost_its_tester_is_the_next_to_be_tested() -> None:
    team = FakeTeam(1, {0: 2, 3: 1})
    found = [answer.shard.index for answer in answers(Queue(map(Shard, range(5)), 2), team) if isinstance(answer, Lost)]
    assert found == [0, 1, 2, 3, 4]
    assert team.tested == [0, 0, 0, 1, 2, 3, 3, 4]


def test_an_error_while_reading_ends_it() -> None:
    def source() -> Iterator[Shard]:
        yield Shard(0)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(answers(Queue(source(), 2), FakeTeam(1, {})))
