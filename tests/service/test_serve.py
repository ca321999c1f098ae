"""`assay serve` as people start it: a process, HTTP on a socket, a job from upload to results, SIGTERM."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_process import LIMIT_S, Server, gone

TEXT = "The assayer weighs what the founder has cast, and the stamp says what the scales have found."
DOCUMENTS = 400
CORPUS = b"".join(json.dumps({"id": i, "text": f"{TEXT} {i} {i * i}"}).encode() + b"\n" for i in range(DOCUMENTS))


def exercise(server: Server) -> None:
    """Key, detection, stream, job to results."""
    assert stat.S_IMODE((server.data / "first-api-key").stat().st_mode) == 0o600
    assert stat.S_IMODE((server.data / "master.key").stat().st_mode) == 0o600
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


def cookie_is_secure(server: Server) -> bool:
    """As a proxy that ended TLS would ask, from this machine."""
    return "Secure" in server.client.get("/", headers={"x-forwarded-proto": "https"}).headers["set-cookie"]


def test_serve_over_sqlite(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)  # a folder that was there may be open to all
    server = serve()
    exercise(server)
    assert server.client.post("/v1/reports", json={"job_id": server.client.get("/v1/jobs").json()["jobs"][0]["id"]})
    files = list(server.data.rglob("*"))
    assert {"assay.db", "corpus.jsonl", "results.parquet", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert cookie_is_secure(server)
    workers = server.workers()
    assert len(workers) == 1
    assert server.stop() == 0
    server.wait_for(lambda: all(gone(pid) for pid in workers))
    log = server.log.read_text()
    assert "Traceback" not in log
    for hidden in ((server.data / "first-api-key").read_text()[-44:-1], TEXT[:20], "master.key "):
        assert hidden not in log
    # A second start takes the same keys and makes no further API key.
    again = serve("--job-workers", "0", FORWARDED_ALLOW_IPS="192.0.2.7")
    assert len(again.client.get("/v1/keys").json()["keys"]) == 1
    assert not cookie_is_secure(again)
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
    for path in (tmp_path / "d", tmp_path / "d" / "assay.db"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert command("new", "acme", "--scope", "root").returncode == 2
    assert command("revoke", "other", answer["id"]).returncode == 1
    done = command("revoke", "acme", answer["id"])
    assert done.returncode == 0, done.stderr
    assert answer["token"] not in done.stdout + done.stderr
