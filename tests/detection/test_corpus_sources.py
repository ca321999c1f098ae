"""Which files a corpus run finds, in which order, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from assay._errors import RunError
from assay.detection.corpus.sources import check_unchanged, find_inputs, format_of


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "c/b.txt",
        "c/a.jsonl",
        "c/Z.JSONL.GZ",
        "c/d/e.parquet",
        "c/d/f.ndjson.zst",
        "c/readme.md",
        "c/.hidden.txt",
        "c/.git/x.txt",
        "single.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*paths: str | Path, **kwargs) -> list[str]:
    return [file.name for file in find_inputs(paths, **kwargs)]


WHOLE = ["c/Z.JSONL.GZ", "c/a.jsonl", "c/b.txt", "c/d/e.parquet", "c/d/f.ndjson.zst"]


@pytest.mark.usefixtures("tree")
def test_a_folder_is_searched_in_the_order_of_paths() -> None:
    assert names("c") == WHOLE


@pytest.mark.usefixtures("tree")
def test_arguments_keep_their_order_and_files_count_once() -> None:
    rest = [name for name in WHOLE if name != "c/b.txt"]
    assert names("single.txt", "c/b.txt", "c", "c/*.txt") == ["single.txt", "c/b.txt", *rest]


def test_patterns(tree: Path) -> None:
    assert names("c/**/*.parquet") == ["c/d/e.parquet"]
    assert names("c/*") == WHOLE
    (tree / "a[1].txt").write_text("a name that looks like a pattern")
    assert names("a[1].txt") == ["a[1].txt"]


def test_the_run_does_not_read_its_own_output(tree: Path) -> None:
    (tree / "c/results").mkdir()
    (tree / "c/results/rejects.jsonl").write_text("{}")
    assert names("c", "c/results/*", exclude=tree / "c/results") == WHOLE


def test_links_and_pipes(tree: Path) -> None:
    os.mkfifo(tree / "c/pipe.txt")  # reading it would block for ever
    os.symlink("nowhere", tree / "c/link.txt")
    os.symlink("b.txt", tree / "c/twin.txt")
    found = {file.name: file for file in find_inputs(["c"])}
    assert "c/pipe.txt" not in found
    assert "c/pipe.txt" not in names("c/*.txt")
    assert "c/twin.txt" not in found  # b.txt under another name
    assert found["c/link.txt"].size == -1
    with pytest.raises(RunError, match=r"got 'c/pipe\.txt'"):
        find_inputs(["c/pipe.txt"])


@pytest.mark.usefixtures("tree")
def test_files_of_other_formats_are_reported_once() -> None:
    Path("c/results").mkdir()
    for name in ("c/results/ours.md", "c/d/essay.html.gz"):
        Path(name).write_bytes(b"x")
    left_out: list[str] = []
    assert names("c", "c/*", "single.txt", exclude=Path("c/results"), skipped=left_out.append) == [*WHOLE, "single.txt"]
    assert [Path(name).name for name in left_out] == ["essay.html.gz", "readme.md"]


def test_names_that_are_not_utf8(tree: Path) -> None:
    (tree / os.fsdecode(b"c/caf\xe9.txt")).write_text("x")
    assert "c/caf\\xe9.txt" in names("c")


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nowhere"], "there is no file or folder 'nowhere'"),
        (["c/*.csv"], "pattern 'c/\\*.csv' matches nothing"),
        (["c/readme.md"], r"end in \.txt, .* got 'c/readme.md'"),
        ([], "found none in an empty list"),
        (["c/*.md"], r"found none in 'c/\*\.md' among 1 files\..*Looked for files that end in \.txt"),
    ],
)
def test_refused(paths: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        find_inputs(paths)


@pytest.mark.usefixtures("tree")
def test_an_empty_folder_is_an_error_that_says_what_was_looked_for() -> None:
    Path("empty").mkdir()
    with pytest.raises(RunError, match=r"found none in 'empty'. Looked for files that end in .*\.parquet"):
        find_inputs(["empty"])


@pytest.mark.usefixtures("tree")
def test_results_in_the_only_input_folder_are_named() -> None:
    with pytest.raises(RunError, match=r"\.parquet; 2 in the folder of the results, 'c/d', are no inputs\."):
        find_inputs(["c/d"], exclude=Path("c/d"))


def test_a_changed_file_is_noticed(tree: Path) -> None:
    (file,) = find_inputs(["single.txt"])
    check_unchanged(file)
    os.utime(tree / "single.txt", ns=(0, file.mtime_ns + 1))
    with pytest.raises(RunError, match=r"single\.txt changed during the run"):
        check_unchanged(file)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", "text"), ("a.txt.gz", "text"), ("a.TXT.zst", "text"), ("a.JSONL", "lines"), ("a.ndjson.zstd", "lines")]
    + [("a.parquet", "parquet")]
    + [(name, None) for name in ("a.json", "a.gz", "a", "jsonl", "a.parquet.gz")],
)
def test_formats(name: str, kind: str | None) -> None:
    assert format_of(Path(name)) == kind
