"""The ledger: torn rows, crashes at every step, the lock, what is pinned."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from assay._errors import RunError
from assay.detection.corpus import RunSummary, engine, ledger, pool, run
from assay.detection.corpus.ledger import open_ledger, write_atomically
from assay.detection.corpus.pool import Lost
from assay.detection.corpus.shards import Shard
from assay.detection.corpus.subject import Setup
from assay.detection.corpus.worker import shard_results, write_shard
from assay.watermark.keys import SecretKey

MakeKey = Callable[..., SecretKey]


class Crash(BaseException):
    """The machine stops: nothing after it is executed."""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test shards in this process, in an order that is not theirs, so that a crash can be put at any step."""

    def work(shards: Iterator[Shard], setup: Setup, count: int) -> Iterator[Any]:
        test = setup.tests.open()
        for pair in iter(lambda: list(itertools.islice(shards, 2)), []):
            for shard in reversed(pair):
                yield write_shard(shard, *shard_results(shard, test), setup)

    monkeypatch.setattr(pool, "work", work)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of 13 and 9 rows, three of them bad, and an empty one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [json.dumps({"text": f"A short text, number {i}, about nothing in particular."}) for i in range(22)]
    rows[4] = "{bad"
    rows[12] = '{"body": 1}'
    rows[21] = '{"text": null}'
    (folder / "a.jsonl").write_text("\n".join(rows[:13]) + "\n\n")
    (folder / "b.jsonl").write_text("\n".join(rows[13:]))
    (folder / "c.jsonl").write_text("\n")
    return folder


@pytest.fixture
def test_it(corpus: Path, make_key: MakeKey) -> Callable[..., RunSummary]:
    def start(out: Path, **options: Any) -> RunSummary:
        return run([corpus], make_key(1), out=out, **{"shard_rows": 4, "workers": 1, "progress": False} | options)

    return start


def outcome(out: Path) -> tuple[bytes, bytes, bytes]:
    """Everything that a run leaves, apart from the summary's times. Byte by byte: rows, their order and q-values."""
    return tuple((out / name).read_bytes() for name in ("results.parquet", "rejects.jsonl", "inputs.jsonl"))  # type: ignore[return-value]


