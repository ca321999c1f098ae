"""Corpora in object stores, against a real S3 server on this machine: inputs by URI, results copied up."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest
from pyarrow import fs, parquet

from assay._errors import RunError
from assay.detection.corpus import run, stores
from assay.detection.corpus.reading import Columns, Document, Reject, read
from assay.detection.corpus.sources import check_unchanged, find_inputs
from assay.watermark.keys import SecretKey

MakeKey = Callable[..., SecretKey]
OUTPUTS = ("results.parquet", "rejects.jsonl", "inputs.jsonl", "summary.json")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of moto's S3 server."""
    pytest.importorskip("moto", reason="the S3 server of these tests is moto's: pip install 'moto[server]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store as a user's environment names it, with an empty bucket named corpora."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = fs.S3FileSystem(endpoint_override=server, allow_bucket_creation=True, allow_bucket_deletion=True)
    store.create_dir("corpora")
    yield store
    store.delete_dir("corpora")


def put(store: Any, path: str, data: bytes) -> None:
    with store.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def get(store: Any, path: str) -> bytes:
    with store.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


@pytest.fixture
def corpus(tmp_path: Path, human_text: str) -> Path:
    """A folder with every format, damage, names that need quoting, and what is no input."""
    folder = tmp_path / "corpus"
    (folder / "b/sub").mkdir(parents=True)
    texts = [human_text[500 * i : 500 * i + 400] for i in range(12)]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    (folder / "b/a.jsonl").write_bytes(b"\n".join([*lines[:4], b"{bad"]))
    (folder / "b/sub/c d%20?#ä.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[4:6])))
    (folder / "b/cut.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[6:8]))[:-9])
    parquet.write_table(pa.table({"text": texts[8:]}), folder / "a.parquet", row_group_size=3)
    (folder / "damaged.parquet").write_bytes((folder / "a.parquet").read_bytes()[:200] + b"PAR1")
    (folder / "b-c.txt").write_text(texts[0])
    (folder / "b/.hidden.txt").write_text("no input")
    (folder / "b/readme.md").write_text("no input")
    return folder


def upload(store: Any, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            put(store, f"corpora/in/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_a_store_reads_like_the_same_folder(s3: Any, corpus: Path) -> None:
    upload(s3, corpus)
    here, there = find_inputs([corpus]), find_inputs(["s3://corpora/in"])
    assert len(there) == 6
    assert [str(file.path).removeprefix("corpora/in/") for file in there] == [
        Path(file.path).relative_to(corpus).as_posix() for file in here
    ]
    assert [file.size for file in there] == [file.size for file in here]
    hashes: tuple[dict[int, str | None], dict[int, str | None]] = ({}, {})
    ours = list(read(here, Columns(), finished=hashes[0].__setitem__))
    theirs = list(read(there, Columns(), finished=hashes[1].__setitem__))
    assert [row.text for row in ours if isinstance(row, Document)] == [
        row.text for row in theirs if isinstance(row, Document)
    ]
    facts = [
        [(row.file, row.row, row.reason, row.detail) for row in rows if isinstance(row, Reject)]
        for rows in (ours, theirs)
    ]
    assert facts[0] == facts[1]
    assert {reason for _, _, reason, _ in facts[0]} == {"invalid JSON", "file is damaged"}
    assert hashes[0] == hashes[1]
    for position in [(0, 2), (1, 0), (3, 1)]:  # as a resumed run does
        left = len(list(read(here, Columns(), after=position)))
        assert len(list(read(there, Columns(), after=position))) == left


def test_names_can_be_given_again(s3: Any, corpus: Path) -> None:
    """Reports read a run's inputs by their names in its results."""
    upload(s3, corpus)
    for file in find_inputs(["s3://corpora/in"]):
        (again,) = find_inputs([file.name])
        assert (again.path, again.size) == (file.path, file.size)


def test_options_of_the_uri_are_used_and_not_shown(
    s3: Any, server: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, corpus)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = server.removeprefix("http://")
    (file,) = find_inputs([f"s3://corpora/in/b-c.txt?endpoint_override={host}&scheme=http"])
    assert file.name == "s3://corpora/in/b-c.txt"
    assert next(read([file], Columns())).name == file.name


def test_objects_and_files_mix_and_count_once(s3: Any, corpus: Path) -> None:
    upload(s3, corpus)
    found = find_inputs([str(corpus / "b-c.txt"), "s3://corpora/in/b-c.txt", "s3://corpora/in/b/", "s3://corpora/in/b"])
    assert len(found) == 2 + 3


def test_what_cannot_be_an_input(s3: Any, corpus: Path) -> None:
    upload(s3, corpus)
    for uri, message in [
        ("s3://corpora/none", "no object and no folder"),
        ("s3://corpora/in/*.txt", "Patterns are for files"),
        ("s3://no-such-bucket/x", "no object and no folder"),
        ("s3://corpora/in/b/readme.md", "must be objects that end in"),
        ("ftp://host/x.txt", "must be paths or URIs"),
        ("s3://corpora/in?no_such_option=1", "no_such_option"),
    ]:
        with pytest.raises(RunError, match=message):
            find_inputs([uri])
    with pytest.raises(RunError, match="must not hold credentials") as caught:
        find_inputs(["s3://testing:hunter2@corpora/in"])
    assert "hunter2" not in str(caught.value)


def test_an_object_that_changes_is_refused(s3: Any, corpus: Path) -> None:
    upload(s3, corpus)
    (file,) = find_inputs(["s3://corpora/in/b-c.txt"])
    check_unchanged(file)
    put(s3, "corpora/in/b-c.txt", b"another length")
    with pytest.raises(RunError, match="changed during the run"):
        check_unchanged(file)
    s3.delete_file("corpora/in/b-c.txt")
    with pytest.raises(RunError, match="changed during the run"):
        list(read([file], Columns()))


@pytest.mark.parametrize("name", ["a.parquet", "b/a.jsonl", "b/sub/c d%20?#ä.jsonl.gz"])
def test_a_broken_connection_is_no_damage(s3: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In a file the same failure is a reject; here it would lose documents for a moment's weather."""
    upload(s3, corpus)
    file = next(file for file in find_inputs(["s3://corpora/in"]) if str(file.path).endswith(name))

    def broken(self: Any, buffer: Any) -> int:
        with stores._asking("paths", "s3://corpora/in/x"):
            raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(stores.OpenObject, "readinto", broken)
    with pytest.raises(RunError, match=r"NETWORK_CONNECTION.* the same command resumes"):
        list(read([file], Columns()))


def rows_of(out: Path) -> list[dict[str, Any]]:
    table = parquet.read_table(out / "results.parquet").drop(["doc_id", "source", "file"])
    return table.to_pylist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("in_process")
def test_a_run_from_store_to_store(s3: Any, corpus: Path, tmp_path: Path, make_key: MakeKey) -> None:
    upload(s3, corpus)
    run(corpus, make_key(1), out=tmp_path / "here", shard_rows=3)
    summary = run("s3://corpora/in", make_key(1), out=tmp_path / "out", shard_rows=3, copy_to="s3://corpora/results/1")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "here")
    assert summary.documents == 12
    assert {name: get(s3, f"corpora/results/1/{name}") for name in OUTPUTS} == {
        name: (tmp_path / "out" / name).read_bytes() for name in OUTPUTS
    }
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


def sorted_bytes(out: Path, short: Callable[[str], str]) -> tuple[bytes, bytes]:
    """Results and rejects sorted by file and row, with files named by `short`."""
    table = parquet.read_table(out / "results.parquet")
    for name in ("file", "source", "doc_id"):
        names = [short(value) for value in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(names))
    table = table.sort_by([("file", "ascending"), ("row", "ascending")]).combine_chunks()
    with pa.BufferOutputStream() as stream:
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        results = stream.getvalue().to_pybytes()
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().splitlines()]
    lines = [json.dumps(reject | {"file": short(reject["file"])}) for reject in rejects]
    return results, "\n".join(sorted(lines)).encode()


@pytest.mark.slow
def test_a_run_from_store_to_store_on_a_cluster(s3: Any, corpus: Path, tmp_path: Path, make_key: MakeKey) -> None:
    """Against the local engine on the same files in a folder."""
    pytest.importorskip("ray", reason="this test starts a Ray cluster: pip install 'assay[ray]'")
    rows = [{"text": f"{i} is the number of this row. " * (i % 40)} for i in range(400)]
    (corpus / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"shard_rows": 20, "progress": False}
    upload(s3, corpus)
    here, there = tmp_path / "here", tmp_path / "there"
    run(corpus, make_key(1), out=here, **options)
    summary = run(
        "s3://corpora/in",
        make_key(1),
        out=there,
        engine="ray",
        ray_address="local",
        workers=2,
        copy_to="s3://corpora/results/ray",
        **options,
    )
    assert summary.documents == 412
    assert set(summary.rejects_by_reason) == {"invalid JSON", "file is damaged"}
    ours = sorted_bytes(here, lambda name: name.removeprefix(str(corpus)))
    assert sorted_bytes(there, lambda name: unquote(name.removeprefix("s3://corpora/in"))) == ours
    assert b"b/sub/c d%20?#" in ours[0]
    assert {name: get(s3, f"corpora/results/ray/{name}") for name in OUTPUTS} == {
        name: (there / name).read_bytes() for name in OUTPUTS
    }


@pytest.mark.usefixtures("in_process")
def test_a_copy_that_fails_leaves_no_summary_and_is_made_again(
    s3: Any, corpus: Path, tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"out": tmp_path / "out", "copy_to": "s3://corpora/results"}
    put(s3, "corpora/results/summary.json", b"of an older run")
    copy, calls = fs.copy_files, []

    def failing(source: str, target: str, *stores: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("AWS Error SLOW_DOWN")
        copy(source, target, *stores)

    def cut_short(source: str, target: str, ours: Any, theirs: Any) -> None:
        put(theirs, target, Path(source).read_bytes()[:-1])

    for fault, message in [(failing, "SLOW_DOWN"), (cut_short, "results.parquet is not what was sent")]:
        monkeypatch.setattr(fs, "copy_files", fault)
        with pytest.raises(RunError, match=message):
            run(corpus / "b-c.txt", make_key(1), **options)
        there = s3.get_file_info([f"corpora/results/{name}" for name in OUTPUTS])
        assert [info.is_file for info in there] == [True, False, False, False]
    monkeypatch.setattr(fs, "copy_files", copy)
    run(corpus / "b-c.txt", make_key(1), **options)
    assert get(s3, "corpora/results/summary.json") == (tmp_path / "out/summary.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "s3://corpora/out"}, "out must be a folder: a ledger needs rename and append"),
        ({"copy_to": "results"}, "copy_to must be a URI"),
        ({"copy_to": "s3://testing:hunter2@corpora/x"}, "must not hold credentials"),
    ],
)
def test_places_that_cannot_hold_results(
    corpus: Path, tmp_path: Path, make_key: MakeKey, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        run(corpus, make_key(1), **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()
