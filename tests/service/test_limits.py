"""Limits: bodies, rates, rounding that never overstates, and budgets that are exact under concurrency."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from fastapi import HTTPException
from hypothesis import example, given
from hypothesis import strategies as st
from service_app import Service
from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from assay.service import audit, limits
from assay.service.accounts import Charge, OracleGuard
from assay.service.auth import Caller
from assay.service.limits import STRONGEST, RateLimiter, rounded
from assay.service.routes import detect
from assay.service.routes import jobs as job_routes
from assay.service.settings import Settings

LN10 = math.log(10.0)
DETECT = Caller("acme", "aaaabbbbccccdddd", frozenset({"detect"}))
KEYS = Caller("acme", "eeeeffffgggghhhh", frozenset({"detect", "keys"}))


@given(st.floats(max_value=0.0, allow_nan=False))
@example(-math.inf)
@example(0.0)
@example(-3 * LN10)
@example(math.nextafter(-3 * LN10, 0))
@example(-3 * LN10 + 1e-12)
@example(math.log(1e-3))
@example(math.nextafter(math.log(1e-9), 0))
def test_rounded_pvalues_never_overstate(log_p: float) -> None:
    told = rounded(log_p, DETECT, up=True)
    assert told >= log_p
    assert -STRONGEST * LN10 <= told <= 0.0
    assert abs(told / LN10 - round(told / LN10)) < 1e-12
    # As close as whole powers of ten allow, give or take the last bit: rounding everything to 1 would be safe as well.
    assert told <= max(log_p, -STRONGEST * LN10) + LN10 * (1 + 1e-9)
    assert rounded(log_p, KEYS, up=True) == log_p


@given(st.floats(allow_nan=False))
@example(-math.inf)
@example(math.inf)
@example(-1e-320)
@example(math.nextafter(3 * LN10, 0))
def test_rounded_evalues_never_overstate(log_e: float) -> None:
    told = rounded(log_e, DETECT, up=False)
    assert told <= log_e
    assert told <= STRONGEST * LN10
    assert told == -math.inf if log_e < 0 else told >= min(log_e, STRONGEST * LN10) - LN10 * (1 + 1e-9)
    assert rounded(log_e, KEYS, up=False) == log_e


def test_rounding_to_the_nearest_would_overstate() -> None:
    """The near-miss that the properties reject: p = 10^-2.7 told as 10^-3."""
    log_p = -2.7 * LN10
    assert round(log_p / LN10) * LN10 < log_p
    assert rounded(log_p, DETECT, up=True) == -2 * LN10


def test_token_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    rates = RateLimiter(per_second=2.0, burst=3)
    assert [rates.wait("a") for _ in range(3)] == [0.0, 0.0, 0.0]
    assert rates.wait("a") == pytest.approx(0.5)
    assert rates.wait("b") == 0.0  # a bucket of its own
    now[0] += 0.5
    assert rates.wait("a") == 0.0
    assert rates.wait("a") > 0
    now[0] += 1000
    assert [rates.wait("a") > 0 for _ in range(4)] == [False, False, False, True]  # never more than the burst


def spend(guard: OracleGuard, caller: Caller, keys: list[str], texts: int = 1) -> bool:
    """Whether this is granted."""
    (granted,) = guard.charge_all([Charge(caller, tuple(keys), texts)])
    return granted


@pytest.mark.parametrize("threads", [8])
def test_budget_is_exact_under_concurrency(engine: Engine, threads: int) -> None:
    """Eight connections spend on two keys in both orders; exactly the budget is granted, and none waits for ever."""
    guard = OracleGuard(engine, per_day=50)
    granted: list[int] = []
    gate = threading.Barrier(threads)

    def work(worker: int) -> None:
        gate.wait()
        keys = ["k1", "k2"] if worker % 2 else ["k2", "k1"]
        granted.extend(2 * spend(guard, DETECT, keys, 2) for _ in range(6))

    running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert sum(granted) == 50
    assert not spend(guard, DETECT, ["k1"])
    assert not spend(guard, DETECT, ["k2"])


def test_a_huge_charge_is_refused_and_overflows_nothing(engine: Engine) -> None:
    guard = OracleGuard(engine, per_day=10**9)
    assert spend(guard, DETECT, ["k"], 10**9 - 1)
    assert guard.charge_all([Charge(DETECT, ("k",), 2**62, "a"), Charge(DETECT, ("k",), 1, "b")]) == [False, True]
    assert not spend(guard, DETECT, ["k"], 1)


def test_a_budget_fits_its_column() -> None:
    assert Settings(detections_per_key_per_day=10**9)
    for bad in (0, 10**9 + 1):
        with pytest.raises(ValueError, match="detections_per_key_per_day"):
            Settings(detections_per_key_per_day=bad)


def test_all_or_none_is_spent(engine: Engine) -> None:
    guard = OracleGuard(engine, per_day=5)
    assert spend(guard, DETECT, ["k1"], 4)
    assert not spend(guard, DETECT, ["k1", "k2"], 2)
    assert spend(guard, DETECT, ["k2"], 5)  # the refused one took nothing from k2
    assert spend(guard, DETECT, ["k1"], 1)
    assert not spend(guard, DETECT, ["k3"], 6)
    assert spend(guard, Caller("other", DETECT.api_key_id, DETECT.scopes), ["k1"], 5)  # a budget of its own
    assert all(spend(guard, KEYS, ["k1"], 1000) for _ in range(3))  # who holds the keys has none


def test_a_group_is_charged_in_order(engine: Engine, made_sessions: sessionmaker[Any]) -> None:
    guard = OracleGuard(engine, per_day=3)
    charges = [Charge(DETECT, ("k",), 2, "detect"), Charge(DETECT, ("k",), 2, "detect"), Charge(DETECT, ("k",), 1, "x")]
    charges.append(Charge(KEYS, ("k",), 100, "detect"))
    assert guard.charge_all(charges) == [True, False, True, True]
    logged = [(event.action, event.detail) for event in audit.events(made_sessions, "acme")]
    assert logged == [
        ("detect", {"keys": ["k"], "texts": 2}),
        ("detect", {"keys": ["k"], "texts": 2, "refused": True}),
        ("x", {"keys": ["k"], "texts": 1}),
        ("detect", {"keys": ["k"], "texts": 100}),
    ]


def test_concurrent_charges_share_transactions_and_lose_nothing(
    engine: Engine, made_sessions: sessionmaker[Any]
) -> None:
    guard = OracleGuard(engine, per_day=70)
    transactions = 0
    all_at_once = guard.charge_all

    def counted(charges: Any) -> list[bool]:
        nonlocal transactions
        transactions += 1
        return all_at_once(charges)

    guard.charge_all = counted  # type: ignore[method-assign]

    async def many() -> list[bool]:
        return await asyncio.gather(*(guard.charge(Charge(DETECT, ("k",), 1, "detect")) for _ in range(100)))

    granted = asyncio.run(many())
    guard.close()
    assert sum(granted) == 70
    assert transactions == 1  # those of one turn of the event loop go together
    events = audit.events(made_sessions, "acme", limit=1000)
    assert len(events) == 100
    assert sum("refused" in event.detail for event in events) == 30
    assert asyncio.run(guard.charge(Charge(DETECT, ("k",), 1, "detect"))) is False  # a closed writer starts again
    guard.close()


def test_a_charge_that_is_not_written_is_not_granted(engine: Engine) -> None:
    guard = OracleGuard(engine, per_day=70)

    def broken(charges: Any) -> list[bool]:
        raise OSError("disk full")

    guard.charge_all = broken  # type: ignore[method-assign]
    with pytest.raises(Exception, match="charge"):
        asyncio.run(guard.charge(Charge(DETECT, ("k",), 1, "detect")))
    guard.close()


# Over HTTP


def test_bodies_above_the_limit(start: Callable[..., Service]) -> None:
    service = start(max_body_bytes=10_000)
    headers = service.headers()
    service.key(headers)
    fits = b'{"text":"' + b"a" * 9900 + b'"}'
    assert service.client.post("/v1/detect", content=fits, headers=headers).status_code == 200

    def pieces(size: int = 1000, count: int = 100) -> Iterator[bytes]:
        for _ in range(count):
            yield b"a" * size

    stated = service.client.post("/v1/detect", content=b"a" * 10_001, headers=headers)
    chunked = service.client.post("/v1/detect", content=pieces(), headers=headers)
    unknown = service.client.post("/v1/keys", content=pieces())  # without a key as well
    for answer in (stated, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"] == "body_too_large"
        assert "aaaa" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert unknown.status_code in (401, 413)


def test_uploads_and_lines_above_the_limit(start: Callable[..., Service]) -> None:
    service = start(max_body_bytes=10_000, max_upload_bytes=20_000)
    headers = service.headers()
    service.key(headers)
    answer = service.client.post("/v1/jobs", content=b"x" * 20_001, headers=headers)
    assert answer.status_code == 413
    assert list((service.settings.data / "jobs").iterdir()) == []
    # A line is read whole: its length is limited, however many lines there may be, and wherever pieces end.
    line = b'{"text":"' + b"a" * 9_000 + b'"}\n'
    assert service.client.post("/v1/jobs", content=line * 2, headers=headers).status_code == 202
    answer = service.client.post("/v1/jobs", content=line + b"x" * 10_001, headers=headers)
    assert answer.status_code == 413
    assert "a line of the corpus must be at most 10000 bytes" in answer.json()["detail"]
    assert len(list((service.settings.data / "jobs").iterdir())) == 1
    answer = service.client.post("/v1/detect/stream", content=b'{"text":"a"}\n' + b"x" * 10_001, headers=headers)
    lines = answer.text.splitlines()
    assert "verdict" in lines[0]
    assert "the stream ends here" in lines[-1]


def test_texts_above_the_limit(start: Callable[..., Service]) -> None:
    service = start(max_text_characters=100, max_batch=2)
    headers = service.headers()
    service.key(headers)
    post = service.client.post
    assert post("/v1/detect", json={"text": "b" * 100}, headers=headers).status_code == 200
    long = post("/v1/detect", json={"text": "b" * 101}, headers=headers)
    batch = post("/v1/detect/batch", json={"texts": ["a", "b" * 101]}, headers=headers)
    many = post("/v1/detect/batch", json={"texts": ["a"] * 3}, headers=headers)
    for answer in (long, batch, many):
        assert answer.status_code == 422
        assert "bbb" not in answer.text
    logged = [event.action for event in audit.events(service.state.sessions, "acme")]
    assert logged == ["keys.create", "detect"]  # what is refused used no key


@pytest.mark.parametrize(
    ("pieces", "longest", "lines"),
    [
        ([b"ab\ncd"], 2, 2),
        ([b"ab\nc", b"d\n", b"", b"e"], 2, 3),
        ([b"\n\n"], 0, 3),
        ([b"a", b"bc\n"], 3, 2),
        ([b"a\nb", b"c", b"d\ne"], 3, 3),
        ([b"\nabc\n"], 3, 3),
    ],
)
def test_lines_are_counted_wherever_pieces_end(tmp_path: Path, pieces: list[bytes], longest: int, lines: int) -> None:
    async def given() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    def store(name: str, most: int) -> tuple[str, int]:
        # Settings refuse 0 bytes.
        settings = SimpleNamespace(max_upload_bytes=100, max_body_bytes=most)
        return asyncio.run(job_routes._store(given(), tmp_path / name / "corpus", settings))  # type: ignore[arg-type]

    digest, counted = store("fits", longest)
    assert counted == lines
    assert (tmp_path / "fits" / "corpus").read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()
    with pytest.raises(HTTPException, match="413"):
        store("too long", longest - 1)


@pytest.mark.parametrize(("texts", "in_the_loop"), [(["brief"] * 4, True), (["a word and " * 500] * 5, False)])
@pytest.mark.parametrize("how", ["batch", "stream"])
def test_many_texts_do_not_stop_the_other_requests(
    service: Service, monkeypatch: pytest.MonkeyPatch, texts: list[str], in_the_loop: bool, how: str
) -> None:
    """Each is short enough for the event loop; together they are only if they are short together."""
    headers = service.headers()
    service.key(headers)
    threads = []
    tested = detect.detect

    def noted(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return tested(*given, **named)

    monkeypatch.setattr(detect, "detect", noted)
    if how == "batch":
        answer = service.client.post("/v1/detect/batch", json={"texts": texts}, headers=headers)
        assert len(answer.json()["verdicts"]) == len(texts)
    else:
        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
        answer = service.client.post("/v1/detect/stream", content=lines, headers=headers)
        assert answer.text.count('"verdict"') == len(texts)
    loop = {thread.name for thread in threads if not thread.name.startswith("AnyIO worker")}
    assert len(threads) == len(texts)
    assert bool(loop) is in_the_loop


def test_callers_that_are_too_quick(start: Callable[..., Service]) -> None:
    service = start(requests_per_second=0.5, burst=2)
    headers = service.headers()
    statuses = [service.client.get("/v1/jobs", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[2].headers["retry-after"]) <= 2
    assert service.client.get("/v1/jobs", headers=service.headers()).status_code == 200


def test_the_oracle_guard(start: Callable[..., Service]) -> None:
    service = start(detections_per_key_per_day=5)
    admin, detect = service.headers(), service.headers("acme", "detect")
    service.key(admin)
    post = service.client.post
    text = "The office assays the metal and stamps it. " * 30
    answer = post("/v1/detect", json={"text": text}, headers=detect)
    assert answer.json()["rounded"] is True
    assert math.log10(answer.json()["pvalue"]) == pytest.approx(round(math.log10(answer.json()["pvalue"])))
    exact = post("/v1/detect", json={"text": text}, headers=admin).json()
    assert exact["rounded"] is False
    assert exact["pvalue"] <= answer.json()["pvalue"]
    assert post("/v1/detect/batch", json={"texts": ["a"] * 5}, headers=detect).status_code == 429  # 4 are left
    assert post("/v1/detect/batch", json={"texts": ["a"] * 2}, headers=detect).status_code == 200
    lines = post("/v1/detect/stream", content=b'{"text":"a"}\n' * 4, headers=detect).text.splitlines()
    assert ["verdict" in line for line in lines] == [True, True, False, False]
    refused = post("/v1/detect", json={"text": "a"}, headers=detect)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    job = post("/v1/jobs", content=b'{"text":"a"}\n', headers=detect)
    assert job.status_code == 429  # a corpus is no way around
    assert post("/v1/detect", json={"text": "a"}, headers=admin).status_code == 200


@pytest.mark.parametrize(("fdr", "status"), [(0.01, 202), (1e-9, 202), (0.0123, 422), (1e-10, 422)])
def test_levels_of_flags_are_as_coarse_as_evidence(service: Service, fdr: float, status: int) -> None:
    service.key(service.headers())
    answer = service.client.post(
        f"/v1/jobs?fdr={fdr}", content=b'{"text":"a"}', headers=service.headers("acme", "detect")
    )
    assert answer.status_code == status
    assert service.client.post("/v1/jobs?fdr=0.0123", content=b'{"text":"a"}', headers=service.headers()).is_success
