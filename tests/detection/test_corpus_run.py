"""Corpus runs with real worker processes: rows equal to `detect`, every format, dead workers, secrets, the command."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from typer.testing import CliRunner

import assay
from assay._errors import RunError
from assay.cli import app
from assay.detection.corpus import RunSummary, pool, run
from assay.detection.corpus.dispatch import Queue
from assay.detection.corpus.key_tests import KeyTests
from assay.detection.corpus.shards import Shard
from assay.detection.gumbel import documents_test
from assay.detection.multiplicity import benjamini_hochberg
from assay.detection.text import load_tokenizer
from assay.kernels import prf
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey, use_key

MakeKey = Callable[..., SecretKey]

COLUMNS = {
    "doc_id": pa.string(),
    "source": pa.string(),
    "file": pa.string(),
    "row": pa.int64(),
    "n_tokens": pa.int64(),
    "n_scored": pa.int64(),
    "n_repeats_dropped": pa.int64(),
    "statistic": pa.float64(),
    "log_pvalue": pa.float64(),
    "pvalue": pa.float64(),
    "log_evalue": pa.float64(),
    "key_id": pa.string(),
    "scheme": pa.string(),
    "log_qvalue": pa.float64(),
    "qvalue": pa.float64(),
    "flagged": pa.bool_(),
}


@cache
def whole_words() -> list[tuple[int, str]]:
    """Ids and words of the bundled tokenizer's tokens that are a space and a whole word."""
    vocabulary = load_tokenizer().backend.get_vocab()
    return sorted((v, word[1:]) for word, v in vocabulary.items() if word[0] == "\u0120" and word[1:].isalpha())


