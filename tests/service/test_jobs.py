"""Jobs: leases, takeover, cancelling, idempotency, failed corpora; results are those of a direct run."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from service_app import Service
from sqlalchemy.orm import sessionmaker

from assay.detection.corpus import run
from assay.service import jobs, worker
from assay.service.auth import Authenticator, Caller, create_api_key
from assay.service.database import Job
from assay.service.worker import work

TEXT = "The assayer weighs what the founder has cast, and the stamp says what the scales have found."
ROWS = [{"id": f"doc-{i}", "text": f"{TEXT} {i} " * (1 + i % 3)} for i in range(60)]
CORPUS = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
# Keys are random: unmarked documents are flagged in one of so many runs, which is the rate of false discoveries.
NEVER = 1e-9


@pytest.fixture
def caller(made_sessions: sessionmaker[Any]) -> Caller:
    found = Authenticator(made_sessions).caller(create_api_key(made_sessions, "acme", ["detect"])[1])
    assert found is not None
    return found


def queue(sessions: sessionmaker[Any], caller: Caller, number: int = 0, key: str | None = None, sha: str = "s") -> str:
    options = {"keys": ["k"], "fdr": 0.01, "id_column": None, "source_column": None, "shard_rows": 10}
    id = f"job-{number:024x}"
    jobs.submit(sessions, caller, id, options=options, request_sha256=sha, idempotency_key=key)
    return id


def state_of(sessions: sessionmaker[Any], id: str) -> Job:
    found = jobs.find(sessions, "acme", id)
    assert found is not None
    return found


# The queue, on both databases


def test_a_job_is_taken_once(made_sessions: sessionmaker[Any], caller: Caller) -> None:
    """Six workers and four jobs, at once: every job is taken by exactly one."""
    ids = {queue(made_sessions, caller, i) for i in range(4)}
    taken: list[str] = []
    gate = threading.Barrier(6)

    def take(name: str) -> None:
        gate.wait()
        while (job := jobs.claim(made_sessions, name, 60)) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=take, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == sorted(ids)


def test_leases(made_sessions: sessionmaker[Any], caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    id = queue(made_sessions, caller)
    now = [1000.0]
    monkeypatch.setattr(jobs.time, "time", lambda: now[0])  # type: ignore[attr-defined]
    first = jobs.claim(made_sessions, "first", 30)
    assert first is not None
    assert (first.id, first.state, first.attempts) == (id, jobs.RUNNING, 1)
    now[0] += 29
    assert jobs.claim(made_sessions, "second", 30) is None
    assert jobs.keep(made_sessions, id, "first", 30, {"documents": 3})
    now[0] += 29
    assert jobs.claim(made_sessions, "second", 30) is None  # renewed
    now[0] += 2
    second = jobs.claim(made_sessions, "second", 30)
    assert second is not None
    assert second.attempts == 2
    # The first has lost it: it can neither renew, nor end, nor put it back.
    assert not jobs.keep(made_sessions, id, "first", 30, {})
    assert not jobs.end(made_sessions, id, "first", jobs.FINISHED, progress={})
    assert not jobs.release(made_sessions, id, "first", progress={}, attempts=0)
    jobs.advanced(made_sessions, id, "first")
    assert state_of(made_sessions, id).attempts == 2
    jobs.advanced(made_sessions, id, "second")
    assert state_of(made_sessions, id).attempts == 1
    assert jobs.end(made_sessions, id, "second", jobs.FINISHED, progress={"documents": 5})
    assert jobs.claim(made_sessions, "third", 30) is None


def test_cancel(made_sessions: sessionmaker[Any], caller: Caller) -> None:
    waiting, running, ended = (queue(made_sessions, caller, i) for i in range(3))
    assert jobs.cancel(made_sessions, "other", waiting) is None
    assert state_of(made_sessions, waiting).state == jobs.QUEUED
    jobs.cancel(made_sessions, "acme", waiting)
    assert jobs.claim(made_sessions, "w", 30).id == running  # type: ignore[union-attr]
    jobs.cancel(made_sessions, "acme", running)
    assert not jobs.keep(made_sessions, running, "w", 30, {})
    assert not jobs.end(made_sessions, running, "w", jobs.FINISHED, progress={})
    assert jobs.claim(made_sessions, "w", 30).id == ended  # type: ignore[union-attr]
    jobs.end(made_sessions, ended, "w", jobs.FINISHED, progress={})
    assert jobs.cancel(made_sessions, "acme", ended).state == jobs.FINISHED  # type: ignore[union-attr]


def test_idempotency(made_sessions: sessionmaker[Any], caller: Caller) -> None:
    """One key, one job, also when eight requests come at once; another request under it is refused."""
    found: list[tuple[str, bool]] = []
    gate = threading.Barrier(8)

    def submit(i: int) -> None:
        gate.wait()
        options = {"keys": ["k"], "fdr": 0.01, "id_column": None, "source_column": None, "shard_rows": 10}
        job, fresh = jobs.submit(
            made_sessions, caller, f"job-{i:024x}", options=options, request_sha256="s", idempotency_key="once"
        )
        found.append((job.id, fresh))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({id for id, _ in found}) == 1
    assert sum(fresh for _, fresh in found) == 1
    with pytest.raises(ValueError, match="another request"):
        queue(made_sessions, caller, 99, key="once", sha="other")
    assert jobs.submitted(made_sessions, "other", "once") is None


# Over HTTP, with a worker in this process


def direct(service: Service, key_id: str, out: Path, fdr: float = 0.01) -> Any:
    """The same corpus by the library."""
    corpus = out.with_suffix(".jsonl")
    corpus.write_bytes(CORPUS)
    key = service.state.keys.key("acme", key_id)
    run(corpus, key, out=out, id_column="id", shard_rows=7, fdr=fdr, workers=1, progress=False)
    return parquet.read_table(out / "results.parquet").to_pylist()


def test_from_upload_to_results(service: Service, tmp_path: Path) -> None:
    headers = service.headers()
    key = service.key(headers)
    post, get = service.client.post, service.client.get
    once = {**headers, "idempotency-key": "again"}
    answer = post(f"/v1/jobs?id_column=id&shard_rows=7&fdr={NEVER}", content=CORPUS, headers=once)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["state"], job["keys"]) == ("queued", [key])
    repeated = post(f"/v1/jobs?id_column=id&shard_rows=7&fdr={NEVER}", content=CORPUS, headers=once)
    assert (repeated.status_code, repeated.json()["id"]) == (200, job["id"])
    assert post(f"/v1/jobs?id_column=id&shard_rows=8&fdr={NEVER}", content=CORPUS, headers=once).status_code == 409
    assert get(f"/v1/jobs/{job['id']}/results", headers=headers).status_code == 409
    assert [path.name for path in (service.settings.data / "jobs").iterdir()] == [job["id"]]
    assert work(service.state, once=True) == 1
    done = get(f"/v1/jobs/{job['id']}", headers=headers).json()
    assert (done["state"], done["error"]) == ("finished", None)
    assert done["progress"] == {"documents": 60, "flagged": 0, "rejects": 0}
    rows = [json.loads(line) for line in get(f"/v1/jobs/{job['id']}/results", headers=headers).text.splitlines()]
    expected = direct(service, key, tmp_path / "direct", NEVER)
    assert [row["doc_id"] for row in rows] == [row["id"] for row in ROWS]
    assert [row["log_pvalue"] for row in rows] == [row["log_pvalue"] for row in expected]
    assert [row["log_qvalue"] for row in rows] == [row["log_qvalue"] for row in expected]
    # Who may only detect sees rounded evidence.
    detect = service.headers("acme", "detect")
    coarse = [json.loads(line) for line in get(f"/v1/jobs/{job['id']}/results", headers=detect).text.splitlines()]
    for row, exact in zip(coarse, rows, strict=True):
        assert "statistic" not in row
        assert row["pvalue"] >= exact["pvalue"] * (1 - 1e-12)
        assert row["log_evalue"] is None or row["log_evalue"] <= exact["log_evalue"]


def test_results_do_not_say_where_the_service_keeps_them(service: Service) -> None:
    headers = service.headers()
    service.key(headers)
    job = service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()
    assert work(service.state, once=True) == 1
    body = service.client.get(f"/v1/jobs/{job['id']}/results", headers=headers).text
    assert str(service.settings.data) not in body
    assert "corpus.jsonl" not in body
    rows = [json.loads(line) for line in body.splitlines()]
    assert [row["doc_id"] for row in rows] == [str(number) for number in range(1, 61)]
    assert {row["source"] for row in rows} == {None}


@pytest.mark.slow
def test_a_bad_corpus_fails_alone(service: Service) -> None:
    """Lines that are no documents are rejects; a corpus without one document ends all the same; the next goes on."""
    headers = service.headers()
    service.key(headers)
    ids = [
        service.client.post("/v1/jobs?" + query, content=content, headers=headers).json()["id"]
        for query, content in (
            ("", b"{bad\n\xff\xfe\n" + CORPUS),
            ("", b"nothing at all"),
            ("id_column=none", CORPUS),
            (f"fdr={NEVER}", CORPUS),
        )
    ]
    assert work(service.state, once=True) == 4
    ended = [service.client.get(f"/v1/jobs/{id}", headers=headers).json() for id in ids]
    assert [one["state"] in ("finished", "failed") for one in ended] == [True] * 4
    assert ended[0]["state"] == ended[3]["state"] == "finished"
    assert ended[0]["progress"]["rejects"] == 2
    assert ended[3]["progress"] == {"documents": 60, "flagged": 0, "rejects": 0}
    for one in ended:
        assert str(service.settings.data) not in json.dumps(one)


def test_a_crash_of_the_library_ends_the_job_not_the_worker(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = service.headers()
    service.key(headers)
    ids = [service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()["id"] for _ in range(2)]
    monkeypatch.setattr(worker, "_test", lambda state, job: 1 / 0)
    assert work(service.state, once=True) == 2
    for id in ids:
        answer = service.client.get(f"/v1/jobs/{id}", headers=headers).json()
        assert (answer["state"], answer["error"]) == ("failed", "something went wrong inside; it has been logged.")


def test_cancelled_while_it_runs(start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is interrupted at its next sign of life, and takes the next job."""
    service = start(lease_seconds=0.3)
    headers = service.headers()
    service.key(headers)
    first, second = (service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()["id"] for _ in range(2))
    real = worker._test

    def slow(state: Any, job: Job) -> Any:
        if job.id != first:
            return real(state, job)
        service.client.post(f"/v1/jobs/{first}/cancel", headers=headers)
        time.sleep(30)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(worker, "_test", slow)
    begun = time.monotonic()
    assert work(service.state, once=True) == 2
    assert time.monotonic() - begun < 20
    states = [service.client.get(f"/v1/jobs/{id}", headers=headers).json()["state"] for id in (first, second)]
    assert states == ["cancelled", "finished"]