@pytest.mark.usefixtures("in_process")
def test_a_crash_at_every_step_loses_and_doubles_nothing(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write, fsync, rename and unlink of a whole run is made the first that does not happen; writes of the
    manifest are also torn in the middle.
    """
    test_it(tmp_path / "whole", shard_rows=8)
    expected = outcome(tmp_path / "whole")
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "unlink", "ftruncate")}
    calls: list[str] = []
    crash: dict[str, Any] = {"at": None, "torn": False}

    def watch(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if crash["at"] is None or len(calls) < crash["at"]:
                return real[name](*args, **kwargs)
            if crash["torn"] and len(calls) == crash["at"]:
                real[name](args[0], args[1][: len(args[1]) // 2])
            raise Crash  # also at every later step: clean-up code does not run when the machine has stopped

        return call

    for name in real:
        monkeypatch.setattr(os, name, watch(name))
    test_it(tmp_path / "counted", shard_rows=8)
    steps = list(calls)
    assert len(steps) > 35
    for torn in (False, True):
        for at in [i for i, name in enumerate(steps, 1) if name == "write" or not torn]:
            out = tmp_path / f"{torn}-{at}"
            calls.clear()
            crash.update(at=at, torn=torn)
            with pytest.raises(Crash):
                test_it(out, shard_rows=8)
            crash.update(at=None)
            summary = test_it(out, shard_rows=8)
            assert outcome(out) == expected, (torn, at, steps[at - 1])
            assert (summary.documents, summary.rejects) == (19, 3)
            assert list((out / "ledger/shards").iterdir()) == []
            assert not list(out.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name an open file")
@pytest.mark.usefixtures("in_process")
def test_everything_is_on_the_disk_before_the_manifest_says_so(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut can keep a late write and lose an early one, unless fsync came between."""
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}
    pending: set[str] = set()  # names whose content or directory entry may not be on the disk
    rows: list[bytes] = []
    manifest = str(tmp_path / "out/ledger/manifest.jsonl")

    def replace(source: Any, target: Any) -> None:
        assert manifest not in pending, "a row counted before it was on the disk"
        assert str(source) not in pending, "renamed before its content was on the disk"
        pending.add(str(Path(target).parent))
        real["replace"](source, target)

    def write(handle: int, data: bytes) -> int:
        assert not pending, "a row was written before what it speaks of was on the disk"
        rows.append(bytes(data))
        if b'"kind":"input"' not in data:
            pending.add(manifest)
        return real["write"](handle, data)  # type: ignore[no-any-return]

    def fsync(handle: int) -> None:
        pending.discard(os.readlink(f"/proc/self/fd/{handle}"))
        real["fsync"](handle)

    original = Path.with_name

    def with_name(self: Path, name: str) -> Path:
        pending.add(str(original(self, name)))  # the temporary name of `writing_atomically`
        return original(self, name)

    monkeypatch.setattr(ledger.Path, "with_name", with_name)
    for name, watched in (("replace", replace), ("write", write), ("fsync", fsync)):
        monkeypatch.setattr(os, name, watched)
    test_it(tmp_path / "out")
    assert sum(b'"kind":"shard"' in row for row in rows) == 6
    assert b'"kind":"finished"' in rows[-1]
    assert not pending


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("length", range(0, 90, 7))
def test_a_torn_last_row_is_done_again(tmp_path: Path, test_it: Callable[..., RunSummary], length: int) -> None:
    test_it(tmp_path / "whole")
    out = stopped_run(tmp_path, test_it, after_shards=3)
    manifest = out / "ledger/manifest.jsonl"
    rows = manifest.read_bytes().splitlines(keepends=True)
    last = max(i for i, row in enumerate(rows) if b'"shard"' in row)
    manifest.write_bytes(b"".join(rows[:last]) + rows[last][:length])
    test_it(out)
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "garbage",
    [b"\x00" * 64, b"\x00" * 64 + b"\n", b"[1]\n", b'{"kind": "sha', b'{"kind":"input","file":0,"sha256":null}'],
    ids=["zeros", "line of zeros", "no row", "torn", "no newline"],
)
def test_garbage_at_the_end_is_cut_off(tmp_path: Path, test_it: Callable[..., RunSummary], garbage: bytes) -> None:
    test_it(tmp_path / "whole")
    out = stopped_run(tmp_path, test_it, after_shards=3)
    with (out / "ledger/manifest.jsonl").open("ab") as handle:
        handle.write(garbage)
    assert test_it(out).resumed
    assert outcome(out) == outcome(tmp_path / "whole")
    rows = (out / "ledger/manifest.jsonl").read_bytes().splitlines()
    assert all(isinstance(json.loads(row), dict) for row in rows)


