"""Corpus inputs: which files, in which order.

Arguments keep the order given; inside a folder or a glob, files are sorted by path. The order never depends on the
file system, so shard k holds the same documents on every run.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from assay._errors import RunError

Format = Literal["text", "lines", "parquet"]

SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    **{f"{stem}{packed}": "lines" for stem in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst", ".zstd")},
    ".parquet": "parquet",
}
"""File name endings (case does not matter) and how such a file is read."""

_ACCEPTED = ".txt, .jsonl, .ndjson, .jsonl.gz, .jsonl.zst (also .ndjson.gz and so on), .parquet"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as it was when the run was set up.

    Attributes
    ----------
    path
        Where it is read.
    name
        How results name it: the path as given, with bytes that are not UTF-8 written as escapes.
    size, mtime_ns
        Bytes and time of change; -1 where the file could not be looked at, which becomes a reject.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int

    @property
    def format(self) -> Format:
        """How the file is read."""
        found = format_of(self.path)
        if found is None:
            raise ValueError(f"{self.name} is not one of {_ACCEPTED}.")
        return found


def format_of(path: Path) -> Format | None:
    """How a file of this name is read, or None where it is not an input."""
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def find_inputs(paths: Iterable[str | os.PathLike[str]], *, exclude: Path | None = None) -> list[InputFile]:
    """All input files, each once, in the order in which they are read.

    Parameters
    ----------
    paths
        Files, folders (searched through, without names that begin with a dot) and glob patterns (`**` is known).
    exclude
        A folder whose content is no input: the run's own output.

    Raises
    ------
    RunError
        If a path does not exist, a pattern matches nothing, a named file has a format that is not read, or nothing
        is found at all.
    """
    given = [os.fspath(path) for path in paths]
    shut_out = None if exclude is None else exclude.resolve()
    found: dict[Path, InputFile] = {}
    for argument in given:
        for path in _expand(argument):
            resolved = path.resolve()
            if shut_out is None or not resolved.is_relative_to(shut_out):
                found.setdefault(resolved, _look_at(path))
    if not found:
        raise RunError(
            f"paths must name at least one document, found none in {', '.join(map(repr, given)) or 'an empty list'}. "
            f"Looked for files that end in {_ACCEPTED}."
        )
    return list(found.values())


def _expand(argument: str) -> Iterator[Path]:
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
            elif format_of(match) is not None:
                yield match
    else:
        raise RunError(f"paths: there is no file or folder {argument!r}.")


def _walk(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".") and format_of(Path(name))]
    # Pipes and sockets would block the reader; a link that leads nowhere stays and becomes a reject.
    return sorted(path for path in files if path.is_file() or not path.exists())


def _look_at(path: Path) -> InputFile:
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    try:
        facts = os.stat(path)
    except OSError:
        return InputFile(path, name, -1, -1)
    return InputFile(path, name, facts.st_size, facts.st_mtime_ns)


def check_unchanged(file: InputFile) -> None:
    """Refuse a file that is no longer what the run was set up with.

    Raises
    ------
    RunError
        If size or time of change differ.
    OSError
        If the file cannot be looked at.
    """
    facts = os.stat(file.path)
    if not stat.S_ISREG(facts.st_mode) or (facts.st_size, facts.st_mtime_ns) != (file.size, file.mtime_ns):
        raise RunError(
            f"{file.name} changed during the run, and the results would mix two versions of it. "
            "Start again with another --out once the inputs are at rest."
        )
