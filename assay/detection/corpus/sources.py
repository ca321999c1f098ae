"""Corpus inputs: which files and objects, in which order.

Arguments keep the order given; inside a folder or a glob, files are sorted by path. The order never depends on the
file system, so shard k holds the same documents on every run.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from assay._errors import RunError
from assay.detection.corpus.stores import OpenObject, find_objects, is_uri, size_and_time

Format = Literal["text", "lines", "parquet"]

_UNPACKED: dict[str, Format] = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines"}
SUFFIXES: dict[str, Format] = {
    **{f"{stem}{packed}": kind for stem, kind in _UNPACKED.items() for packed in ("", ".gz", ".zst", ".zstd")},
    ".parquet": "parquet",
}
"""File name endings (case does not matter) and how such a file is read."""

_ACCEPTED = ".txt, .jsonl, .ndjson (each also .gz, .zst, .zstd), .parquet"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as it was when the run was set up.

    Attributes
    ----------
    path
        Where it is read; a string in a store.
    name
        How results name it: the path as given, with bytes that are not UTF-8 written as escapes, or a URI.
    size, mtime_ns
        Bytes and time of change; -1 where the file could not be looked at, which becomes a reject.
    store
        The pyarrow file system of an object; None for a file.
    """

    path: Path | str
    name: str
    size: int
    mtime_ns: int
    store: Any = None

    @property
    def format(self) -> Format:
        """How the file is read."""
        found = format_of(self.path)
        if found is None:
            raise ValueError(f"{self.name} is not one of {_ACCEPTED}.")
        return found


def format_of(path: Path | str) -> Format | None:
    """How a file of this name is read, or None where it is not an input."""
    name = os.fspath(path).lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def find_inputs(
    paths: Iterable[str | os.PathLike[str]],
    *,
    exclude: Path | None = None,
    skipped: Callable[[str], None] = lambda name: None,
) -> list[InputFile]:
    """All input files, each once, in the order in which they are read.

    Parameters
    ----------
    paths
        Files, folders (searched through, without names that begin with a dot) and glob patterns (`**` is known); URIs
        of objects and of folders of objects.
    exclude
        A folder whose content is no input: the run's own output.
    skipped
        Called with the name of each file in a folder, each object and each match of a pattern that ends in no format
        that is read. Hidden files and what `exclude` names are not reported.

    Raises
    ------
    RunError
        If a path does not exist, a pattern matches nothing, a named file has a format that is not read, or nothing
        is found at all, or an object store does not answer.
    """
    given = [os.fspath(path) for path in paths]
    shut_out = None if exclude is None else exclude.resolve()
    found: dict[Path | str, InputFile] = {}
    own = 0
    left_out: dict[Path | str, None] = {}
    for argument in given:
        if is_uri(argument):
            for name, file in _objects(argument):
                if file is None:
                    left_out[name] = None
                else:
                    found.setdefault(name, file)
            continue
        for path in _expand(argument):
            resolved = path.resolve()
            if shut_out is not None and resolved.is_relative_to(shut_out):
                own += 1
                continue
            if format_of(path) is None:
                left_out[resolved] = None
            else:
                found.setdefault(resolved, _look_at(path))
    if not found:
        raise RunError(
            f"paths must name at least one document, found none in {', '.join(map(repr, given)) or 'an empty list'}"
            f"{f' among {len(left_out)} files' if left_out else ''}. Looked for files that end in {_ACCEPTED}"
            f"{f'; {own} in the folder of the results, {str(exclude)!r}, are no inputs' if own else ''}."
        )
    for each in left_out:
        skipped(os.fspath(each))
    return list(found.values())


def _objects(uri: str) -> Iterator[tuple[str, InputFile | None]]:
    """Names of objects, each with its input, or None where it is of no format that is read."""
    objects, folder = find_objects(uri)
    for each in objects:
        if format_of(each.path) is not None:
            yield each.name, InputFile(each.path, each.name, each.size, each.mtime_ns, each.store)
        elif folder:
            yield each.name, None
        else:
            raise RunError(f"paths must be objects that end in {_ACCEPTED}, or folders of them, got {each.name!r}.")


def _expand(argument: str) -> Iterator[Path]:
    """The files that an argument names, of every format where it is a folder or a pattern."""
    path = Path(argument)
    if path.is_dir():
        yield from _walk(path)
    elif path.exists():
        if not path.is_file() or format_of(path) is None:
            raise RunError(f"paths must be files that end in {_ACCEPTED}, folders or patterns, got {argument!r}.")
        yield path
    elif glob.has_magic(argument):
        matches = sorted(map(Path, glob.glob(argument, recursive=True)))
        if not matches:
            raise RunError(f"paths: the pattern {argument!r} matches nothing. Quote it to keep the shell from it.")
        for match in matches:
            if match.is_dir():
                yield from _walk(match)
            elif match.is_file() or not match.exists():  # as in a folder
                yield match
    else:
        raise RunError(f"paths: there is no file or folder {argument!r}.")


def _walk(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    # Pipes and sockets would block the reader; a link that leads nowhere stays and becomes a reject.
    return sorted(path for path in files if path.is_file() or not path.exists())


def _look_at(path: Path) -> InputFile:
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    try:
        facts = os.stat(path)
    except OSError:
        return InputFile(path, name, -1, -1)
    return InputFile(path, name, facts.st_size, facts.st_mtime_ns)


def open_input(file: InputFile) -> BinaryIO:
    """The file's bytes, from its beginning; can be sought in."""
    if file.store is not None:
        return cast(BinaryIO, OpenObject(file.store, str(file.path), file.name))
    return open(file.path, "rb")


def check_unchanged(file: InputFile) -> None:
    """Refuse a file that is no longer what the run was set up with.

    Raises
    ------
    RunError
        If size or time of change differ, or the file's store does not answer.
    OSError
        If the file cannot be looked at.
    """
    if file.store is not None:
        unchanged = size_and_time(file.store, str(file.path), file.name) == (file.size, file.mtime_ns)
    else:
        facts = os.stat(file.path)
        unchanged = stat.S_ISREG(facts.st_mode) and (facts.st_size, facts.st_mtime_ns) == (file.size, file.mtime_ns)
    if not unchanged:
        raise RunError(
            f"{file.name} changed during the run, and the results would mix two versions of it. "
            "Start again with another --out once the inputs are at rest."
        )