def marked_text(key: SecretKey, seed: int, words: int = 80, candidates: int = 8) -> str:
    """Words that are one token each, every one the best under the key of some random candidates: a strong mark."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> list[tuple[int, str]]:
        return [whole_words()[i] for i in rng.integers(len(whole_words()), size=count)]

    chosen = draw(4)
    while len(chosen) < words:
        offered = draw(candidates)
        contexts = np.tile(np.array([[v for v, _ in chosen[-4:]]], dtype=np.uint32), (candidates, 1))
        drawn = prf.words_at(use_key(key), contexts, np.array([v for v, _ in offered], dtype=np.uint32))
        chosen.append(offered[int(np.argmin(drawn))])
    return " " + " ".join(word for _, word in chosen)


@pytest.fixture(scope="module")
def texts(make_key: MakeKey, human_text: str) -> list[str]:
    """90 human passages of different lengths, 10 marked texts of keys 1 and 2, and odd ones."""
    rng = np.random.default_rng(1)
    starts, sizes = rng.integers(len(human_text) - 900, size=90), rng.integers(5, 900, size=90)
    human = [human_text[a : a + n] for a, n in zip(starts, sizes, strict=True)]
    marked = [marked_text(make_key(1 + i % 2), seed=i) for i in range(10)]
    return [*human[:45], *marked, *human[45:], "", "x", "\x00", "word " * 400, "\U0001f600\u0301 \u202e"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The texts over all formats in order, with five rejects."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"text": text, "key": i, "origin": "even" if i % 2 == 0 else None} for i, text in enumerate(texts)]
    lines = [json.dumps(row).encode() for row in rows]
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines[:20], b"{bad", b'{"text": 1, "key": 1}']) + b"\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join([*lines[20:40], b'{"text": "\xff"}'])))
    (folder / "c.ndjson.zst").write_bytes(zstandard.ZstdCompressor().compress(b"\n".join(lines[40:60])))
    table = pa.Table.from_pylist([*rows[60:80], {"text": None, "key": 3, "origin": None}, *rows[80:-1]])
    parquet.write_table(table, folder / "d.parquet", row_group_size=9)
    (folder / "e.jsonl.zstd").write_bytes(zstandard.ZstdCompressor().compress(lines[-1])[:-1])
    (folder / "f").mkdir()
    (folder / "f/last.txt").write_bytes(texts[-1].encode())
    return folder


def rows_of(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out / "results.parquet").to_pylist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("numbers", [[1], [1, 2, 3]], ids=["one key", "three keys"])
def test_every_row_is_what_detect_says(
    tmp_path: Path, corpus: Path, texts: list[str], make_key: MakeKey, numbers: list[int]
) -> None:
    keys = [make_key(i) for i in numbers]
    summary = run(corpus, keys, out=tmp_path, shard_rows=17, workers=2)
    rows = rows_of(tmp_path)
    assert parquet.read_schema(tmp_path / "results.parquet").equals(pa.schema(COLUMNS.items()))
    assert len(rows) == summary.documents == len(texts)
    for text, row in zip(texts, rows, strict=True):
        result = assay.detect(text, keys)
        for name in ("n_tokens", "n_scored", "n_repeats_dropped", "scheme"):
            assert row[name] == getattr(result, name)
        for name in ("statistic", "log_pvalue", "log_evalue"):
            assert row[name] == pytest.approx(getattr(result, name), rel=1e-12, abs=1e-12)
        if result.n_scored:  # else no key is better than another
            assert row["key_id"] == result.key_id
    marked = {i for i in range(45, 55) if len(keys) > 1 or i % 2 == 1}
    assert {i for i, row in enumerate(rows) if row["flagged"]} >= marked
    assert {rows[i]["key_id"] for i in marked} == {f"test-{number}" for number in numbers if number < 3}
    assert len({row["doc_id"] for row in rows}) == len(rows)
    assert rows[-1]["source"] == str(corpus / "f")
    assert summary.n_tokens == sum(row["n_tokens"] for row in rows)
    assert summary.n_scored == sum(row["n_scored"] for row in rows)
    assert summary.flagged == sum(row["flagged"] for row in rows)
    assert (summary.exit_code, summary.rejects) == (3, 5)


@pytest.mark.usefixtures("in_process")
def test_q_values_are_those_of_the_whole_corpus(tmp_path: Path, corpus: Path, make_key: MakeKey) -> None:
    run(corpus, make_key(1), out=tmp_path, shard_rows=7, fdr=0.2)
    rows = rows_of(tmp_path)
    p = np.array([row["pvalue"] for row in rows])
    # By the definition; p-values here are far above the smallest float.
    q = [min([1.0] + [len(p) * pj / np.sum(p <= pj) for pj in p if pj >= pi]) for pi in p]
    np.testing.assert_allclose([row["qvalue"] for row in rows], q, rtol=1e-9)
    np.testing.assert_allclose(np.exp([row["log_qvalue"] for row in rows]), q, rtol=1e-9)
    assert [row["flagged"] for row in rows] == [value <= 0.2 for value in q]


@pytest.mark.usefixtures("in_process")
def test_rejects_name_file_line_and_reason_and_never_the_text(
    tmp_path: Path, corpus: Path, make_key: MakeKey, texts: list[str]
) -> None:
    summary = run([corpus], make_key(1), out=tmp_path)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_bytes().splitlines()]
    assert [(Path(r["file"]).name, r["line"], r["reason"]) for r in rejects] == [
        ("a.jsonl", 21, "invalid JSON"),
        ("a.jsonl", 22, "text is not a string"),
        ("b.jsonl.gz", 21, "invalid UTF-8"),
        ("d.parquet", 21, "text is null"),
        ("e.jsonl.zstd", None, "file is damaged"),
    ]
    assert summary.rejects_by_reason == dict.fromkeys((r["reason"] for r in rejects), 1)
    assert json.loads((tmp_path / "summary.json").read_bytes())["rejects"] == 5
    assert RunSummary.read(tmp_path) == summary


@pytest.mark.usefixtures("in_process")
def test_ids_and_sources_from_columns(tmp_path: Path, corpus: Path, make_key: MakeKey) -> None:
    run([corpus / "d.parquet"], make_key(1), out=tmp_path, id_column="key", source_column="origin")
    rows = rows_of(tmp_path)
    assert [row["doc_id"] for row in rows] == [str(i) for i in range(60, 104)]
    assert [row["source"] for row in rows] == ["even" if i % 2 == 0 else None for i in range(60, 104)]
    assert [row["row"] for row in rows] == [i for i in range(1, 46) if i != 21]


def test_processes_and_sizes_of_shards_do_not_show(
    tmp_path: Path, corpus: Path, make_key: MakeKey, request: pytest.FixtureRequest
) -> None:
    for workers in (1, 3):
        run([corpus], make_key(1), out=tmp_path / str(workers), workers=workers, shard_rows=10)
    request.getfixturevalue("in_process")
    run([corpus], make_key(1), out=tmp_path / "big")
    for name in ("results.parquet", "rejects.jsonl", "inputs.jsonl"):
        one, three, big = ((tmp_path / out / name).read_bytes() for out in ("1", "3", "big"))
        assert one == three == big


@pytest.mark.usefixtures("in_process")
def test_very_small_p_values_survive(tmp_path: Path, make_key: MakeKey) -> None:
    (tmp_path / "a.txt").write_text(marked_text(make_key(1), seed=3, words=450, candidates=32))
    run([tmp_path / "a.txt"], make_key(1), out=tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert row["log_pvalue"] < -300 * np.log(10)
    assert (row["log_qvalue"], row["flagged"]) == (row["log_pvalue"], True)


@pytest.mark.usefixtures("in_process")
def test_documents_that_cannot_be_tested_do_not_spoil_the_others(
    tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = KeyTests.results

    def results(self: KeyTests, texts: list[str]) -> dict[str, Any]:
        for text in texts:
            if "PANIC" in text:
                raise BaseException(f"the tokenizer library panics, and quotes {text!r}")
        return original(self, texts)

    monkeypatch.setattr(KeyTests, "results", results)
    write_documents(tmp_path / "a.jsonl", ["good"] * 5 + ["PANIC now"] + ["good"] * 5)
    summary = run([tmp_path / "a.jsonl"], make_key(1), out=tmp_path / "out")
    assert (summary.documents, summary.rejects) == (10, 1)
    rejects = (tmp_path / "out/rejects.jsonl").read_text()
    assert json.loads(rejects)["line"] == 6
    assert json.loads(rejects)["reason"] == "test failed"
    assert "PANIC" not in rejects


def test_a_document_that_kills_its_worker_twice_becomes_a_reject(
    tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, "if 'BOMB' in text: os.kill(os.getpid(), 9)")
    documents = [f"document {i}" for i in range(12)]
    documents[5] = "BOMB"
    write_documents(tmp_path / "a.jsonl", [*documents, None])
    summary = run([tmp_path / "a.jsonl"], make_key(1), out=tmp_path / "out", shard_rows=2, workers=2)
    assert (summary.documents, summary.rejects) == (10, 3)
    assert [row["row"] for row in rows_of(tmp_path / "out")] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_bytes().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejects] == [(5, "worker died"), (6, "worker died"), (13, "text is null")]
    assert rejects[0]["detail"] == "twice, killed by signal 9"


def test_a_worker_that_dies_once_costs_nothing(
    tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the kernel takes a process for its memory: the shard is done again by a fresh one."""
    flag = tmp_path / "died"
    sabotage(
        monkeypatch,
        f"if 'BOMB' in text and not os.path.exists({str(flag)!r}): open({str(flag)!r}, 'w'); os.kill(os.getpid(), 9)",
    )
    write_documents(tmp_path / "a.jsonl", [f"document {i}{' BOMB' * (i == 5)}" for i in range(12)])
    summary = run([tmp_path / "a.jsonl"], make_key(1), out=tmp_path / "out", shard_rows=2, workers=2)
    assert flag.exists()
    assert (summary.documents, summary.rejects) == (12, 0)