@pytest.mark.usefixtures("in_process")
def test_what_is_done_is_not_tested_again(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_run(tmp_path, test_it, after_shards=3)  # 1, 0 and 3: shards finish in any order
    inner, tested = pool.work, []

    def work(shards: Iterator[Shard], setup: Setup, count: int) -> Iterator[Any]:
        for record in inner(shards, setup, count):
            tested.append(record.shard)
            yield record

    monkeypatch.setattr(pool, "work", work)
    test_it(out)
    assert sorted(tested) == [2, 4, 5]


def stopped_run(tmp_path: Path, test_it: Callable[..., RunSummary], after_shards: int) -> Path:
    out = tmp_path / "stopped"
    original = ledger.Ledger.record_shard

    def record(self: ledger.Ledger, one: ledger.ShardRecord) -> None:
        original(self, one)
        if len(self.shards) == after_shards:
            raise Crash

    ledger.Ledger.record_shard = record  # type: ignore[method-assign]
    try:
        with pytest.raises(Crash):
            test_it(out)
    finally:
        ledger.Ledger.record_shard = original  # type: ignore[method-assign]
    return out


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("damage", ["changed", "removed", "rejects removed", "unlisted"])
def test_shards_that_are_not_what_the_manifest_says_are_done_again(
    tmp_path: Path, test_it: Callable[..., RunSummary], damage: str
) -> None:
    test_it(tmp_path / "whole")
    out = stopped_run(tmp_path, test_it, after_shards=3)
    shards = out / "ledger/shards"
    first = shards / "shard-00000000.parquet"
    if damage == "changed":
        parquet.write_table(parquet.read_table(first).slice(1), first)
    elif damage == "removed":
        first.unlink()
    elif damage == "rejects removed":
        (shards / "shard-00000001.rejects.jsonl").unlink()
    else:
        # Left by a worker whose parent was killed before it could write the manifest's row.
        parquet.write_table(pa.table({"nonsense": [1]}), shards / "shard-00000004.parquet")
        (shards / ".shard-00000004.parquet.123.tmp").write_bytes(b"half")
    test_it(out)
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("in_process")
def test_a_shard_changed_during_the_run_is_noticed(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.combine

    def combine(book: ledger.Ledger, *args: Any, **kwargs: Any) -> Any:
        path = book.folder / "shards/shard-00000001.parquet"
        parquet.write_table(parquet.read_table(path).slice(1), path)
        return original(book, *args, **kwargs)

    monkeypatch.setattr(engine, "combine", combine)
    with pytest.raises(RunError, match=r"was changed by something else\. The same command tests it again"):
        test_it(tmp_path / "out")
    monkeypatch.undo()
    assert test_it(tmp_path / "out").documents == 19


@pytest.mark.usefixtures("in_process")
def test_a_finished_run_is_not_repeated_unless_its_output_changed(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = test_it(out)
    expected = outcome(out)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "work", lambda *args: pytest.fail("tested again"))
        again = test_it(out)
        assert again == first
        assert (first.already_finished, again.already_finished) == (False, True)
    for name in ("results.parquet", "rejects.jsonl", "inputs.jsonl", "summary.json"):
        (out / name).write_bytes(b"something else")
        test_it(out)
        assert outcome(out) == expected


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "body"}, "options.columns.text was 'text' and is 'body'"),
        ({"id_column": "id"}, "options.columns.id was None and is 'id'"),
        ({"fdr": 0.05}, "options.fdr was 0.01 and is 0.05"),
        ({"shard_rows": 5}, "options.shard_rows was 4 and is 5"),
    ],
)
def test_a_run_begun_with_something_else_is_refused(
    tmp_path: Path, test_it: Callable[..., RunSummary], change: dict[str, Any], message: str
) -> None:
    out = stopped_run(tmp_path, test_it, after_shards=1)
    with pytest.raises(RunError, match=f"mixed: {message}. Run the command it was begun with, choose another --out"):
        test_it(out, **change)
    assert test_it(out, workers=3, progress=True).documents == 19  # these two change nothing


@pytest.mark.usefixtures("in_process")
def test_another_rate_alone_needs_no_new_run(tmp_path: Path, test_it: Callable[..., RunSummary]) -> None:
    out = tmp_path / "out"
    test_it(out)
    message = rf"fdr was 0\.01 and is 0\.2\. No text .* qvalue is at most 0\.2, or run `assay report {out} --fdr 0\.2"
    with pytest.raises(RunError, match=message):
        test_it(out, fdr=0.2)
    with pytest.raises(RunError, match=r"would be mixed: options\.fdr was 0\.01 and is 0\.2; options\.shard_rows"):
        test_it(out, fdr=0.2, shard_rows=5)


