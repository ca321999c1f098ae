"""Corpus runs on a Ray cluster: the local engine's bytes, whatever is killed; the driver's decisions; no key leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from killing import LIMIT_S, command, finish, outcome, rows_in_manifest, write_corpus
from pyarrow import parquet
from typer.testing import CliRunner

from assay._errors import RunError
from assay.cli import app
from assay.detection.corpus import pool, ray_engine, run
from assay.detection.corpus.dispatch import Lost
from assay.detection.corpus.key_tests import KeyTests
from assay.detection.corpus.keys import DetectionKey
from assay.detection.corpus.ledger import ShardRecord
from assay.detection.corpus.reading import Document
from assay.detection.corpus.shards import Shard
from assay.detection.corpus.subject import Setup
from assay.detection.text import load_tokenizer
from assay.watermark.keys import SecretKey, use_key

MakeKey = Callable[..., SecretKey]
NO_RAY = "this test starts a Ray cluster: pip install 'assay[ray]'"


# The parts, without a cluster.


@pytest.fixture
def setup(make_key: MakeKey, tmp_path: Path) -> Setup:
    key = make_key(1)
    return Setup(KeyTests(load_tokenizer(), (DetectionKey(key.id, key.config, use_key(key)),)), tmp_path)


def shard_of(index: int, *texts: str) -> Shard:
    return Shard(index, [Document(0, row, 1, "a", f"a:{row}", "a", text) for row, text in enumerate(texts, 1)])


def test_only_the_slot_that_was_meant_can_read_the_keys(setup: Setup, tmp_path: Path, make_key: MakeKey) -> None:
    pickled = pickle.dumps(setup)
    words = use_key(make_key(1)).tobytes()
    assert words in pickled  # the search below would find them
    slot, other = ray_engine.Slot(), ray_engine.Slot()
    sealed = ray_engine.seal(pickled, slot.introduce()[1])
    assert words not in sealed
    assert ray_engine.seal(pickled, slot.introduce()[1]) != sealed  # a fresh key each time
    slot.start(sealed, str(tmp_path))
    with pytest.raises(InvalidTag):
        other.start(sealed, str(tmp_path))


def test_a_folder_that_is_not_shared_is_refused(setup: Setup, tmp_path: Path) -> None:
    slot = ray_engine.Slot()
    with pytest.raises(RunError, match="not the same folder on every machine"):
        slot.start(ray_engine.seal(pickle.dumps(setup), slot.introduce()[1]), str(tmp_path / "elsewhere/sign"))


def test_a_slot_writes_what_the_local_engine_writes(setup: Setup, tmp_path: Path, human_text: str) -> None:
    shards = [shard_of(0, human_text[:900], "", human_text[900:1000]), shard_of(1, human_text[2000:3000])]
    slot = ray_engine.Slot()
    slot.start(ray_engine.seal(pickle.dumps(setup), slot.introduce()[1]), str(tmp_path))
    records = [slot.test(shard) for shard in shards]
    assert slot._pool is not None
    assert len(slot._pool.workers) == 1  # it stayed
    slot._pool.close()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    assert list(pool.work(iter(shards), setup, 1)) == records
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert len(files) == 2


class FakeRay:
    """Ray with actors in this process; `fate(question, shard)` names the exception that a question ends in, or None."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        def __init__(self, cause: Exception) -> None:
            super().__init__("a traceback that could quote a document")
            self.cause = cause

    def __init__(self, fate: Callable[[str, Any], Exception | None], version: str | None = None) -> None:
        self.exceptions = SimpleNamespace(RayError=self.RayError, RayTaskError=self.RayTaskError)
        self.fate, self.version = fate, version
        self.started = self.killed = 0

    def remote(self, **options: Any) -> Callable[[type], Any]:
        assert options == {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        return lambda cls: SimpleNamespace(remote=self.actor)

    def actor(self) -> Any:
        self.started += 1
        public = ray_engine.Slot().introduce()
        answers = {"introduce": (self.version or public[0], public[1]), "start": None}

        def ask(question: str) -> Any:
            def remote(*arguments: Any) -> Any:
                shard = arguments[0] if question == "test" else None
                answer = self.fate(question, shard) or answers.get(question, shard and f"record {shard.index}")
                return (question, id(object()), answer if not isinstance(answer, Exception) else _Raised(answer))

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(**{question: ask(question) for question in ("introduce", "start", "test")})

    def wait(self, asked: list[Any], timeout: float | None) -> tuple[list[Any], list[Any]]:
        return asked[:1], asked[1:]

    def get(self, asked: Any) -> Any:
        answer = asked[2]
        if isinstance(answer, _Raised):
            raise answer.error
        return answer

    def kill(self, actor: Any) -> None:
        self.killed += 1


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


def record_of(shard: Shard) -> ShardRecord:
    return ShardRecord(
        shard=shard.index, documents=1, rejects=0, sha256="", rejects_sha256=None, n_tokens=1, end=(0, 1), consumed=1
    )


def answers(fake: FakeRay, setup: Setup, shards: int = 6, count: int = 2) -> list[Any]:
    texts = (shard_of(index, "text") for index in range(shards))
    return list(ray_engine._Cluster(fake, setup, count, setup.folder).answers(texts))


def test_shards_of_a_lost_machine_are_tested_again(setup: Setup) -> None:
    lost: Counter[int] = Counter()

    def fate(question: str, shard: Shard | None) -> Any:
        if shard is None:
            return None
        lost[shard.index] += 1
        # Shard 2 loses its machine three times, shard 4 always.
        return FakeRay.RayError() if lost[shard.index] <= {2: 3, 4: 99}.get(shard.index, 0) else record_of(shard)

    fake = FakeRay(fate)
    found = answers(fake, setup)
    assert sorted(answer.shard for answer in found if isinstance(answer, ShardRecord)) == [0, 1, 2, 3, 5]
    (gone,) = (answer for answer in found if isinstance(answer, Lost))
    assert (gone.shard.index, gone.ending, gone.times) == (4, "its machine was lost", 4)
    assert fake.started >= 1 + 3 + 4 - 1
    assert lost == {0: 1, 1: 1, 2: 4, 3: 1, 4: 4, 5: 1}


def test_a_shard_that_killed_its_worker_twice_is_lost(setup: Setup) -> None:
    fake = FakeRay(lambda question, shard: shard and ("killed by signal 9" if shard.index == 1 else record_of(shard)))
    found = answers(fake, setup)
    (gone,) = (answer for answer in found if isinstance(answer, Lost))
    assert (gone.shard.index, gone.ending, gone.times) == (1, "killed by signal 9", 2)
    assert len(found) == 6
    assert fake.killed == 0  # the slot lives on


def test_slots_that_never_start_end_the_run(setup: Setup) -> None:
    fake = FakeRay(lambda question, shard: FakeRay.RayError() if question == "start" else None)
    with pytest.raises(RunError, match="end while they start"):
        answers(fake, setup)
    assert 2 + 3 <= fake.started <= 2 + 3 + 1


def test_another_version_on_the_cluster_is_refused(setup: Setup) -> None:
    with pytest.raises(RunError, match=r"must have Assay .*, one has 0\.0\.1"):
        answers(FakeRay(lambda question, shard: None, version="0.0.1"), setup)


@pytest.mark.parametrize(
    ("cause", "message"),
    [(RunError("a shard could not be written: disk full."), "disk full"), (ValueError("secret text"), "(ValueError)")],
)
def test_an_error_of_a_slot_ends_the_run_without_quoting_a_document(
    setup: Setup, cause: Exception, message: str
) -> None:
    with pytest.raises(RunError) as caught:
        answers(FakeRay(lambda question, shard: shard and FakeRay.RayTaskError(cause)), setup)
    assert message in str(caught.value)
    assert "document" not in str(caught.value)
    assert "secret text" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "dask"}, ValueError, "engine must be"),
        ({"ray_address": "auto"}, ValueError, 'ray_address needs engine="ray"'),
        ({"engine": "ray", "workers": 0}, ValueError, "workers must be"),
        ({"engine": "ray", "ray_address": "ray://head:10001"}, RunError, "must be HOST:PORT"),
        ({"engine": "ray", "ray_address": "127.0.0.1:1"}, RunError, "nothing answers"),
        ({"engine": "ray", "ray_address": "head"}, RunError, "nothing answers"),
    ],
)
def test_options_that_cannot_be_meant(
    tmp_path: Path, make_key: MakeKey, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(error, match=message):
        run(tmp_path / "a.txt", make_key(1), out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    "arguments",
    [["--out", "o", "--address", "h:1"], ["--engine", "ray"], ["--copy-to", "s3://b"], ["--engine", "dask"]],
)
def test_the_command_refuses_options_that_do_not_fit(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["detect", "a.txt", "--key", "all", *arguments]).exit_code == 2


# A cluster of two machines on this one.

DOCUMENTS = 1200
SHARD_ROWS = 12
SHARDS = DOCUMENTS // SHARD_ROWS
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_key: MakeKey, human_text: str) -> Path:
    """A keyring, and 1200 passages in three files with every 100th row bad."""
    folder = tmp_path_factory.mktemp("ray")
    write_corpus(folder, make_key(1), human_text, documents=DOCUMENTS, files=3, shortest=200, longest=2000)
    return folder


