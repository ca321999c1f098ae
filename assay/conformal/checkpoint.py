"""Guards, monitors and online tests that outlive their process: each step is on disk before its answer is returned.

Guarantee: an answer is returned only after the state with its step in it has replaced the old one, so a step that was
answered is not forgotten: evidence, wealth and alarms go on as if nothing had stopped, and the bounds on false alarms
and false discoveries hold over the whole life of the file. A damaged file is refused; a file is open in one process at
a time. Restoring a copy from before an answer takes that step back, which nothing here can notice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from assay._errors import StateError
from assay.detection.corpus.ledger import writing_atomically

SCHEMA = "assay.checkpoint/1"

_HOME = {
    "DriftGuard": "drift",
    "ELond": "online_fdr",
    "Lord": "online_fdr",
    "MissMartingale": "monitor",
    "Saffron": "online_fdr",
    "ScoreMonitor": "monitor",
}


class Resumable(Protocol):
    """What a checkpoint can keep."""

    def update(self, value: Any, /) -> Any:
        """Take in one step, or several at once; a ValueError says that nothing changed."""

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, settings included, ready for JSON."""

    @classmethod
    def from_state(cls, state: dict[str, Any], /) -> Self:
        """The object that `state` described."""


class Checkpoint:
    """An online object with its state in a file. Made by `start` or `resume`; a context manager.

    Attributes
    ----------
    process
        The object: read its attributes; take steps by `update` of the checkpoint, or they are not on disk.
    n_steps
        Steps taken so far.

    Examples
    --------
    >>> import tempfile
    >>> from assay.conformal import Checkpoint, Lord
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Checkpoint.start(f"{folder.name}/stream", Lord(fdr=0.1)) as kept:
    ...     kept.update(1e-4)
    True
    >>> with Checkpoint.resume(f"{folder.name}/stream") as kept:
    ...     kept.n_steps, kept.process.discoveries
    (1, [1])
    >>> folder.cleanup()

    Notes
    -----
    A write costs an fsync and O(size of the state): a `DriftGuard` keeps every score. `extend` writes once for many
    steps, and so does `update` of a `ScoreMonitor` with many scores.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._lock = lock
        self._pid = os.getpid()
        self._sound = True
        self.process: Any = None
        self.n_steps = 0

    @classmethod
    def start(cls, path: str | os.PathLike[str], process: Resumable, *, n_steps: int = 0) -> Checkpoint:
        """Keep an object from now on, in a new file of mode 0600.

        Parameters
        ----------
        path
            Where nothing is yet; beside it a lock file stays.
        process
            A `DriftGuard`, `ScoreMonitor` that was fitted, `MissMartingale`, `Lord`, `Saffron` or `ELond`.
        n_steps
            How many steps it has taken before, at least 0.

        Raises
        ------
        StateError
            If something is at `path`, or another process holds it.
        TypeError, ValueError
            If the object is of another kind, is not fitted, or draws from a generator that cannot be kept.
        """
        where = Path(path)
        kind = type(process).__name__
        if kind not in _HOME:
            raise TypeError(f"process must be one of {sorted(_HOME)}, got {kind}.")
        if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
            raise ValueError(f"n_steps must be a whole number of at least 0, got {n_steps!r}.")
        opened = cls(where, _locked(where))
        opened.n_steps = n_steps
        try:
            if where.exists():
                raise StateError(f"path must be free, {where} exists. Resume it, or choose another.")
            opened.process = process
            opened._write()
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Go on from a file, with the settings, the evidence and the random generator that are in it.

        Raises
        ------
        StateError
            If there is no such file, it is damaged, or another process holds it.
        """
        where = Path(path)
        if not where.exists():
            raise StateError(f"there is no checkpoint at {where}. Begin one with Checkpoint.start().")
        opened = cls(where, _locked(where))
        try:
            content = _read(where)
            home = import_module(f"assay.conformal.{_HOME[content['kind']]}")
            opened.process = getattr(home, content["kind"]).from_state(content["state"])
            opened.n_steps = content["steps"]
        except StateError:
            opened.close()
            raise
        except BaseException as error:
            opened.close()
            if not isinstance(error, Exception):
                raise
            raise StateError(f"{where} cannot be read by this version ({type(error).__name__}: {error}).") from None
        return opened

    def update(self, value: Any, *, number: int | None = None) -> Any:
        """Take in what came next; returns what the object's own `update` returns, once it is on disk.

        Parameters
        ----------
        value
            For the object's `update`: a score, scores, a p-value, a logarithm of an e-value, a miss.
        number
            Number of the (first) step in `value`, from 1. If given, it must be the next: so a sender that does not know
            whether its last step arrived may send it again, and it is refused instead of counted twice.

        Raises
        ------
        StateError
            If `number` is not the next, the checkpoint is closed or belongs to another process, or an earlier step
            broke off.
        ValueError
            As the object's `update`; nothing changes.
        """
        return self._take(value, number, int(np.size(value)), self.process.update)

    def extend(self, values: Sequence[Any] | npt.NDArray[Any], *, number: int | None = None) -> list[Any]:
        """Several steps of an object that takes one at a time, and one write: the answers, once all are on disk.

        Raises
        ------
        StateError, ValueError
            As `update`. A value that the object refuses ends this checkpoint: those before it are not on disk, so
            resume, and send them again without it.
        """
        rows = list(values)
        for one in rows:
            if np.ndim(one):
                raise ValueError("values must be single steps; what holds several is for update.")

        def each(steps: list[Any]) -> list[Any]:
            answers = []
            for place, one in enumerate(steps):
                try:
                    answers.append(self.process.update(one))
                except ValueError as error:
                    if place == 0:
                        raise
                    raise StateError(f"value {place + 1} of {len(steps)} was refused ({error}) Resume.") from error
            return answers

        answers: list[Any] = self._take(rows, number, len(rows), each)
        return answers

    def _take(self, value: Any, number: int | None, count: int, take: Callable[[Any], Any]) -> Any:
        if self._lock < 0 or os.getpid() != self._pid:
            raise StateError(f"{self._path} is closed or belongs to another process. Resume it in this one.")
        if not self._sound:
            raise StateError(f"a step broke off. Resume from {self._path}, whose last step is whole.")
        if number is not None and number != self.n_steps + 1:
            raise StateError(
                f"number must be {self.n_steps + 1}, the next step, got {number}. "
                + ("That one was taken in already." if number <= self.n_steps else "Steps between are missing.")
            )
        self._sound = False
        try:
            answer = take(value)
        except StateError:
            raise
        except ValueError:
            self._sound = True  # the object promises that nothing changed
            raise
        self.n_steps += count
        self._write()
        self._sound = True
        return answer

    def close(self) -> None:
        """Let other processes resume the file."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A checkpoint that was dropped must not keep its file locked.
        self.close()

    def _write(self) -> None:
        content = {
            "schema": SCHEMA,
            "kind": type(self.process).__name__,
            "steps": self.n_steps,
            "state": self.process.state(),
        }
        line = _text(content | {"sha256": _digest(content)})
        with writing_atomically(self._path) as temporary, open(temporary, "w", opener=_private) as file:
            file.write(line + "\n")


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a generator, ready for JSON.

    Raises
    ------
    ValueError
        If it is not one that `numpy.random.default_rng` makes.
    """
    state = dict(rng.bit_generator.state)
    if state["bit_generator"] != "PCG64":
        raise ValueError(
            f"rng must be a PCG64 generator to be kept, as numpy.random.default_rng() gives, got "
            f"{state['bit_generator']}."
        )
    return state


def generator_from(state: dict[str, Any]) -> np.random.Generator:
    """The generator that `generator_state` described."""
    bits = np.random.PCG64()
    bits.state = state  # type: ignore[assignment]  # what numpy gave
    return np.random.Generator(bits)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _locked(path: Path) -> int:
    import fcntl  # POSIX only; without it there is no promise to keep

    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StateError(f"{path} is open in another process, or twice in this one. Close it there first.") from None
    return fd


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("sha256")
        good = stated == _digest(content)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise StateError(f"{path} is no checkpoint, or it was changed or damaged after it was written.")
    if content.get("schema") != SCHEMA or content.get("kind") not in _HOME:
        raise StateError(
            f"{path} holds {content.get('kind')!r} ({content.get('schema')!r}): a newer Assay may read it."
        )
    return dict(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode("ascii")).hexdigest()


def _text(content: dict[str, Any]) -> str:
    # Settings may be numpy's numbers.
    return json.dumps(content, sort_keys=True, allow_nan=False, default=lambda value: value.item())
