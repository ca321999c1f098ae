"""A privacy budget on disk: append-only, hash-chained, spent before noise leaves, never past its end.

Guarantee: the sum of what was released is at most the budget, whenever the process is killed and however many try to
spend at once; a spend is on disk (fsync) before `spend` returns. A crash after it wastes budget and never privacy.
Not guaranteed: whoever can write the file can cut off its end or restore an old copy. Keep `head` elsewhere and pass it
to `open` to notice. The chain notices every other change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from assay.privacy import _chain
from assay.privacy.accounting import Cost, check_same_terms, epsilon_of_rho
from assay.privacy.budget import Budget, Quote
from assay.privacy.errors import BudgetError, LedgerError
from assay.privacy.noise import NoiseSource, refuse_seeded


@dataclass(frozen=True)
class Receipt:
    """Proof that a spend is on disk.

    Attributes
    ----------
    number
        Its line in the ledger, from 1.
    hash
        The chain's hash after it.
    costs
        What was spent.
    """

    number: int
    hash: str
    costs: tuple[Cost, ...] = field(repr=False)


class Ledger:
    """An open ledger, locked against other processes until `close`; a context manager. Made by `create` or `open`."""

    def __init__(self, path: Path, fd: int, bodies: list[dict[str, Any]], head: str) -> None:
        self._path = path
        self._fd = fd
        self._pid = os.getpid()
        self._budget = _budget_from(bodies[0], path)
        self._costs = [cost for body in bodies[1:] for cost in _costs_from(body, path)]
        self._spent = self._budget.spent(self._costs)
        self._number = len(bodies) - 1
        self._head = head

    @classmethod
    def create(cls, path: str | os.PathLike[str], budget: Budget) -> Ledger:
        """Make a ledger file, mode 0600, and open it.

        Raises
        ------
        LedgerError
            If something is at `path` already.
        """
        if not isinstance(budget, Budget):
            raise TypeError(f"budget must be a Budget, got {type(budget).__name__}. See Budget.pure and others.")
        where = Path(path)
        _chain.publish(where, _chain.first_line(_body_of(budget)))
        return cls.open(where)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, wait: float = 0.0, expect_head: str | None = None) -> Ledger:
        """Open a ledger, check every line, and cut off a last line that was torn by a crash.

        Parameters
        ----------
        path
            The file.
        wait
            Seconds to wait for another process to close it.
        expect_head
            A `head` noted earlier: the chain must contain it, which notices a file that was rolled back.

        Raises
        ------
        LedgerError
            If it is missing, damaged, locked, or does not contain `expect_head`.
        """
        where = Path(path)
        try:
            fd = os.open(where, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            raise LedgerError(f"there is no ledger at {where}. Make one with Ledger.create().") from None
        try:
            _chain.lock(fd, where, wait)
            raw = where.read_bytes()
            if not os.path.samestat(os.fstat(fd), os.stat(where)):
                raise LedgerError(f"{where} was replaced while it was being opened. Open it again.")
            bodies, head, length, unfinished = _chain.read(raw, where)
            if expect_head is not None and expect_head not in _heads(bodies):
                raise LedgerError(f"{where} does not contain the head {expect_head[:12]}...: it was rolled back.")
            ledger = cls(where, fd, bodies, head)
            if length < len(raw):
                os.ftruncate(fd, length)
            if unfinished:
                _chain.write_all(fd, b"\n")
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        return ledger

    @property
    def budget(self) -> Budget:
        """What may be spent in total."""
        return self._budget

    @property
    def spent(self) -> Fraction:
        """What was spent, in the unit of the budget's limit."""
        return self._spent

    @property
    def remaining(self) -> Fraction:
        """What is left."""
        return self._budget.limit - self._spent

    @property
    def costs(self) -> tuple[Cost, ...]:
        """All costs, in order."""
        return tuple(self._costs)

    @property
    def head(self) -> str:
        """The chain's last hash; noted elsewhere, it lets `open` notice a rolled-back file."""
        return self._head

    def price(self, costs: Cost | Iterable[Cost]) -> Quote:
        """What a batch would cost. Nothing is spent and nothing is written.

        Raises
        ------
        ValueError
            If a cost is for another adjacency or unit, or cannot be counted by this accountant.
        """
        batch = _batch(costs)
        for cost in batch:
            check_same_terms(cost, self._budget.adjacency, self._budget.unit)
        after = self._budget.spent([*self._costs, *batch])
        left = self._budget.limit - after
        return Quote(after - self._spent, self._spent, left, left >= 0, self._epsilon(after))

    def spend(self, costs: Cost | Iterable[Cost], *, noise: NoiseSource, note: str = "") -> Receipt:
        """Enter costs, and return only when they are on disk. Draw the noise after this, not before.

        Parameters
        ----------
        costs
            One cost or a batch; all are entered or none.
        noise
            The source that the noise will come from; a seeded one is refused.
        note
            What for, at most 1,000 characters. It is readable by whoever reads the file.

        Raises
        ------
        BudgetError
            If it does not fit; nothing is entered.
        SeededNoiseError
            If `noise` is seeded.
        ValueError
            If a cost is for another adjacency or unit.
        LedgerError
            If the ledger is closed, belongs to another process, or could not be written.
        """
        refuse_seeded(noise)
        if not isinstance(note, str) or len(note) > 1000:
            raise ValueError("note must be a text of at most 1,000 characters.")
        batch = _batch(costs)
        quote = self.price(batch)
        self._check_open()
        if not quote.affordable:
            raise BudgetError(
                f"the batch costs {float(quote.cost):.6g} ({self._budget.accountant}), {float(self.remaining):.6g} of "
                f"{float(self._budget.limit):.6g} is left ({float(self._spent):.6g} spent). Nothing was spent. "
                "Release less, or with more noise."
            )
        body = {"costs": [_cost_to(cost) for cost in batch], "note": note, "noise": noise.name}
        line, head = _chain.line_of(self._number + 1, self._head, body)
        try:
            _chain.write_all(self._fd, line)
            os.fsync(self._fd)
        except OSError as error:
            # What reached the disk is unknown: only a fresh reading may decide.
            self.close()
            raise LedgerError(f"{self._path} could not be written ({error}); it is closed. Open it again.") from None
        self._number, self._head = self._number + 1, head
        self._costs += batch
        self._spent += quote.cost
        return Receipt(self._number, head, batch)

    def close(self) -> None:
        """Close the file and let others open it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Ledger({str(self._path)!r}, {self._budget.accountant}, spent {float(self._spent):.6g} of "
            f"{float(self._budget.limit):.6g}, {self._budget.adjacency} of one {self._budget.unit})"
        )

    def _epsilon(self, total: Fraction) -> float | None:
        if self._budget.accountant != "zcdp":
            return float(total)
        if not self._budget.delta:
            return None
        return epsilon_of_rho(total, self._budget.delta, sharp=True) if total else 0.0

    def _check_open(self) -> None:
        if self._fd < 0:
            raise LedgerError(f"{self._path} is closed. Open it again with Ledger.open().")
        if os.getpid() != self._pid:
            # A forked child shares the lock, so the lock would not keep the two apart.
            raise LedgerError(f"{self._path} was opened by another process. Open it in this one after that closes it.")


def _batch(costs: Cost | Iterable[Cost]) -> tuple[Cost, ...]:
    batch = (costs,) if isinstance(costs, Cost) else tuple(costs)
    if not batch or not all(isinstance(cost, Cost) for cost in batch):
        raise TypeError("costs must be a Cost or a non-empty sequence of them.")
    return batch


def _heads(bodies: list[dict[str, Any]]) -> set[str]:
    heads, head = set(), "0" * 64
    for number, body in enumerate(bodies):
        head = _chain.hash_of(number, head, body)
        heads.add(head)
    return heads


def _body_of(budget: Budget) -> dict[str, Any]:
    return {
        "schema": _chain.SCHEMA,
        # Two ledgers with one budget are still two chains.
        "id": os.urandom(16).hex(),
        "accountant": budget.accountant,
        "limit": str(budget.limit),
        "delta": budget.delta.hex(),
        "adjacency": budget.adjacency,
        "unit": budget.unit,
    }


def _budget_from(body: dict[str, Any], path: Path) -> Budget:
    if body.get("schema") != _chain.SCHEMA:
        raise LedgerError(f"{path} has schema {body.get('schema')!r}, this version reads {_chain.SCHEMA!r}.")
    return Budget(
        accountant=body["accountant"],
        limit=Fraction(body["limit"]),
        delta=float.fromhex(body["delta"]),
        adjacency=body["adjacency"],
        unit=body["unit"],
    )


def _cost_to(cost: Cost) -> dict[str, Any]:
    return {
        "kind": cost.kind,
        "amount": str(cost.amount),
        "sensitivity": cost.sensitivity,
        "count": cost.count,
        "adjacency": cost.adjacency,
        "unit": cost.unit,
    }


def _costs_from(body: dict[str, Any], path: Path) -> list[Cost]:
    try:
        return [Cost(**{**row, "amount": Fraction(row["amount"])}) for row in body["costs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"{path} has a line that this version cannot read: {error}.") from None
