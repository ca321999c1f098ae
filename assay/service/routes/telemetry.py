"""/v1/telemetry: detection rates by day, with differential privacy and from a budget; there are no others."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException
from fastapi import Path as InPath
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from assay.privacy.errors import BudgetError
from assay.service import audit
from assay.service.access import Administers, Shared
from assay.service.auth import Caller
from assay.service.bodies import described, json_body
from assay.service.errors import responses
from assay.service.state import State
from assay.service.telemetry import ConflictError, Standing, Telemetry

router = APIRouter(prefix="/v1/telemetry", tags=["telemetry"], responses=responses(409))


def _day(text: object) -> date:
    # pydantic alone also takes seconds since 1970, and dates in other notations.
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ValueError("a day is written YYYY-MM-DD")
    return date.fromisoformat(text)


Epsilon = Annotated[float, Field(ge=1e-6, le=100, allow_inf_nan=False)]


class NewBudget(BaseModel):
    """What may be spent in total, ever."""

    model_config = ConfigDict(extra="forbid")
    epsilon: Epsilon


class Ask(BaseModel):
    """How a day is published.

    Attributes
    ----------
    epsilon
        What the day costs; less is noisier.
    level
        A document counts for a key if its p-value is at most this.
    """

    model_config = ConfigDict(extra="forbid")
    epsilon: Epsilon = 0.1
    level: Annotated[float, Field(ge=1e-12, lt=1, allow_inf_nan=False)] = 1e-4


class Spending(BaseModel):
    """The budget, in epsilon, for adding or removing one document, which is one row of one job."""

    epsilon: float
    spent: float
    remaining: float

    @classmethod
    def of(cls, standing: Standing) -> Spending:
        """From the ledger."""
        return cls(**vars(standing))


class Rate(BaseModel):
    """Noisy figures of one key; the interval covers the noise, for all figures of the day at once."""

    flagged: int
    rate: float | None
    low: float
    high: float


class Day(BaseModel):
    """Figures of one day (UTC). Counts are noisy and may be below 0.

    Attributes
    ----------
    half_width
        Every count is within this of the truth with probability `confidence`, all at once.
    """

    day: date
    epsilon: float
    level: float
    documents: int
    detectors: dict[str, Rate]
    half_width: int
    confidence: float


class Published(BaseModel):
    """All that was published."""

    budget: Spending | None
    days: list[Day]


@router.get("")
def read(shared: Shared, caller: Administers) -> Published:
    """What was published, and what of the budget is left."""
    telemetry = _of(shared, caller)
    standing = telemetry.standing()
    budget = None if standing is None else Spending.of(standing)
    return Published(budget=budget, days=[Day(**one) for one in telemetry.days()])


@router.put("/budget", status_code=201, openapi_extra=described(NewBudget))
def grant(shared: Shared, caller: Administers, wanted: Annotated[NewBudget, Depends(json_body(NewBudget))]) -> Spending:
    """Set the budget, once."""
    try:
        standing = _of(shared, caller).grant(wanted.epsilon)
    except ConflictError as error:
        raise HTTPException(409, str(error)) from None
    audit.record(shared.sessions, caller, "telemetry.budget", None, epsilon=str(wanted.epsilon))
    return Spending.of(standing)


@router.post("/days/{day}", openapi_extra=described(Ask))
def publish(
    shared: Shared,
    caller: Administers,
    day: Annotated[date, BeforeValidator(_day), InPath(description="A day that is over, UTC.")],
    wanted: Annotated[Ask, Depends(json_body(Ask))],
) -> Day:
    """Publish the figures of a day; asked again, they are the same and cost nothing. 409 if the budget is used up."""
    keys = [info.id for info in shared.keys.infos(caller.tenant) if info.config.purpose == "watermark"]
    try:
        found = _of(shared, caller).publish(day, keys, epsilon=wanted.epsilon, level=wanted.level)
    except (ConflictError, BudgetError) as error:
        raise HTTPException(409, str(error)) from None
    audit.record(shared.sessions, caller, "telemetry.publish", day.isoformat(), epsilon=str(wanted.epsilon))
    return Day(**found)


def _of(shared: State, caller: Caller) -> Telemetry:
    return Telemetry(shared.sessions, shared.settings.data, caller.tenant)