def test_workers_that_cannot_start_end_the_run(
    tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_COMMAND", "raise SystemExit(7)")
    write_documents(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(RunError, match="worker processes end while they start \\(exit status 7\\)"):
        run([tmp_path / "a.jsonl"], make_key(1), out=tmp_path / "out")


def test_what_a_worker_refuses_ends_the_run_with_its_message(
    tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sabotage(monkeypatch, "raise ValueError('there is no model at that place.')")
    write_documents(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(RunError, match=r"^there is no model at that place\.$"):
        run([tmp_path / "a.jsonl"], make_key(1), out=tmp_path / "out", workers=1)
    assert capfd.readouterr().err == ""


def test_workers_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pool._start(b"", "GPU-7")
    try:
        environment = Path(f"/proc/{real.process.pid}/environ").read_bytes().split(b"\0")
    finally:
        real.process.kill()
        real.process.wait()
        real.connection.close()
    assert b"CUDA_VISIBLE_DEVICES=GPU-7" in environment

    monkeypatch.setattr(pool, "_start", lambda setup, gpu: pool._Worker(*[None] * 2, gpu))  # type: ignore[list-item]
    five, queue = pool.Pool(b"", 5, ["a", "b"]), Queue(map(Shard, range(5)), 5)
    while queue.read():
        pass
    five.hand_out(queue)
    assert [worker.gpu for worker in five.workers] == ["a", "b", "a", "b", "a"]
    del five.workers[2], five.workers[0]  # two died; the others started long ago
    for survivor in five.workers:
        survivor.ready = True
        survivor.shard = Shard(9)
    five.hand_out(queue)
    assert [worker.gpu for worker in five.workers[3:]] == ["a", "a"]


def sabotage(monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    """Run a statement on each text in the workers before it is tested."""
    patch = f"""
import os
from assay.detection.corpus.key_tests import KeyTests
original = KeyTests.results
def results(self, texts):
    for text in texts:
        {statement}
    return original(self, texts)
KeyTests.results = results
"""
    head, tail = pool._COMMAND.split("from assay.detection.corpus.worker import main")
    monkeypatch.setattr(pool, "_COMMAND", f"{head}{patch}\nfrom assay.detection.corpus.worker import main{tail}")


def write_documents(path: Path, texts: list[str | None]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_nothing_is_left_of_the_secret(tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a file, an argument or the environment of a worker, whose environment lacks the passphrase as well."""
    key = make_key(1)
    words = use_key(key)
    secrets = [key._secret, words.tobytes(), key._secret.hex().encode(), words.tobytes().hex().encode(), b"hunter2"]
    secrets += [str(word).encode() for word in words.tolist()]
    monkeypatch.setenv("ASSAY_PASSPHRASE", "hunter2")
    write_documents(tmp_path / "a.jsonl", ["some text " * 500] * 150)
    failures: list[BaseException] = []

    def test() -> None:
        try:
            run([tmp_path / "a.jsonl"], key, out=tmp_path / "out", shard_rows=3, workers=1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=test)
    seen = b""
    thread.start()
    while thread.is_alive():
        for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for pid in child.read_text().split():
                for name in ("cmdline", "environ"):
                    try:
                        seen += Path(f"/proc/{pid}/{name}").read_bytes()
                    except OSError:
                        continue
        time.sleep(0.02)
    thread.join()
    assert not failures
    assert b"TOKENIZERS_PARALLELISM=false" in seen  # a worker was looked at
    for path in (tmp_path / "out").rglob("*"):
        seen += path.read_bytes() if path.is_file() else b""
    assert not [secret for secret in secrets if secret in seen]


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """multiprocessing's spawn would start the script again in every worker."""
    write_documents(tmp_path / "a.jsonl", ["x", "y"])
    script = tmp_path / "script.py"
    script.write_text(
        "from assay import SecretKey\n"
        "from assay.detection.corpus import run\n"
        f"print(run({str(tmp_path / 'a.jsonl')!r}, SecretKey.generate(), out={str(tmp_path / 'out')!r}).documents)\n"
    )
    for command in ([str(script)], ["-"]):
        done = subprocess.run(
            [sys.executable, *command],
            input=script.read_text().replace("/out'", "/out2'"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fdr": 0.0}, r"fdr must be in \(0, 1\), got 0.0"),
        ({"fdr": float("nan")}, r"fdr must be in \(0, 1\), got nan"),
        ({"shard_rows": 0}, "shard_rows must be an integer of at least 1, got 0"),
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"keys": []}, "keys must be a SecretKey"),
        ({"keys": "k"}, "keys must be a SecretKey"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "none is at"),
    ],
)
def test_bad_arguments(tmp_path: Path, make_key: MakeKey, change: dict[str, Any], message: str) -> None:
    write_documents(tmp_path / "a.jsonl", ["x"])
    options = {"keys": make_key(1), "out": tmp_path / "out"} | change
    with pytest.raises(ValueError, match=message):
        run([tmp_path / "a.jsonl"], options.pop("keys"), **options)
    assert not (tmp_path / "out").exists()


def test_two_keys_with_one_id(tmp_path: Path, make_key: MakeKey) -> None:
    twin = SecretKey(b"x" * 32, id="test-1", config=GumbelConfig())
    write_documents(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ValueError, match="keys must have different ids"):
        run([tmp_path / "a.jsonl"], [make_key(1), twin], out=tmp_path / "out")


@pytest.mark.usefixtures("in_process")
def test_a_keyring_tests_active_and_retired_keys(tmp_path: Path, make_key: MakeKey) -> None:
    ring = Keyring.in_memory()
    for number in (1, 2, 3):
        ring.add(make_key(number))
    ring.revoke("test-2")
    ring.rotate("test-3", "test-4")
    (tmp_path / "a.txt").write_text(marked_text(make_key(3), seed=4))
    summary = run(tmp_path / "a.txt", ring, out=tmp_path / "out")
    assert [key["id"] for key in summary.keys] == ["test-1", "test-3", "test-4"]
    assert rows_of(tmp_path / "out")[0]["key_id"] == "test-3"


@pytest.mark.slow
def test_unmarked_corpora_of_shared_passages_are_rarely_flagged(human_text: str, make_key: MakeKey) -> None:
    """With no marked document every flag is false, so a corpus may have one with probability 0.1 at most.

    1000 keys on 200 overlapping passages, four copies of each: the count of corpora with a flag is below
    Binomial(1000, 0.1), whose upper 1e-6 quantile is 148. Near-miss: flags at p <= 0.1 mark nearly every corpus.
    """
    starts = np.arange(50) * 300
    passages = [human_text[a : a + 900] for a in starts] * 4
    ids, offsets = load_tokenizer().encode_batch(passages)
    flagged, uncorrected = 0, 0
    for number in range(1000):
        log_p = documents_test(ids, offsets, use_key(make_key(number)), GumbelConfig()).log_pvalue
        flagged += bool(np.any(benjamini_hochberg(log_p) <= np.log(0.1)))
        uncorrected += bool(np.any(log_p <= np.log(0.1)))
    assert flagged <= 148
    assert uncorrected > 900


@pytest.mark.usefixtures("in_process")
def test_files_of_other_formats_are_counted(tmp_path: Path, make_key: MakeKey) -> None:
    (tmp_path / "corpus").mkdir()
    write_documents(tmp_path / "corpus/a.jsonl", ["x"])
    for name in ("notes.docx", "old.csv.gz", ".hidden"):
        (tmp_path / "corpus" / name).write_bytes(b"x")
    run(tmp_path / "corpus", make_key(1), out=tmp_path / "out")
    assert RunSummary.read(tmp_path / "out").files_skipped == 2


@pytest.mark.usefixtures("in_process")
def test_files_without_documents(tmp_path: Path, make_key: MakeKey) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(RunError, match="the 1 input files hold no document"):
        run([tmp_path / "a.jsonl"], make_key(1), out=tmp_path / "out")
    write_documents(tmp_path / "b.jsonl", [None])
    summary = run([tmp_path / "b.jsonl"], make_key(1), out=tmp_path / "out2")
    assert (summary.documents, summary.rejects, summary.exit_code) == (0, 1, 3)
    assert rows_of(tmp_path / "out2") == []
    assert parquet.read_schema(tmp_path / "out2/results.parquet").names == list(COLUMNS)


# The command.


@pytest.fixture
def command(tmp_path: Path, make_key: MakeKey) -> Callable[..., subprocess.Popen[str]]:
    with pytest.warns(UserWarning, match="not encrypted"):
        ring = Keyring.create(tmp_path / "keys.json", development=True)
    for number in (1, 2):
        ring.add(make_key(number))
    ring.revoke("test-2")

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "assay", "detect", *map(str, arguments)],
            env=os.environ | {"ASSAY_KEYRING": str(tmp_path / "keys.json")},
            cwd=tmp_path,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options,
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, messages = process.communicate(timeout=60)
    return process.returncode, output, messages


def test_one_text_prints_one_result(tmp_path: Path, command: Callable[..., Any], make_key: MakeKey) -> None:
    text = marked_text(make_key(1), seed=1)
    (tmp_path / "a.txt").write_text("\ufeff" + text)
    code, output, _ = finish(command("a.txt", "--key", "all"))
    assert code == 0
    expected = assay.detect(text, make_key(1))
    assert assay.TestResult.from_dict(json.loads(output)) == expected
    code, output, messages = finish(command("a.txt", "--key", "test-2"))
    assert (code, json.loads(output)["key_id"]) == (0, "test-2")
    assert "key 'test-2' is revoked" in messages


def test_a_corpus_to_a_folder(tmp_path: Path, command: Callable[..., Any]) -> None:
    write_documents(tmp_path / "a.jsonl", ["one", "two"])
    code, output, _ = finish(command("*.jsonl", "--key", "test-1", "--out", "results", "--workers", "1"))
    assert (code, json.loads(output)["documents"]) == (0, 2)
    write_documents(tmp_path / "b.jsonl", ["one", None])
    code, output, _ = finish(command("b.jsonl", "--key", "test-1", "--out", "results2", "--json"))
    assert (code, json.loads(output)["rejects"]) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "--key", "test-1", "--out", "o"], 1, "no file or folder 'nowhere'"),
        (["a.jsonl", "--key", "test-9", "--out", "o"], 1, "got 'test-9'"),
        (["a.jsonl", "--key", "test-1"], 2, "is a corpus: give --out"),
        (["a.txt", "a.jsonl", "--key", "test-1"], 2, "give --out"),
        (["a.jsonl", "--key", "all", "--key", "test-1", "--out", "o"], 2, "alone"),
        (["a.jsonl", "--key", "test-1", "--out", "o", "--fdr", "2"], 2, "fdr must be in"),
        (["bad.txt", "--key", "test-1"], 1, "text must be UTF-8"),
        (["none.txt", "--key", "test-1"], 1, "No such file"),
    ],
)
@pytest.mark.usefixtures("command")
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_KEYRING", "keys.json")
    write_documents(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    done = CliRunner().invoke(app, ["detect", *arguments])
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.replace("\u2502", "").split())


