"""Budgets and the audit log of detections: charged together, in groups, before the keys are used.

Every detection is charged in a transaction that is committed before its text is tested, so what was answered is in the
log whenever the process is killed. Requests that came at the same time share one transaction (group commit): a
transaction costs about as much CPU as testing a text, and one more charge in it costs nearly nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from queue import Empty, SimpleQueue
from typing import Any, Final

from sqlalchemy import Connection, Engine, bindparam, insert, update
from sqlalchemy.dialects import postgresql, sqlite

from assay.service.auth import Caller
from assay.service.database import AuditEvent, Budget

_LOG = logging.getLogger("assay.service")
_GROUP: Final = 256  # charges after which a transaction takes no more
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
        self._gathered: list[_Waiting] = []
        self._waiting: SimpleQueue[list[_Waiting] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def charge_all(self, charges: Sequence[Charge]) -> list[bool]:
        """Charge in order, in one transaction: whether each may be done. A refused one spends nothing and is logged."""
        with self._engine.begin() as connection:
            allowed = self._decide(connection, charges)
            events = [_event(one, granted) for one, granted in zip(charges, allowed, strict=True) if one.action]
            if events:
                connection.execute(_ADD_EVENTS, events)
        return allowed

    async def charge(self, charge: Charge) -> bool:
        """As `charge_all` for one, sharing the transaction with whoever waits at the same time."""
        if charge.action is None and charge.caller.may("keys"):
            return True
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bool] = loop.create_future()
        with self._lock:
            self._gathered.append((charge, loop, answer))
            first = len(self._gathered) == 1
        if first:  # the others that this turn of the loop brings come along
            loop.call_soon(self._hand_over)
        return await answer

    def close(self) -> None:
        """Write what waits, then end the writer."""
        self._hand_over()
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            self._waiting.put(None)
            writer.join()

    def _hand_over(self) -> None:
        """Give what was gathered to the writer, which is started if there is none."""
        with self._lock:
            gathered, self._gathered = self._gathered, []
            if not gathered:
                return
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="assay-accounts", daemon=True)
                self._writer.start()
            self._waiting.put(gathered)

    def _write(self) -> None:
        while (group := self._waiting.get()) is not None:
            last = False
            with contextlib.suppress(Empty):
                while len(group) < _GROUP and not last:
                    more = self._waiting.get_nowait()
                    last = more is None
                    group = group + (more or [])
            try:
                granted: Sequence[bool | None] = self.charge_all([charge for charge, _, _ in group])
            except Exception as error:
                _LOG.error("detections could not be charged: %s", type(error).__name__)
                granted = [None] * len(group)
            _answer(group, granted)
            if last:
                return

    def _decide(self, connection: Connection, charges: Sequence[Charge]) -> list[bool]:
        today = datetime.now(UTC).date()
        rows = [[] if one.caller.may("keys") else _rows(one, today) for one in charges]
        wanted: defaultdict[_Row, int] = defaultdict(int)
        for one, its in zip(charges, rows, strict=True):
            for row in its:
                # Capped, so that no sum leaves the column's range.
                wanted[row] = min(wanted[row] + one.texts, self._per_day + 1)
        # Sorted: two servers that lock the same rows in one order cannot wait for each other.
        used = {row: _added(connection, row, wanted[row]) - wanted[row] for row in sorted(wanted)}
        if all(used[row] + texts <= self._per_day for row, texts in wanted.items()):
            return [True] * len(charges)
        # Too much together: decided one after the other, on rows that are locked until the transaction ends.
        allowed = []
        for one, its in zip(charges, rows, strict=True):
            granted = all(used[row] + one.texts <= self._per_day for row in its)
            if granted:
                for row in its:
                    used[row] += one.texts
            allowed.append(granted)
        connection.execute(_SET_USED, [dict(zip(_BOUND, row, strict=True)) | {"b_used": used[row]} for row in used])
        return allowed


_Waiting = tuple[Charge, asyncio.AbstractEventLoop, "asyncio.Future[bool]"]
_TABLE = Budget.__table__
_COLUMNS = (_TABLE.c.tenant_id, _TABLE.c.api_key_id, _TABLE.c.key_id, _TABLE.c.day)
_BOUND = ("b_tenant", "b_api_key", "b_key", "b_day")
# Statements are made once: to build one costs as much as to run it.
_SET_USED = (
    update(_TABLE)  # type: ignore[arg-type]  # a Table, which the declarative stubs call a FromClause
    .where(*(column == bindparam(name) for column, name in zip(_COLUMNS, _BOUND, strict=True)))
    .values(used=bindparam("b_used"))
)
_ADD_EVENTS = insert(AuditEvent.__table__)  # type: ignore[arg-type]


def _add_to(dialect: Any) -> Any:
    adding = dialect.insert(_TABLE)
    used = _TABLE.c.used + adding.excluded.used
    return adding.on_conflict_do_update(index_elements=list(_COLUMNS), set_={"used": used}).returning(_TABLE.c.used)


_ADD = {"sqlite": _add_to(sqlite), "postgresql": _add_to(postgresql)}


def _rows(charge: Charge, day: date) -> list[_Row]:
    return [(charge.caller.tenant, charge.caller.api_key_id, key_id, day) for key_id in dict.fromkeys(charge.key_ids)]


def _added(connection: Connection, row: _Row, texts: int) -> int:
    """What is used on a row with these texts; it is made if it is missing, and locked until the transaction ends."""
    values = dict(zip(("tenant_id", "api_key_id", "key_id", "day"), row, strict=True)) | {"used": texts}
    used: int = connection.execute(_ADD[connection.dialect.name], values).scalar_one()
    return used


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


def _answer(group: Sequence[_Waiting], granted: Sequence[bool | None]) -> None:
    """Wake whoever waits, each event loop once."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[bool], bool | None]]] = defaultdict(list)
    for (_, loop, answer), one in zip(group, granted, strict=True):
        by_loop[loop].append((answer, one))
    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(_settle, answers)


def _settle(answers: Sequence[tuple[asyncio.Future[bool], bool | None]]) -> None:
    for answer, granted in answers:
        if answer.cancelled():
            continue
        if granted is None:
            answer.set_exception(RuntimeError("the database did not take the charge"))
        else:
            answer.set_result(granted)
