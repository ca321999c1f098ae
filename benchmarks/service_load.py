"""Load on `assay serve`: detect requests per second, latency, CPU time of the server per request, and its memory.

wrk sends texts of 500 tokens over 32 connections to server processes on this machine, client and server on the same
cores. Run: `python benchmarks/service_load.py --requests 100000`. Needs wrk and the extra `service`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from assay.detection.text import load_tokenizer
from assay.service.auth import create_api_key
from assay.service.settings import Settings
from assay.service.state import open_database

ROOT = Path(__file__).resolve().parent.parent
TOKENS, TEXTS = 500, 64
LUA = """
local bodies, number, failed = {}, 0, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
request = function()
  number = number + 1
  return wrk.format("POST", "/v1/detect", {["authorization"] = "Bearer %s"}, bodies[number %% #bodies + 1])
end
"""


def texts() -> list[str]:
    """Passages of prose, each cut to 500 tokens."""
    tokenizer = load_tokenizer("default")
    raw = gzip.decompress((ROOT / "data" / "corpus" / "the-time-machine.txt.gz").read_bytes())
    words = " ".join(raw.decode("utf-8").split()).split(" ")[1000:]
    out, at = [], 0
    for _ in range(TEXTS):
        size = 1
        while len(tokenizer.encode(" ".join(words[at : at + size]))) < TOKENS:
            size += 4
        out.append(" ".join(words[at : at + size]))
        at += size
    return out


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, check=False).stdout.split()
    return [pid, *(one for child in found for one in family(int(child)))]


def cpu_seconds(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        values = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(values[11]) + int(values[12])
    return total / os.sysconf("SC_CLK_TCK")


def rss_mib(pids: list[int]) -> float:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def milliseconds(found: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", found).groups()
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=20_000, help="about how many are sent")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--connections", type=int, default=16)
    options.add_argument("--keys", type=int, default=1, help="keys looked for in each text")
    options.add_argument("--database-url")
    options.add_argument("--scope", default="detect", help="detect is charged to a budget, admin is not")
    asked = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="assay-load-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "--data", str(folder / "data"), "--port", str(port), "--job-workers", "0"]
    command += ["--processes", str(asked.processes)]
    environment = os.environ | {
        "ASSAY_DETECTIONS_PER_KEY_PER_DAY": "1000000000",
        "ASSAY_REQUESTS_PER_SECOND": "1000000",
        "ASSAY_BURST": "1000000",
        "OMP_NUM_THREADS": "1",
    }
    if asked.database_url:
        environment["ASSAY_DATABASE_URL"] = asked.database_url
    server = subprocess.Popen(
        [sys.executable, "-m", "assay", *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(base + "/readyz").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        settings = Settings(data=folder / "data", database_url=asked.database_url)
        engine, sessions = open_database(settings)
        _, token = create_api_key(sessions, "load", [asked.scope])
        _, admin = create_api_key(sessions, "load", ["admin"])
        engine.dispose()
        for _ in range(asked.keys):
            httpx.post(base + "/v1/keys", json={}, headers={"authorization": f"Bearer {admin}"}).raise_for_status()
        bodies = folder / "bodies"
        bodies.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
        script = folder / "load.lua"
        script.write_text(LUA % (bodies, token))

        def load(seconds: float) -> str:
            whole = ["wrk", "-t1", f"-c{asked.connections}", f"-d{seconds:.0f}s", "--latency", "--timeout", "30s"]
            return subprocess.run([*whole, "-s", str(script), base], capture_output=True, text=True, check=True).stdout

        pids = family(server.pid)
        rate = float(re.search(r"Requests/sec:\s+([\d.]+)", load(5)).group(1))  # warm
        memory, cpu, done, answers = [rss_mib(pids)], cpu_seconds(pids), 0, []
        parts = 4
        for _ in range(parts):
            found = load(max(2.0, asked.requests / parts / rate))
            assert "Non-2xx" not in found, found
            assert "Socket errors" not in found, found
            done += int(re.search(r"(\d+) requests in", found).group(1))
            memory.append(rss_mib(pids))
            answers.append(found)
        used = cpu_seconds(pids) - cpu
        rates = [float(re.search(r"Requests/sec:\s+([\d.]+)", one).group(1)) for one in answers]
        tails = {
            name: [milliseconds(re.search(rf"(?m)^\s+{name}%\s+(\S+)", one).group(1)) for one in answers]
            for name in ("50", "99")
        }
        print(f"load average before and during: {os.getloadavg()[0]:.1f}; cores: {os.cpu_count()}")
        print(
            f"{done} requests of {TOKENS} tokens, {asked.keys} keys, {asked.processes} processes, scope {asked.scope}"
        )
        print(f"requests/s in {parts} parts: {' '.join(f'{one:.0f}' for one in rates)}")
        print(f"p50 ms: {' '.join(f'{one:.1f}' for one in tails['50'])}")
        print(f"p99 ms: {' '.join(f'{one:.1f}' for one in tails['99'])}")
        print(f"CPU of the server per request: {1e3 * used / done:.2f} ms")
        print(f"memory of the server after each part, MiB: {' '.join(f'{one:.0f}' for one in memory)}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