@pytest.mark.usefixtures("in_process")
def test_other_keys_tokenizers_inputs_and_versions_are_refused(
    tmp_path: Path,
    corpus: Path,
    make_key: MakeKey,
    test_it: Callable[..., RunSummary],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = stopped_run(tmp_path, test_it, after_shards=1)
    options: dict[str, Any] = {"out": out, "shard_rows": 4, "workers": 1}
    with pytest.raises(RunError, match=r"keys.test-1 was 'gumbel/1 .* is 'not there'; keys.test-2 was 'not there'"):
        run([corpus], make_key(2), **options)
    with pytest.raises(RunError, match=r'"window":4.*"window":5'):
        run([corpus], SecretKey(b"x" * 32, id="test-1", config=type(make_key().config)(window=5)), **options)
    with pytest.raises(RunError, match=r"tokenizer\.sha256 was"):
        test_it(out, tokenizer=other_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(engine, "__version__", "9.9")
        with pytest.raises(RunError, match=r"version was '.*' and is '9\.9'"):
            test_it(out)
    with (corpus / "b.jsonl").open("a") as handle:
        handle.write("\n")
    (corpus / "d.txt").write_text("new")
    (corpus / "c.jsonl").unlink()
    with pytest.raises(RunError, match=r"input .*c\.jsonl is gone; input .*d\.txt is new; input .*b\.jsonl changed"):
        test_it(out)


def other_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


@pytest.mark.usefixtures("in_process")
def test_two_processes_do_not_write_to_one_folder(tmp_path: Path, test_it: Callable[..., RunSummary]) -> None:
    out = tmp_path / "out"
    holder = f"""
import sys, pathlib
from assay.detection.corpus.ledger import open_ledger
with open_ledger(pathlib.Path({str(out)!r}), {{}}, []):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="another process is writing to"):
            test_it(out)
        process.kill()
    with pytest.raises(RunError, match="was begun with something else"):  # the lock died with its holder
        test_it(out)


def test_output_that_cannot_be_written(tmp_path: Path, test_it: Callable[..., RunSummary]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"out must be a folder that can be written, .* Not a directory"):
        test_it(tmp_path / "file" / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.parquet").write_text("not ours")
    with pytest.raises(RunError, match="holds results of something else"):
        test_it(tmp_path / "other")
    assert (tmp_path / "other/results.parquet").read_text() == "not ours"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("name", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_failing_disk_stops_the_run_with_advice_and_resumes(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    out = stopped_run(tmp_path, test_it, after_shards=2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(RunError, match=f"cannot be written: {os.strerror(code)}.*the same command resumes"):
            test_it(out)
    assert test_it(out).documents == 19


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    with open_ledger(tmp_path, {}, []):
        pass
    path = tmp_path / "ledger/manifest.jsonl"
    path.write_bytes(path.read_bytes().replace(b"corpus-ledger/1", b"corpus-ledger/9"))
    with pytest.raises(RunError, match=r"'assay\.corpus-ledger/9'"), open_ledger(tmp_path, {}, []):
        pass


def test_write_atomically_keeps_the_old_file_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args: Any) -> None:
        raise Crash

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Crash):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("in_process")
def test_documents_of_a_lost_shard_are_rejects(
    tmp_path: Path, test_it: Callable[..., RunSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pool.work

    def work(shards: Iterator[Shard], setup: Setup, count: int) -> Iterator[Any]:
        first = next(shards)
        yield Lost(first, "killed by signal 9")
        second = next(shards)
        yield Lost(second, "killed by signal 9")
        yield from original(shards, setup, count)

    monkeypatch.setattr(pool, "work", work)
    summary = test_it(tmp_path / "out")
    assert (summary.documents, summary.rejects) == (12, 10)
    assert summary.rejects_by_reason["worker died"] == 7
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejects[:8]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rejects[0]["detail"] == "twice, killed by signal 9"