def test_control_c_leaves_a_run_that_resumes(tmp_path: Path, command: Callable[..., Any]) -> None:
    write_documents(tmp_path / "a.jsonl", [f"document {i} " + "and some more words " * 100 for i in range(600)])
    arguments = ("a.jsonl", "--key", "test-1", "--out", "results", "--shard-rows", "20", "--workers", "2")
    process = command(*arguments, start_new_session=True)
    manifest = tmp_path / "results/ledger/manifest.jsonl"
    while not manifest.exists() or manifest.read_bytes().count(b'"shard"') < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    code, output, messages = finish(process)
    assert (code, output) == (130, "")
    assert messages.endswith("interrupted; the same command resumes the run in results\n")
    code, output, _ = finish(command(*arguments))
    assert code == 0
    assert (json.loads(output)["documents"], json.loads(output)["resumed"]) == (600, True)


@pytest.mark.parametrize("delay", [0, 0.15, 0.4])
def test_control_c_while_workers_start_is_one_line(tmp_path: Path, command: Callable[..., Any], delay: float) -> None:
    write_documents(tmp_path / "a.jsonl", ["text " * 500] * 2000)
    process = command("a.jsonl", "--key", "test-1", "--out", "results", "--workers", "1", start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None
    time.sleep(delay)  # the worker is to be hit before, in and after its imports, where it would show a traceback
    os.killpg(process.pid, signal.SIGINT)
    code, output, messages = finish(process)
    assert (code, output) == (130, "")
    warning, *rest = messages.splitlines()
    assert "not encrypted" in warning
    assert rest == ["interrupted; the same command resumes the run in results"]


def test_progress_on_a_terminal(tmp_path: Path, command: Callable[..., Any]) -> None:
    write_documents(tmp_path / "a.jsonl", ["some words " * 50] * 200)
    master, slave = os.openpty()
    process = command("a.jsonl", "--key", "test-1", "--out", "o", "--workers", "1", stderr=slave, stdout=slave)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:
        pass  # the other end was closed
    os.close(master)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "200 documents" in text
    assert "100%" in text
    assert "200 documents read, 0 flagged at a false discovery rate of 0.01." in text