def test_a_locked_run_is_waited_for(service: Service) -> None:
    """A worker that lost its lease but still lives holds the ledger's lock: the job waits, and is not failed for it."""
    import fcntl

    headers = service.headers()
    service.key(headers)
    id = service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()["id"]
    ledger = jobs.JobFolders(service.settings.data).run(id) / "ledger"
    ledger.mkdir(parents=True)
    held = os.open(ledger / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(4.5, lambda: os.close(held)).start()
    taken = work(service.state, once=True)
    assert taken > jobs.MOST_ATTEMPTS  # so that an attempt counted for each would have failed it
    assert service.client.get(f"/v1/jobs/{id}", headers=headers).json()["state"] == "finished"


def test_a_job_that_kills_its_workers_fails_in_the_end(service: Service) -> None:
    headers = service.headers()
    service.key(headers)
    id = service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()["id"]
    for _ in range(jobs.MOST_ATTEMPTS):
        assert jobs.claim(service.state.sessions, "dies", -1.0) is not None
    work(service.state, once=True)
    answer = service.client.get(f"/v1/jobs/{id}", headers=headers).json()
    assert (answer["state"], answer["error"]) == ("failed", "5 workers died of it.")


def test_a_stopped_worker_puts_its_job_back(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a service is restarted, no attempt is counted for it."""
    headers = service.headers()
    service.key(headers)
    id = service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()["id"]
    real = worker._test

    def stopped(state: Any, job: Job) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_test", stopped)
    for _ in range(jobs.MOST_ATTEMPTS + 1):
        with pytest.raises(KeyboardInterrupt):
            work(service.state, once=True)
    found = jobs.find(service.state.sessions, "acme", id)
    assert found is not None
    assert (found.state, found.attempts) == (jobs.QUEUED, 0)
    monkeypatch.setattr(worker, "_test", real)
    assert work(service.state, once=True) == 1
    assert service.client.get(f"/v1/jobs/{id}", headers=headers).json()["state"] == "finished"


def test_uploads_that_never_became_jobs_are_removed(service: Service) -> None:
    headers = service.headers()
    service.key(headers)
    id = service.client.post("/v1/jobs", content=CORPUS, headers=headers).json()["id"]
    folder = service.settings.data / "jobs"
    orphan, fresh = folder / ("job-" + "a" * 24), folder / ("job-" + "b" * 24)
    for one in (orphan, fresh):
        one.mkdir()
        (one / "corpus.jsonl").write_bytes(b"half")
    for path in (orphan / "corpus.jsonl", orphan, folder / id / "corpus.jsonl", folder / id):
        os.utime(path, (0, 0))
    assert jobs.sweep(service.state.sessions, service.settings.data) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([id, fresh.name])
