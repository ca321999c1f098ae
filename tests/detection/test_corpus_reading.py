"""Every format to the same documents; rows and files that cannot be read become rejects, and the stream goes on."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from assay._errors import RunError, TextError
from assay.detection.corpus.reading import Columns, Document, Reject, Row, read, read_packed
from assay.detection.corpus.shards import Shard, cut
from assay.detection.corpus.sources import find_inputs

TEXTS = [f'text {i} é \U0001f600\n\t"' for i in range(50)]
PRIVATE = "PRIVATE-CONTENT"


def lines(texts: list[str]) -> bytes:
    fields = ({"text": text, "n": i} for i, text in enumerate(texts))
    return b"".join(json.dumps(each, ensure_ascii=each["n"] % 2 == 0).encode() + b"\n" for each in fields)


def rows_of(*paths: Path, after: tuple[int, int] = (0, 0), **columns) -> list[Row]:
    return list(read(find_inputs(paths), Columns(**columns), after=after))


def texts_of(rows: list[Row]) -> list[str]:
    assert all(isinstance(row, Document) for row in rows), [row for row in rows if isinstance(row, Reject)]
    return [row.text for row in rows]


def write_zst(path: Path, data: bytes) -> None:
    path.write_bytes(zstandard.ZstdCompressor().compress(data))


def write_parquet(path: Path, data: bytes) -> None:
    table = pa.Table.from_pylist([json.loads(line) for line in data.splitlines()])
    parquet.write_table(table, path, row_group_size=7)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    ".jsonl": Path.write_bytes,
    ".ndjson": Path.write_bytes,
    ".jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    ".jsonl.zst": write_zst,
    ".parquet": write_parquet,
}


@pytest.fixture(params=WRITERS)
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"c{request.param}"
    WRITERS[request.param](path, lines(TEXTS))
    return path


def test_every_format_gives_the_same_documents(corpus: Path) -> None:
    rows = rows_of(corpus)
    assert texts_of(rows) == TEXTS
    assert [row.row for row in rows] == list(range(1, 51))
    assert rows[4].doc_id == f"{corpus}:5"
    assert {row.source for row in rows} == {str(corpus)}
    assert rows[-1].consumed == corpus.stat().st_size


def test_reading_goes_on_after_any_row(corpus: Path) -> None:
    everything = rows_of(corpus)
    for k in (1, 6, 7, 8, 49, 50):
        rest = rows_of(corpus, after=(0, k))
        assert [row._replace(consumed=0) for row in rest] == [row._replace(consumed=0) for row in everything[k:]]


def test_columns_by_name(corpus: Path) -> None:
    rows = rows_of(corpus, id="n", source="text")
    assert [row.doc_id for row in rows] == [str(i) for i in range(50)]
    assert [row.source for row in rows] == TEXTS
    assert all(isinstance(row, Reject) and row.reason == "no text column" for row in rows_of(corpus, text="body"))
    assert all(isinstance(row, Reject) and row.reason == "no id column" for row in rows_of(corpus, id="key"))


def test_hash_of_every_file(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("x")
    inputs = find_inputs([tmp_path])
    for after in ((0, 0), (0, 3)):
        found: dict[int, str | None] = {}
        list(read(inputs, Columns(), after=after, finished=found.__setitem__))
        assert found == {i: hashlib.sha256(file.path.read_bytes()).hexdigest() for i, file in enumerate(inputs)}


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfline one\r\nline two\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(PRIVATE.encode() + b"\xff")
    first, second, third = rows_of(tmp_path)
    assert first[3:] == (str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), str(tmp_path), "line one\r\nline two\n")
    assert second.text == ""
    assert third[4:] == (None, "invalid UTF-8", f"at byte {len(PRIVATE)}")
    assert len(rows_of(tmp_path, after=(1, 1))) == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_text_files(tmp_path: Path, suffix: str) -> None:
    """A packed text is the document that it unpacks to; one that is cut short is a reject and not half a document."""
    plain, packed = tmp_path / "a.txt", tmp_path / f"b.txt{suffix}"
    cut_short, other = tmp_path / f"c.txt{suffix}", tmp_path / f"d.txt{suffix}"
    data = b"\xef\xbb\xbf" + hashlib.sha256(b"").hexdigest().encode() * 50
    plain.write_bytes(data)
    WRITERS[f".jsonl{suffix}"](packed, data)
    cut_short.write_bytes(packed.read_bytes()[:-9])
    other.write_bytes(b"not packed at all")
    first, second, third, fourth = rows_of(tmp_path)
    assert second.text == first.text == data.decode("utf-8-sig")
    assert second.source == first.source == str(tmp_path)
    assert (third.name, third.line, third.reason) == (str(cut_short), None, "file is damaged")
    assert (fourth.name, fourth.line, fourth.reason) == (str(other), None, "file is damaged")
    assert read_packed(packed) == read_packed(plain) == data
    for path in (cut_short, other):
        with pytest.raises(TextError, match="cannot be unpacked as its name says"):
            read_packed(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "' + PRIVATE.encode(), "invalid JSON"),
        (PRIVATE.encode(), "invalid JSON"),
        (b'["' + PRIVATE.encode() + b'"]', "not a JSON object"),
        (b'"' + PRIVATE.encode() + b'"', "not a JSON object"),
        (b'{"' + PRIVATE.encode() + b'": "x"}', "no text column"),
        (b'{"text": null}', "text is null"),
        (b'{"text": 5}', "text is not a string"),
        (b'{"text": ["' + PRIVATE.encode() + b'"]}', "text is not a string"),
        (b'{"text": "' + PRIVATE.encode() + b'\xff"}', "invalid UTF-8"),
        (b'{"text": "' + PRIVATE.encode() + b'\\ud800"}', "lone surrogate"),
        (b'{"text": "' + PRIVATE.encode() + b'\\udc00"}', "lone surrogate"),
        (b'{"text": NaN}', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b"\x00", "invalid JSON"),
    ],
)
def test_a_bad_line_is_a_reject_and_the_next_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n\n  \r\n{"text": "after"}')
    before, reject, after = rows_of(path)
    assert (before.text, after.text, after.row) == ("before", "after", 5)
    assert isinstance(reject, Reject)
    assert (reject.name, reject.line, reject.reason) == (str(path), 2, reason)
    assert PRIVATE not in repr(reject)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"id": None}, "id is not a string or integer"),
        ({"id": True}, "id is not a string or integer"),
        ({"id": 1.5}, "id is not a string or integer"),
        ({"id": [PRIVATE]}, "id is not a string or integer"),
        ({}, "no id column"),
        ({"id": 1, "from": {PRIVATE: 1}}, "source is not a string or integer"),
        ({"id": 1}, "no source column"),
    ],
)
def test_bad_ids_and_sources(tmp_path: Path, fields: dict[str, object], reason: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": PRIVATE, **fields}))
    (reject,) = rows_of(path, id="id", source="from")
    assert reject.reason == reason
    assert PRIVATE not in repr(reject)


def test_a_source_may_be_null(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "x", "from": None}))
    assert rows_of(path, source="from")[0].source is None


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_gives_what_it_has_and_a_reject(tmp_path: Path, suffix: str) -> None:
    texts = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    path, other = tmp_path / f"a{suffix}", tmp_path / "b.jsonl"
    WRITERS[suffix](path, lines(texts))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    other.write_bytes(lines(["next file"]))
    *documents, reject, following = rows_of(tmp_path)
    assert 1500 < len(documents) < 2500  # what comes before the break is not lost with it
    assert texts_of(documents) == texts[: len(documents)]
    assert isinstance(reject, Reject)
    assert (reject.name, reject.line, reject.reason) == (str(path), None, "file is damaged")
    assert following.text == "next file"
    everything = rows_of(tmp_path)
    for k in (len(documents) - 1, reject.row - 1, reject.row):
        again = rows_of(tmp_path, after=(0, k))
        assert again[-1].text == "next file"
        assert sum(isinstance(row, Reject) for row in again) == sum(
            isinstance(row, Reject) and (row.file, row.row) > (0, k) for row in everything
        )


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["noise", "empty", "flipped", "cut"])
def test_damaged_files_never_stop_the_stream(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, lines(TEXTS * 20))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        for i in range(0, len(data), 50):
            data[i] ^= 0xFF
    damaged = {"noise": b"not what it says", "empty": b"", "flipped": bytes(data), "cut": bytes(data[:-9])}
    path.write_bytes(damaged[damage])
    (tmp_path / "b.jsonl").write_bytes(lines(["next file"]))
    rows = rows_of(tmp_path)
    assert rows[-1].text == "next file"
    if not (damage == "empty" and suffix != ".parquet"):  # an empty stream of lines is an empty file, not a damaged one
        assert isinstance(rows[-2], Reject)
        assert rows[-2].reason == "file is damaged"


def test_zstd_frames(tmp_path: Path) -> None:
    """Several frames end to end, a skippable frame (as pzstd writes), and one with a high ratio."""
    pack = zstandard.ZstdCompressor().compress
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    texts = ["a" * 3_000_000, "b", "c"]
    data = lines(texts)
    frames = skippable + pack(data[:-20]) + skippable + pack(data[-20:]) + skippable
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert texts_of(rows_of(tmp_path)) == texts


def test_byte_order_mark_and_no_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}')
    assert texts_of(rows_of(tmp_path)) == ["x", "y"]


DICTIONARY = pa.dictionary(pa.int32(), pa.string())
PLAIN = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]


@pytest.mark.parametrize("kind", [*PLAIN, DICTIONARY], ids=str)
def test_parquet_strings(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["one", None, "zwei", "one"]
    column = pa.array(values, pa.string()).cast(kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    one, null, two, again = rows_of(tmp_path)
    assert (one.text, two.text, again.text) == ("one", "zwei", "one")
    assert (null.line, null.reason) == (2, "text is null")


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"good", PRIVATE.encode() + b"\xff", b"also good"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    one, reject, two = rows_of(tmp_path)
    assert (one.text, two.text) == ("good", "also good")
    assert (reject.line, reject.reason) == (2, "invalid UTF-8")
    assert PRIVATE not in repr(reject)


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([["a"], ["b"]]), pa.array([{"a": 1}, None])], ids=str)
def test_parquet_columns_of_another_kind_are_one_reject(tmp_path: Path, column: pa.Array) -> None:
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (reject,) = rows_of(tmp_path)
    assert (reject.line, reject.reason) == (None, "text is not a string")
    assert rows_of(tmp_path, after=(0, 1)) == []


def test_parquet_column_that_is_missing_or_ambiguous(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path)[0].detail == "'text' is not among the columns 'body'"
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    assert rows_of(tmp_path)[0].detail == "'text' names several columns"


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("nowhere")
    (tmp_path / "c.txt").write_text("z")

    def locked(path, *args, **kwargs):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **kwargs)

    monkeypatch.setattr("assay.detection.corpus.sources.open", locked, raising=False)
    one, two, three = rows_of(tmp_path)
    assert (one.reason, one.detail) == ("file cannot be read", "Permission denied, after row 0")
    assert two.reason == "file cannot be read"
    assert three.text == "z"


def test_a_file_that_changes_meanwhile_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    stream = read(find_inputs([path]), Columns())
    next(stream)
    with path.open("ab") as handle:
        handle.write(b'{"text": "more"}\n')
    with pytest.raises(RunError, match=r"a\.jsonl changed during the run"):
        list(stream)


def rows(*sizes: int | None) -> list[Row]:
    return [
        Reject(0, i, 0, "f", i, "r", "") if size is None else Document(0, i, 0, "f", str(i), None, "x" * size)
        for i, size in enumerate(sizes, 1)
    ]


def shapes(shards: list[Shard]) -> list[list[int]]:
    return [sorted(row.row for row in [*shard.documents, *shard.rejects]) for shard in shards]


def test_shards_by_rows_and_by_characters() -> None:
    sizes = (3, 3, None, 3, 90, 1, None, None, None, 10)
    shards = list(cut(rows(*sizes), first=0, max_rows=3, max_characters=10))
    assert shapes(shards) == [[1, 2, 3], [4], [5], [6, 7, 8], [9, 10]]
    assert [shard.index for shard in shards] == [0, 1, 2, 3, 4]
    assert [shard.last.row for shard in shards] == [3, 4, 5, 8, 10]


def test_cutting_again_from_any_shard_gives_the_same_shards() -> None:
    all_rows = rows(*(None if i % 11 == 3 else i * 37 % 101 for i in range(200)))
    shards = list(cut(all_rows, first=0, max_rows=9, max_characters=250))
    for shard in shards[:-1]:
        again = cut(all_rows[shard.last.row :], first=shard.index + 1, max_rows=9, max_characters=250)
        assert list(again) == shards[shard.index + 1 :]
