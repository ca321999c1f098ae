"""`assay serve` as people start it: a process, HTTP on a socket, kill -9 of workers and of the server, SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pyarrow import parquet

from assay.detection.corpus import run
from assay.service import audit
from assay.service.app import open_database, open_state
from assay.service.settings import Settings

LIMIT_S = 120.0
TEXT = "The assayer weighs what the founder has cast, and the stamp says what the scales have found."
DOCUMENTS = 400
SHARDS = DOCUMENTS // 2
CORPUS = b"".join(json.dumps({"id": i, "text": f"{TEXT} {i} {i * i}"}).encode() + b"\n" for i in range(DOCUMENTS))


class Server:
    """A started `assay serve`."""

    def __init__(self, data: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.data = data
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = data.parent / f"log-{self.port}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "assay", "serve", "--data", str(data), "--port", str(self.port), *options],
                env=os.environ | (environment or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=LIMIT_S)
        self.wait_for(self._answers)
        token = (data / "first-api-key").read_text().strip()
        self.client.headers["authorization"] = f"Bearer {token}"

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(self, what: Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT_S
        while not what():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """Process ids of the job workers, which are children of the server."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "assay.service.worker"], capture_output=True
        )
        return [int(line) for line in found.stdout.split()]

    def state(self, job: str) -> str:
        return self.client.get(f"/v1/jobs/{job}").json()["state"]

    def kill(self) -> None:
        """kill -9 of the server alone; its workers find out by themselves."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=LIMIT_S)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*options: str, **environment: str) -> Server:
        started.append(Server(tmp_path / "data", *options, environment=environment))
        return started[-1]

    yield start
    for server in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.client.close()


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True


def exercise(server: Server) -> None:
    """Key, detection, stream, job to results."""
    assert stat.S_IMODE((server.data / "first-api-key").stat().st_mode) == 0o600
    assert stat.S_IMODE((server.data / "master.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700
    post, get = server.client.post, server.client.get
    key = post("/v1/keys", json={}).json()["id"]
    assert post("/v1/detect", json={"text": TEXT}).json()["key_id"] == key

    # A stream answers each line before the next is sent.
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) as raw:
        authorization = server.client.headers["authorization"]
        raw.sendall(
            f"POST /v1/detect/stream HTTP/1.1\r\nhost: a\r\nauthorization: {authorization}\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        received = b""
        for number in range(3):
            line = json.dumps({"text": TEXT, "id": f"line-{number}"}).encode() + b"\n"
            raw.sendall(b"%x\r\n%s\r\n" % (len(line), line))
            while f'"line-{number}"'.encode() not in received:
                piece = raw.recv(65536)
                assert piece, received
                received += piece
        # The client goes away in the middle of a line.
        raw.sendall(b"1000\r\n{")
    logged = [event for event in get("/v1/audit").json()["events"] if event["action"] == "detect.stream"]
    assert [event["detail"]["texts"] for event in logged] == [1, 1, 1]

    job = post("/v1/jobs?shard_rows=50&id_column=id", content=CORPUS).json()["id"]
    server.wait_for(lambda: server.state(job) == "finished")
    results = [json.loads(line) for line in get(f"/v1/jobs/{job}/results").text.splitlines()]
    assert [row["doc_id"] for row in results] == [str(i) for i in range(DOCUMENTS)]


def test_serve_over_sqlite(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    exercise(server)
    workers = server.workers()
    assert len(workers) == 1
    assert server.stop() == 0
    server.wait_for(lambda: all(gone(pid) for pid in workers))
    log = server.log.read_text()
    assert "Traceback" not in log
    for hidden in ((server.data / "first-api-key").read_text()[-44:-1], TEXT[:20], "master.key "):
        assert hidden not in log
    # A second start takes the same keys and makes no further API key.
    again = serve("--job-workers", "0")
    assert len(again.client.get("/v1/keys").json()["keys"]) == 1
    assert again.stop() == 0


@pytest.mark.slow
def test_serve_over_postgresql(serve: Callable[..., Server], postgresql: str) -> None:
    """Two server processes and two workers on one PostgreSQL."""
    server = serve("--database-url", postgresql.format(name="postgres"), "--processes", "2", "--job-workers", "2")
    exercise(server)
    assert not (server.data / "assay.db").exists()
    assert len(server.workers()) == 2
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_api_keys(tmp_path: Path) -> None:
    """Made and revoked from the command line, without a master key; a tenant's key is no other tenant's to revoke."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "assay", "api-keys", *arguments, "--data", str(tmp_path / "d")]
        return subprocess.run(whole, capture_output=True, text=True, timeout=LIMIT_S)

    made = command("new", "acme", "--scope", "detect", "--json")
    assert made.returncode == 0, made.stderr
    answer = json.loads(made.stdout)
    assert answer["scopes"] == ["detect"]
    assert not (tmp_path / "d" / "master.key").exists()
    assert command("new", "acme", "--scope", "root").returncode == 2
    assert command("revoke", "other", answer["id"]).returncode == 1
    done = command("revoke", "acme", answer["id"])
    assert done.returncode == 0, done.stderr
    assert answer["token"] not in done.stdout + done.stderr