def start(folder: Path, out: str, *more: str) -> subprocess.Popen[bytes]:
    return command(folder, out, "--shard-rows", str(SHARD_ROWS), *more)


@pytest.fixture(scope="module")
def local(folder: Path) -> tuple[bytes, bytes]:
    """What the local engine writes."""
    finish(start(folder, "local", "--workers", "1"))
    return outcome(folder / "local")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason=NO_RAY)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def descendants(ancestor: int) -> dict[int, bytes]:
    """Command lines of all processes below one; other tests run beside this one, with clusters of their own."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes()

    def is_below(pid: int) -> bool:
        while pid not in (0, 1, ancestor):
            pid = parents.get(pid, 0)
        return pid == ancestor

    return {pid: line for pid, line in lines.items() if is_below(parents[pid])}


def processes() -> dict[str, list[int]]:
    """Process ids of the slots' actors and of their worker processes, on the cluster of this test process."""
    ours = descendants(os.getpid())
    return {
        "actor": [pid for pid, line in ours.items() if line.startswith(b"ray::Slot")],
        "worker": [pid for pid, line in ours.items() if b"assay.detection.corpus.worker" in line],
    }


def shards_in_manifest(out: Path) -> set[int]:
    """Finished shards; a last line may be half written."""
    try:
        lines = (out / "ledger/manifest.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return set()
    return {row["shard"] for row in map(json.loads, lines) if row["kind"] == "shard"}


def await_settled(process: subprocess.Popen[bytes], out: Path, more: int) -> None:
    """Wait until every shard that was begun by now is done, and some more.

    A shard that a kill interrupted waits for a new process while the other slot runs on. Were it hit again, it would
    have killed two workers and be a reject, and rightly so.
    """
    goal = set(range(max(shards_in_manifest(out), default=-1) + 5 + more))  # two in work, two read ahead
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and not goal <= shards_in_manifest(out) and time.monotonic() < deadline:
        time.sleep(0.002)


def await_rows(process: subprocess.Popen[bytes], out: Path, goal: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and rows_in_manifest(out) < goal and time.monotonic() < deadline:
        time.sleep(0.002)


def await_write(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait until a shard's temporary file is there, that is, until a worker is in the middle of writing."""
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if any(name.startswith(".shard") for name in os.listdir(out / "ledger/shards")):
                return True
    return False


def check(folder: Path, out: str, local: tuple[bytes, bytes]) -> None:
    rows = parquet.read_table(folder / out / "results.parquet")
    assert b"worker died" not in outcome(folder / out)[1]
    assert Counter(rows["doc_id"].to_pylist()) == Counter(str(i) for i in range(DOCUMENTS) if i % 100)
    assert outcome(folder / out) == local
    assert not list((folder / out).rglob("*.tmp"))


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_the_local_engine(folder: Path, local: tuple[bytes, bytes], cluster: Any) -> None:
    process = start(folder, "two-nodes", "--engine", "ray", "--address", cluster.address)
    await_rows(process, folder / "two-nodes", 5)
    await_both = time.monotonic() + 60
    slots: set[int] = set()
    while process.poll() is None and len(slots) < 2 and time.monotonic() < await_both:
        slots |= set(processes()["actor"])
    finish(process)
    assert len(slots) == 2  # one CPU on each node: both worked
    check(folder, "two-nodes", local)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_actors_writers_and_drivers_are_killed(
    folder: Path, local: tuple[bytes, bytes], cluster: Any, seed: int
) -> None:
    """Each at a random number of shards; a dead driver is followed by the same command, the last time the local one."""
    out = f"killed-{seed}"
    rng = np.random.default_rng(seed)
    victims = np.concatenate([rng.permutation(["worker", "actor", "writer", "driver"]) for _ in range(2)])
    arguments = ["--engine", "ray", "--address", cluster.address]
    process, hit = start(folder, out, *arguments), Counter[str]()
    for victim in victims:
        await_settled(process, folder / out, more=int(rng.integers(0, 3)))
        time.sleep(float(rng.uniform(0, 0.05)))
        if process.poll() is not None:  # a fast machine may be done before the second round of kills is
            break
        if victim == "driver":
            process.kill()
            process.communicate(timeout=LIMIT_S)
            hit["driver"] += 1
            process = start(folder, out, *arguments)
            continue
        if victim == "writer" and not await_write(process, folder / out):
            continue
        alive = processes()["actor" if victim == "actor" else "worker"]
        for pid in alive if victim == "writer" else rng.permutation(alive)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
                hit[str(victim)] += 1
    finish(process)
    assert set(hit) == {"worker", "actor", "writer", "driver"}
    check(folder, out, local)


@pytest.mark.slow
def test_a_node_is_lost_and_the_driver_too_and_the_local_engine_resumes(
    folder: Path, local: tuple[bytes, bytes], cluster: Any
) -> None:
    out = folder / "node"
    process = start(folder, "node", "--engine", "ray", "--address", cluster.address)
    await_rows(process, out, 8)
    cluster.remove_node(next(node for node in cluster.worker_nodes), allow_graceful=False)
    await_rows(process, out, rows_in_manifest(out) + 8)  # the other node goes on
    cluster.add_node(**NODE)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=LIMIT_S)
    assert 16 < rows_in_manifest(out) < SHARDS
    finish(start(folder, "node", "--workers", "1"))
    check(folder, "node", local)


@pytest.mark.slow
def test_a_local_run_that_was_killed_ends_on_the_cluster(
    folder: Path, local: tuple[bytes, bytes], cluster: Any
) -> None:
    out = folder / "from-local"
    process = start(folder, "from-local", "--workers", "1")
    await_rows(process, out, 20)
    process.kill()
    process.communicate(timeout=LIMIT_S)
    done = shards_in_manifest(out)
    assert 10 < len(done) < SHARDS
    finish(start(folder, "from-local", "--engine", "ray", "--address", cluster.address))
    rows = [json.loads(line) for line in (out / "ledger/manifest.jsonl").read_bytes().splitlines()]
    counted = Counter(row["shard"] for row in rows if row["kind"] == "shard")
    assert counted == Counter(range(SHARDS))  # none of those that were done was done again
    check(folder, "from-local", local)


@pytest.mark.slow
def test_documents_that_kill_their_worker_are_the_same_rejects(
    tmp_path: Path, make_key: MakeKey, human_text: str, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    """Through the caller's own connection, which stays open."""
    import ray

    head, tail = pool._COMMAND.split("from assay.detection.corpus.worker import main")
    sabotaged = f"""{head}
import os
from assay.detection.corpus.key_tests import KeyTests
original = KeyTests.results
def results(self, texts):
    if "poison" in texts:
        os.kill(os.getpid(), 9)
    return original(self, texts)
KeyTests.results = results
from assay.detection.corpus.worker import main{tail}"""

    def poison() -> None:  # nested, so that Ray carries its code and not the name of this module
        from assay.detection.corpus import pool

        pool._COMMAND = sabotaged

    texts = [human_text[100 * i : 100 * i + 400] for i in range(40)]
    texts[17] = "poison"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": poison})
    try:
        summary = run(tmp_path / "a.jsonl", make_key(1), out=tmp_path / "ray", engine="ray", shard_rows=5)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert summary.rejects_by_reason == {"worker died": 5}
    monkeypatch.setattr(pool, "_COMMAND", sabotaged)
    run(tmp_path / "a.jsonl", make_key(1), out=tmp_path / "here", workers=1, shard_rows=5)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")
    assert b"twice, killed by signal 9" in outcome(tmp_path / "ray")[1]


@pytest.mark.slow
def test_no_secret_is_left_by_a_cluster_of_its_own(
    folder: Path, make_key: MakeKey, local: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """Not in Ray's session (logs, spilled objects), not in the environment or arguments of its processes."""
    pytest.importorskip("ray", reason=NO_RAY)
    key = make_key(1)
    words = use_key(key)
    secrets = [key._secret, words.tobytes(), key._secret.hex().encode(), words.tobytes().hex().encode(), b"hunter2"]
    process = start(folder, "own", "--engine", "ray", "--address", "local", "--workers", "1")
    await_rows(process, folder / "own", 10)
    seen, sessions = b"", set()
    for pid, line in descendants(process.pid).items():
        seen += line
        sessions |= set(re.findall(rb"(/[^\0= ]*/session_\d[^/\0 ]*)", line))
        with contextlib.suppress(OSError):
            seen += Path(f"/proc/{pid}/environ").read_bytes()
    (session,) = (Path(os.fsdecode(name)) for name in sessions)
    finish(process)
    for path in [*session.rglob("*"), *(folder / "own").rglob("*")]:
        with contextlib.suppress(OSError):
            seen += path.read_bytes() if path.is_file() else b""
    assert b"ray::Slot" in seen  # a slot was looked at
    assert b"RAY_USAGE_STATS_ENABLED=0" in seen
    assert b"Slot" in b"".join(path.read_bytes() for path in session.rglob("*") if path.is_file())  # and the logs
    assert not [secret for secret in secrets if secret in seen]
    check(folder, "own", local)
