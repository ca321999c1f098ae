"""kill -9 at random moments of job workers, of the server, and of everything at once, while `assay serve` works.

Jobs end with the bytes of a run that nobody disturbed; what was answered is in the database and in the privacy ledger.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from serve_process import LIMIT_S, Server, gone
from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from assay.service import audit, jobs
from assay.service.auth import create_api_key
from assay.service.settings import Settings
from assay.service.state import open_database

TEXT = "The assayer weighs what the founder has cast, and the stamp says what the scales have found."
Opened = tuple[Engine, sessionmaker[Any]]


def corpus(documents: int) -> bytes:
    return b"".join(json.dumps({"id": i, "text": f"{TEXT} {i} {i * i}"}).encode() + b"\n" for i in range(documents))


def submit(server: Server, documents: int) -> str:
    """A job of shards of two documents each; the rate of false discoveries is that of runs that flag any of them."""
    answer = server.client.post("/v1/jobs?shard_rows=2&id_column=id&fdr=1e-9", content=corpus(documents))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ledger_rows(server: Server, job: str) -> list[dict[str, Any]]:
    """Whole rows of the run's ledger: a kill may leave half of one at the end."""
    manifest = server.data / "jobs" / job / "run" / "ledger" / "manifest.jsonl"
    rows = []
    with contextlib.suppress(OSError):
        for line in manifest.read_bytes().split(b"\n"):
            with contextlib.suppress(orjson.JSONDecodeError):
                rows.append(orjson.loads(line))
    return rows


def shards(server: Server, job: str) -> int:
    return sum(row["kind"] == "shard" for row in ledger_rows(server, job))


def holder(sessions: sessionmaker[Any], job: str) -> int | None:
    """The process id of the live worker that has the job."""
    found = jobs.find(sessions, "default", job)
    assert found is not None
    if found.state != jobs.RUNNING or found.lease_owner is None:
        return None
    pid = int(found.lease_owner.split("-")[0])
    return None if gone(pid) else pid


def at_shard(server: Server, sessions: sessionmaker[Any], job: str, wanted: int, pause: float) -> int | None:
    """Wait until a live worker has written so many shards, and a little longer; its process id. None: the job ended."""
    server.wait_for(
        lambda: (
            server.state(job) in jobs.TERMINAL or (shards(server, job) >= wanted and holder(sessions, job) is not None)
        )
    )
    time.sleep(pause)
    return holder(sessions, job)


def results(server: Server, job: str) -> bytes:
    """The results as a caller gets them, once the job has ended well."""
    server.wait_for(lambda: server.state(job) in jobs.TERMINAL)
    assert server.state(job) == jobs.FINISHED
    return server.client.get(f"/v1/jobs/{job}/results").content


def hold(server: Server, job: str, documents: int, undisturbed: bytes) -> None:
    """Every document once, in order; every shard in the ledger once; the bytes of a run that nobody disturbed."""
    found = results(server, job)
    rows = [orjson.loads(line) for line in found.splitlines()]
    assert [row["doc_id"] for row in rows] == [str(i) for i in range(documents)]
    assert found == undisturbed
    progress = server.client.get(f"/v1/jobs/{job}").json()["progress"]
    assert progress == {"documents": documents, "flagged": 0, "rejects": 0}
    entered = Counter(row["shard"] for row in ledger_rows(server, job) if row["kind"] == "shard")
    assert len(entered) == documents // 2
    assert set(entered.values()) == {1}


def kill_workers(server: Server, sessions: sessionmaker[Any], job: str, moments: list[int], rng: Any) -> list[int]:
    """kill -9 of whoever has the job, each time it has come so far; how far it was then."""
    seen = []
    for wanted in moments:
        victim = at_shard(server, sessions, job, wanted, float(rng.uniform(0, 0.1)))
        if victim is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        seen.append(shards(server, job))
    return seen


