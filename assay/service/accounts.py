"""Budgets and the audit log of detections: charged together, in groups, before the keys are used.

Every detection is charged in a transaction that is committed before its text is tested, so what was answered is in the
log whenever the process is killed. Requests that wait at the same time share one transaction (group commit).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from queue import Empty, SimpleQueue
from typing import Any, Final

from sqlalchemy import Connection, Engine, bindparam, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from assay.service.auth import Caller
from assay.service.database import AuditEvent, Budget

_LOG = logging.getLogger("assay.service")
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_GROUP: Final = 256  # charges in one transaction
_Row = tuple[str, str, str, date]


@dataclass(frozen=True)
class Charge:
    """What a caller is about to do with keys.

    Attributes
    ----------
    caller
        Who.
    key_ids
        Keys that will be used.
    texts
        How many texts are tested with each of them.
    action
        Name in the audit log; None writes nothing there.
    subject
        What is acted on, such as a job id.
    """

    caller: Caller
    key_ids: tuple[str, ...]
    texts: int = 1
    action: str | None = None
    subject: str | None = None


class OracleGuard:
    """Daily budgets of detections, and their audit log, both in the database.

    An attacker who may query a detector without end can strip a mark or forge one, so callers who hold only the scope
    "detect" have a daily budget for each watermark key. Callers with "keys" or "admin" have none: they hold the keys.

    Parameters
    ----------
    engine
        The database.
    per_day
        Detections of one watermark key by one API key in a day (UTC).
    """

    def __init__(self, engine: Engine, per_day: int) -> None:
        self._engine = engine
        self._per_day = per_day
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def spend(self, caller: Caller, key_ids: Sequence[str], count: int = 1) -> bool:
        """Whether the caller may make `count` detections under each key; if so they are spent, else none is."""
        if caller.may("keys"):
            return True
        return self.charge_all([Charge(caller, tuple(key_ids), count)])[0]

    def charge_all(self, charges: Sequence[Charge]) -> list[bool]:
        """Charge in order, in one transaction: whether each may be done. A refused one spends nothing and is logged."""
        with self._engine.begin() as connection:
            allowed = self._decide(connection, charges)
            events = [_event(one, granted) for one, granted in zip(charges, allowed, strict=True) if one.action]
            if events:
                connection.execute(insert(AuditEvent), events)
        return allowed

    async def charge(self, charge: Charge) -> bool:
        """As `charge_all` for one, sharing the transaction with whoever waits at the same time."""
        if charge.action is None and charge.caller.may("keys"):
            return True
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bool] = loop.create_future()

        def settle(granted: bool | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(_settle, answer, granted)

        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="assay-accounts", daemon=True)
                self._writer.start()
        self._waiting.put(_Waiting(charge, settle))
        return await answer

    def close(self) -> None:
        """Write what waits, then end the writer."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            self._waiting.put(None)
            writer.join()

    def _write(self) -> None:
        while (first := self._waiting.get()) is not None:
            group, last = [first], False
            with contextlib.suppress(Empty):
                while len(group) < _GROUP:
                    one = self._waiting.get_nowait()
                    if one is None:
                        last = True
                        break
                    group.append(one)
            try:
                granted: Sequence[bool | None] = self.charge_all([one.charge for one in group])
            except Exception as error:
                _LOG.error("detections could not be charged: %s", type(error).__name__)
                granted = [None] * len(group)
            for one, answer in zip(group, granted, strict=True):
                one.settle(answer)
            if last:
                return

    def _decide(self, connection: Connection, charges: Sequence[Charge]) -> list[bool]:
        today = datetime.now(UTC).date()
        rows = [[] if one.caller.may("keys") else _rows(one, today) for one in charges]
        # Sorted: two servers that lock the same rows in one order cannot wait for each other.
        needed = sorted({row for some in rows for row in some})
        used = _locked(connection, needed)
        before = dict(used)
        allowed = []
        for one, its in zip(charges, rows, strict=True):
            granted = all(used[row] + one.texts <= self._per_day for row in its)
            if granted:
                for row in its:
                    used[row] += one.texts
            allowed.append(granted)
        changed = [row for row in needed if used[row] != before[row]]
        if changed:
            values = [dict(zip(_BOUND, row, strict=True)) | {"b_used": used[row]} for row in changed]
            connection.execute(_SET_USED, values)
        return allowed


@dataclass(frozen=True)
class _Waiting:
    charge: Charge
    settle: Callable[[bool | None], None] = field(repr=False)


_TABLE = Budget.__table__
_COLUMNS = (_TABLE.c.tenant_id, _TABLE.c.api_key_id, _TABLE.c.key_id, _TABLE.c.day)
_BOUND = ("b_tenant", "b_api_key", "b_key", "b_day")
_SET_USED = (
    update(_TABLE)  # type: ignore[arg-type]  # a Table, which the declarative stubs call a FromClause
    .where(*(column == bindparam(name) for column, name in zip(_COLUMNS, _BOUND, strict=True)))
    .values(used=bindparam("b_used"))
)


def _rows(charge: Charge, day: date) -> list[_Row]:
    return [(charge.caller.tenant, charge.caller.api_key_id, key_id, day) for key_id in dict.fromkeys(charge.key_ids)]


def _locked(connection: Connection, rows: Sequence[_Row]) -> dict[_Row, int]:
    """What is used on each row, made if it is missing and locked until the transaction ends."""
    if not rows:
        return {}
    names = ("tenant_id", "api_key_id", "key_id", "day")
    fresh = [dict(zip(names, row, strict=True)) | {"used": 0} for row in rows]
    # On SQLite this takes the write lock, so that what is read next cannot change.
    connection.execute(_INSERT[connection.dialect.name](_TABLE).on_conflict_do_nothing(), fresh)
    query = select(*_COLUMNS, _TABLE.c.used).where(tuple_(*_COLUMNS).in_(rows)).order_by(*_COLUMNS).with_for_update()
    return {(found[0], found[1], found[2], found[3]): found[4] for found in connection.execute(query)}


def _event(charge: Charge, granted: bool) -> dict[str, Any]:
    detail: dict[str, Any] = {"keys": list(charge.key_ids), "texts": charge.texts}
    if not granted:
        detail["refused"] = True
    return {
        "at": datetime.now(UTC),
        "tenant_id": charge.caller.tenant,
        "api_key_id": charge.caller.api_key_id,
        "action": charge.action,
        "subject": charge.subject,
        "detail": detail,
    }


def _settle(answer: asyncio.Future[bool], granted: bool | None) -> None:
    if answer.cancelled():
        return
    if granted is None:
        answer.set_exception(RuntimeError("the database did not take the charge"))
    else:
        answer.set_result(granted)
