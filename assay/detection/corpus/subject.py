"""What a corpus run tests for: as its driver describes it, and as its workers carry it out.

The engine cuts, hands out and records; a subject alone knows of keys, models and null hypotheses. Marks of keys are in
`key_tests`, the null "a human wrote it" in `assay.conformal.human_corpus`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from assay.detection.corpus.reading import Document

Device = Literal["auto", "cpu", "cuda"]

Test = Callable[[Sequence[Document]], Mapping[str, Any]]
"""Tests documents: one sequence per column of `DocumentTests.columns`, a row per document."""


class DocumentTests(Protocol):
    """What workers do with documents; pickled, and sent to each of them."""

    @property
    def columns(self) -> Mapping[str, type]:
        """Names and types (str, int, float) of what a test finds; n_tokens, n_scored, log_pvalue are among them."""

    @property
    def device(self) -> Device | None:
        """Where a model is to run; "auto" is a GPU where there is one. None: there is no model."""

    def on(self, device: Device) -> DocumentTests:
        """The same on "cpu" or "cuda"."""

    def open(self) -> Test:
        """Load what the tests need and try it, once in each worker.

        Raises
        ------
        AssayError, ValueError
            With a message for the user, which ends the run.
        """


class Subject(Protocol):
    """What a run tests for, as its driver knows it."""

    @property
    def schema(self) -> str:
        """Name of the layout of `results.parquet`."""

    def pins(self) -> dict[str, Any]:
        """All of it that decides results, JSON-ready and without secrets; a resumed run must share it."""

    def metadata(self) -> dict[str, str]:
        """What `results.parquet` says of it."""

    def description(self) -> dict[str, Any]:
        """Its part of the summary: keys, calibration, tokenizer, null and assumptions."""

    def tests(self) -> DocumentTests:
        """For the workers; the one place where secrets are used."""


class UntestableError(Exception):
    """A document that cannot be tested, and that becomes a reject with this reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class WorkerBroken(BaseException):  # no error of the document, and no one may catch it as one
    """The process can test nothing more, as after a fault of its GPU; another one must take its shard."""


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs: the tests, and the folder for its files."""

    tests: DocumentTests
    folder: Path

    def on(self, device: Device) -> Setup:
        """The same with the tests' model on "cpu" or "cuda"."""
        return replace(self, tests=self.tests.on(device))