def test_kill_of_workers_and_of_everything(serve: Callable[..., Server]) -> None:
    """One worker is killed and the other takes the job over; then all is killed, and a new server ends it."""
    documents, rng = 240, np.random.default_rng(1)  # long enough for the kills to come before its end
    server = serve("--job-workers", "2", ASSAY_LEASE_SECONDS="2")
    server.client.post("/v1/keys", json={})
    engine, sessions = open_database(Settings(data=server.data))
    undisturbed = results(server, submit(server, documents))
    job = submit(server, documents)
    seen = kill_workers(server, sessions, job, [int(rng.integers(0, 10))], rng)
    at_shard(server, sessions, job, seen[-1] + int(rng.integers(1, 5)), 0.0)
    server.kill_all()
    seen.append(shards(server, job))
    assert all(0 <= count < documents // 2 for count in seen), seen
    again = serve("--job-workers", "1", ASSAY_LEASE_SECONDS="2")
    hold(again, job, documents, undisturbed)
    engine.dispose()


def test_a_lost_or_doubled_document_is_seen(tmp_path: Path) -> None:
    """The near-misses that `hold` rejects: a shard done twice, a document lost, and one doubled."""

    class Told:
        def __init__(self, lines: list[bytes], entered: list[int]) -> None:
            self.data, self.client = tmp_path, self
            self.lines, ledger = lines, tmp_path / "jobs" / "j" / "run" / "ledger"
            ledger.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"kind": "shard", "shard": one}) for one in entered]
            (ledger / "manifest.jsonl").write_text("\n".join(rows) + "\n")

        def wait_for(self, what: Callable[[], bool]) -> None:
            assert what()

        def state(self, job: str) -> str:
            return jobs.FINISHED

        def get(self, path: str) -> httpx.Response:
            if path.endswith("results"):
                return httpx.Response(200, content=b"\n".join(self.lines))
            progress = {"documents": 4, "flagged": 0, "rejects": 0}
            return httpx.Response(200, json={"progress": progress})

    lines = [b'{"doc_id":"%d"}' % i for i in range(4)]
    hold(Told(lines, [0, 1]), "j", 4, b"\n".join(lines))  # type: ignore[arg-type]
    for bad, entered in ((lines, [0, 1, 1]), (lines[:3], [0, 1]), ([*lines, lines[3]], [0, 1]), (lines, [0])):
        with pytest.raises(AssertionError):
            hold(Told(bad, entered), "j", 4, b"\n".join(bad))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_kill_of_workers_loses_and_doubles_nothing(serve: Callable[..., Server], database_url: str, seed: int) -> None:
    """Five kills: as the ledger begins, three in the middle, and when every shard is there but not the results.

    The attempts of a job that comes further are no failures: there are as many kills as a job may fail.
    """
    documents, rng = 300, np.random.default_rng(seed)
    server = serve("--job-workers", "2", "--database-url", database_url, ASSAY_LEASE_SECONDS="3")
    server.client.post("/v1/keys", json={})
    engine, sessions = open_database(Settings(data=server.data, database_url=database_url))
    undisturbed = results(server, submit(server, documents))
    job = submit(server, documents)
    moments = [0, *sorted(int(one) for one in rng.integers(1, documents // 2 - 30, 3)), documents // 2]
    seen = kill_workers(server, sessions, job, moments, rng)
    assert sum(0 < count < documents // 2 for count in seen) >= 2, seen  # kills fell in the middle
    hold(server, job, documents, undisturbed)
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_kill_of_the_server_in_a_job(serve: Callable[..., Server], database_url: str, processes: str) -> None:
    """kill -9 of the server alone, then of everything, then of the server again: each new one takes the job on.

    Its server processes and workers end by themselves, and each new one starts at once at the same port.
    """
    documents, rng = 300, np.random.default_rng(4)
    options = ("--database-url", database_url, "--processes", processes)
    server = serve(*options, ASSAY_LEASE_SECONDS="2")
    server.client.post("/v1/keys", json={})
    engine, sessions = open_database(Settings(data=server.data, database_url=database_url))
    undisturbed = results(server, submit(server, documents))
    started = [submit(server, documents)]
    seen = []
    for everything in (False, True, False):
        if shards(server, started[-1]) == documents // 2:  # it ended between two kills: another one takes its place
            started.append(submit(server, documents))
        job = started[-1]
        at_shard(server, sessions, job, shards(server, job) + int(rng.integers(1, 25)), float(rng.uniform(0, 0.1)))
        family = server.children(".")
        assert len(family) >= (1 if processes == "1" else 3)
        server.kill_all() if everything else server.kill()
        seen.append(shards(server, job))
        server = serve(*options, port=server.port, ASSAY_LEASE_SECONDS="2")
        server.wait_for(lambda family=family: all(gone(pid) for pid in family))  # type: ignore[misc]
    engine.dispose()
    assert sum(0 < count < documents // 2 for count in seen) >= 2, seen
    for job in started:
        hold(server, job, documents, undisturbed)


@pytest.mark.slow
def test_kill_of_the_server_in_an_upload(serve: Callable[..., Server]) -> None:
    """kill -9 in the middle of an upload: no half job; its workers end; a restart takes the same upload again."""
    server = serve()
    server.client.post("/v1/keys", json={})
    workers = server.workers()
    token = server.client.headers["authorization"]
    sent, first = threading.Event(), b'{"text": "first line"}\n' * 2000

    def upload() -> None:
        def pieces() -> Iterator[bytes]:
            yield first
            sent.set()
            time.sleep(LIMIT_S)
            yield b'{"text": "last"}\n'

        with contextlib.suppress(httpx.TransportError):
            url = f"http://127.0.0.1:{server.port}/v1/jobs"
            headers = {"authorization": token, "idempotency-key": "one"}
            httpx.post(url, content=pieces(), headers=headers, timeout=LIMIT_S)

    threading.Thread(target=upload, daemon=True).start()
    assert sent.wait(LIMIT_S)
    server.wait_for(lambda: any((server.data / "jobs").glob("job-*/corpus.jsonl")))
    server.kill()
    server.wait_for(lambda: all(gone(pid) for pid in workers))
    again = serve()
    assert again.client.get("/v1/jobs").json() == {"jobs": []}
    answer = again.client.post("/v1/jobs", content=corpus(40), headers={"idempotency-key": "one"})
    assert answer.status_code == 202
    again.wait_for(lambda: again.state(answer.json()["id"]) == "finished")


EPSILON = "0.001"
FIRST_DAY = date(2001, 1, 1)


class Clients:
    """Clients that detect, make keys and publish days until the server is gone; what was answered to them."""

    def __init__(self, server: Server, reader: str, days: Iterator[int]) -> None:
        self.detections = 0
        self.keys: list[str] = []
        self.days: dict[str, Any] = {}
        self._server = server
        self._lock = threading.Lock()
        admin = server.client.headers["authorization"]
        tasks: list[tuple[str, Callable[[httpx.Client], None]]] = [(f"Bearer {reader}", self._detect)] * 6
        tasks += [(admin, self._make_key), (admin, lambda client: self._publish(client, next(days)))]
        self._threads = [threading.Thread(target=self._repeat, args=task) for task in tasks]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()

    def _repeat(self, authorization: str, ask: Callable[[httpx.Client], None]) -> None:
        base = f"http://127.0.0.1:{self._server.port}"
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.Client(base_url=base, headers={"authorization": authorization}, timeout=LIMIT_S) as client,
        ):
            while True:
                ask(client)

    def _detect(self, client: httpx.Client) -> None:
        answer = client.post("/v1/detect", json={"text": TEXT, "keys": ["k"]})
        assert answer.status_code == 200, answer.text
        with self._lock:
            self.detections += 1

    def _make_key(self, client: httpx.Client) -> None:
        answer = client.post("/v1/keys", json={})
        assert answer.status_code == 201, answer.text
        self.keys.append(answer.json()["id"])
        time.sleep(0.05)  # a few are enough

    def _publish(self, client: httpx.Client, day: int) -> None:
        name = (FIRST_DAY + timedelta(days=day)).isoformat()
        answer = client.post(f"/v1/telemetry/days/{name}", content=f'{{"epsilon": {EPSILON}}}')
        assert answer.status_code == 200, answer.text
        self.days[name] = answer.json()


def keeps_what_it_answered(serve: Callable[..., Server], database_url: str, kills: list[bool], seed: int) -> None:
    """Clients work, all or the server alone is killed; a new one knows whatever was answered, round after round."""
    rng, days = np.random.default_rng(seed), itertools.count()
    options = ("--job-workers", "0", "--database-url", database_url)
    limits = {"ASSAY_DETECTIONS_PER_KEY_PER_DAY": "1000000"}
    server = serve(*options, **limits)
    server.client.post("/v1/keys", json={"id": "k"}).raise_for_status()
    server.client.put("/v1/telemetry/budget", json={"epsilon": 100}).raise_for_status()
    engine, sessions = open_database(Settings(data=server.data, database_url=database_url))
    api_key, token = create_api_key(sessions, "default", ["detect"])
    detections, keys, published = 0, {"k"}, dict[str, Any]()
    for round, everything in enumerate(kills, 1):
        clients = Clients(server, token, days)
        least = int(rng.integers(20, 60))
        server.wait_for(lambda: clients.detections >= least and len(clients.days) > 2)  # noqa: B023
        time.sleep(float(rng.uniform(0, 0.05)))
        server.kill_all() if everything else server.kill()
        clients.join()
        detections, keys, published = detections + clients.detections, keys | {*clients.keys}, published | clients.days
        server = serve(*options, **limits)

        # Detections: in the audit log, and spent from the budget; at most one under way for each client in a round.
        events = audit.events(sessions, "default", limit=1_000_000)
        logged = [one for one in events if one.action == "detect" and one.api_key_id == api_key]
        assert detections <= len(logged) <= detections + 6 * round
        with engine.connect() as connection:
            spent = connection.exec_driver_sql("SELECT api_key_id, used FROM budgets").all()
        assert [tuple(row) for row in spent] == [(api_key, len(logged))]
        # Keys: each is there, opens, and has its entry.
        known = {one["id"] for one in server.client.get("/v1/keys").json()["keys"]}
        assert keys <= known
        entered = [
            one.subject for one in audit.events(sessions, "default", limit=1_000_000) if one.action == "keys.create"
        ]
        assert sorted(entered) == sorted(known)
        last = sorted(keys)[-1]
        assert server.client.post("/v1/detect", json={"text": TEXT, "keys": [last]}).status_code == 200
        # Days: asked again they are the same, and cost nothing; what was spent covers every day that was answered.
        for name, figures in published.items():
            again = server.client.post(f"/v1/telemetry/days/{name}", content=f'{{"epsilon": {EPSILON}}}')
            assert again.json() == figures
        told = server.client.get("/v1/telemetry").json()
        assert published.keys() <= {one["day"] for one in told["days"]}
        costs = Fraction(repr(told["budget"]["spent"])) / Fraction(EPSILON)
        assert len(published) <= round_half(costs) <= len(published) + round
    engine.dispose()


def round_half(costs: Fraction) -> int:
    """The whole number that a quotient of decimals is meant to be."""
    whole = round(costs)
    assert abs(costs - whole) < Fraction(1, 10**6)
    return whole


def test_what_was_answered_survives_a_kill(serve: Callable[..., Server], tmp_path: Path) -> None:
    keeps_what_it_answered(serve, f"sqlite:///{tmp_path / 'test.db'}", [True], seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [6, 7])
def test_what_was_answered_survives_kills(serve: Callable[..., Server], database_url: str, seed: int) -> None:
    keeps_what_it_answered(serve, database_url, [False, True, False], seed)