def expected_results(server: Server, job: str, out: Path) -> Any:
    """What the library gives for the corpus that the server stored."""
    key_id = server.client.get(f"/v1/jobs/{job}").json()["keys"][0]
    key = open_state(Settings(data=server.data)).keys.key("default", key_id)
    run(server.data / "jobs" / job / "corpus.jsonl", key, out=out, id_column="id", shard_rows=2, progress=False)
    return parquet.read_table(out / "results.parquet")


@pytest.mark.slow
def test_kill_of_workers_loses_and_doubles_nothing(serve: Callable[..., Server], tmp_path: Path) -> None:
    """kill -9 of the worker after a random number of further shards, five times; another is started and goes on.

    The attempts of a job that comes further are no failures: there are as many kills as a job may fail.
    """
    server = serve(ASSAY_LEASE_SECONDS="2")
    server.client.post("/v1/keys", json={})
    job = server.client.post("/v1/jobs?shard_rows=2&id_column=id", content=CORPUS).json()["id"]
    manifest = server.data / "jobs" / job / "run" / "ledger" / "manifest.jsonl"

    def shards() -> int:
        return manifest.read_bytes().count(b'"shard"') if manifest.exists() else 0

    rng = np.random.default_rng(8)
    seen, killed = [], [0]
    for _ in range(5):
        wanted = min(shards() + int(rng.integers(1, 20)), SHARDS - 20)
        server.wait_for(lambda wanted=wanted: bool(server.workers()) and (shards() >= wanted))  # type: ignore[misc]
        time.sleep(float(rng.uniform(0, 0.1)))
        assert server.workers() != killed
        killed = server.workers()
        for pid in server.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        seen.append(shards())
    server.wait_for(lambda: server.state(job) in ("finished", "failed"))
    assert server.state(job) == "finished"
    assert sum(0 < count < SHARDS for count in seen) >= 3, seen  # most kills fell in the middle
    found = parquet.read_table(server.data / "jobs" / job / "run" / "results.parquet")
    assert found["doc_id"].to_pylist() == [str(i) for i in range(DOCUMENTS)]
    expected = expected_results(server, job, tmp_path / "direct")
    assert found.drop_columns(["source"]).equals(expected.drop_columns(["source"]))


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
    answer = again.client.post("/v1/jobs", content=CORPUS, headers={"idempotency-key": "one"})
    assert answer.status_code == 202
    again.wait_for(lambda: again.state(answer.json()["id"]) == "finished")


@pytest.mark.slow
def test_kill_of_the_server_loses_no_answered_detection(serve: Callable[..., Server]) -> None:
    """Every detection that was answered before kill -9 is in the audit log, and spent from its budget."""
    server = serve("--job-workers", "0")
    server.client.post("/v1/keys", json={})
    engine, sessions = open_database(Settings(data=server.data))
    from assay.service.auth import create_api_key

    _, token = create_api_key(sessions, "default", ["detect"])
    answered: list[int] = []

    def ask() -> None:
        with httpx.Client(headers={"authorization": f"Bearer {token}"}, timeout=10) as client:
            while True:
                try:
                    answer = client.post(f"http://127.0.0.1:{server.port}/v1/detect", json={"text": TEXT})
                except httpx.TransportError:
                    return
                if answer.status_code == 200:
                    answered.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: len(answered) > 100)
    server.kill()
    for thread in threads:
        thread.join(30)
    logged = [event for event in audit.events(sessions, "default", limit=100_000) if event.action == "detect"]
    assert len(answered) <= len(logged) <= len(answered) + 8  # at most one under way for each client
    with engine.connect() as connection:
        used = connection.exec_driver_sql("SELECT used FROM budgets").scalar()
    assert used == len(logged)
    engine.dispose()
