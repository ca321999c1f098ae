"""Corpora against "a human wrote it": a calibrated score of every document, resumable, on GPUs where there are some.

Law under H0: each p-value is that of `human.human_tests`. Those of one calibration are positively dependent (PRDS), so
that Benjamini-Hochberg controls the false discovery rate. Reference: Bates et al. (2023), Thm 2, arXiv:2104.08279.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from assay.conformal.calibration import Calibration
from assay.conformal.human import NULL, human_tests
from assay.detection.corpus.engine import run_subject
from assay.detection.corpus.models import blaming_the_device, usable
from assay.detection.corpus.reading import Columns
from assay.detection.corpus.results import RunSummary
from assay.detection.corpus.subject import Device, UntestableError
from assay.detection.scorers import anywhere, load_scorer

if TYPE_CHECKING:
    from assay.detection.corpus.reading import Document
    from assay.detection.corpus.subject import Test
    from assay.kernels.scoring.model import ModelScorer

SCHEMA = "assay.corpus-human-results/1"

_COLUMNS: Final[Mapping[str, type]] = MappingProxyType(
    {"n_tokens": int, "n_scored": int, "statistic": float, "log_pvalue": float, "pvalue": float, "log_evalue": float}
)
_FDR_ASSUMPTION: Final = (
    "Flags control the false discovery rate of the whole corpus by Benjamini-Hochberg, for documents that are "
    "independent of each other; that they share one calibration does no harm."
)


@dataclass(frozen=True)
class HumanTests:
    """What a worker does: score with the calibrated models, compare; a `corpus.subject.DocumentTests`.

    Attributes
    ----------
    calibration
        From `human.calibrate`.
    model, other_model
        Where a worker finds the models: "default", a folder or a hub id.
    device
        "cpu", "cuda", or "auto", which the engine decides.
    """

    calibration: Calibration
    model: str
    other_model: str | None
    device: Device

    @property
    def columns(self) -> Mapping[str, type]:
        """See `corpus.subject.DocumentTests`."""
        return _COLUMNS

    def on(self, device: Device) -> HumanTests:
        """See `corpus.subject.DocumentTests`."""
        return replace(self, device=device)

    def open(self) -> Test:
        """See `corpus.subject.DocumentTests`; refuses a model that is not the calibrated one."""
        known = self.calibration
        with usable(self.device):
            scorer = _Unchanging(load_scorer(self.model, known.scorer, self.device))
            other = None
            if self.other_model is not None and known.other is not None:
                other = _Unchanging(load_scorer(self.other_model, known.other, self.device))
            known.check_scorers(scorer, other)  # type: ignore[arg-type]  # it asks for the identity and the tokenizer
            scorer.score([[1, 2, 3]], other=other)  # a device that does not work shows here
        return blaming_the_device(lambda documents: _results(documents, known, scorer, other), self.device)


class _Unchanging:
    """A scorer whose weights nobody changes, so that they are hashed once and not for every shard."""

    def __init__(self, scorer: ModelScorer) -> None:
        self._scorer = scorer
        self._identity = scorer.identity()
        self.tokenizer = scorer.tokenizer

    def identity(self) -> dict[str, Any]:
        return self._identity

    def score(self, documents: Any, *, other: _Unchanging | None = None, progress: bool = False) -> Any:
        beside = None if other is None else other._scorer
        return self._scorer.score(documents, other=beside, progress=progress)


def _results(documents: Sequence[Document], known: Calibration, scorer: Any, other: Any) -> dict[str, Any]:
    groups = None
    if known.grouped:
        groups = [document.source or "" for document in documents]
    try:
        tests = human_tests([document.text for document in documents], known, scorer, other=other, groups=groups)
    except ValueError as error:
        # Documents are then tested one by one; only one that stands alone is to blame.
        if len(documents) == 1 and "among the calibrated ones" in str(error):
            raise UntestableError("group not calibrated", f"{documents[0].source!r:.80}") from None
        raise
    return {name: [getattr(test, name) for test in tests] for name in _COLUMNS}


@dataclass(frozen=True)
class HumanSubject:
    """The null "a human wrote it"; a `corpus.subject.Subject`."""

    calibration: Calibration
    model: str
    other_model: str | None
    device: Device

    @property
    def schema(self) -> str:
        """See `corpus.subject.Subject`."""
        return SCHEMA

    def pins(self) -> dict[str, Any]:
        """See `corpus.subject.Subject`. The calibration pins the models' weights and the tokenizer."""
        return {"calibration": self.calibration.id}

    def metadata(self) -> dict[str, str]:
        """See `corpus.subject.Subject`."""
        return {"assay.calibration": self.calibration.id}

    def description(self) -> dict[str, Any]:
        """See `corpus.subject.Subject`."""
        record = self.calibration.scorer
        return {
            "keys": (),
            "calibration": self.calibration.id,
            "calibration_info": self.calibration.info(),
            "tokenizer": {"name": record.name, "sha256": record.tokenizer_sha256},
            "null": NULL,
            "tests": (f"human-{self.calibration.score}",),
            "assumptions": (*self.calibration.sentences(), _FDR_ASSUMPTION),
        }

    def tests(self) -> HumanTests:
        """See `corpus.subject.Subject`."""
        return HumanTests(self.calibration, self.model, self.other_model, self.device)


def run_human(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    calibration: Calibration | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    model: str | None = None,
    other_model: str | None = None,
    device: Device = "auto",
    text_column: str = "text",
    id_column: str | None = None,
    source_column: str | None = None,
    workers: int | None = None,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    copy_to: str | None = None,
    fdr: float = 0.01,
    shard_rows: int = 2000,
    shard_characters: int = 4_000_000,
    progress: bool = True,
) -> RunSummary:
    """Test every document of a corpus whether a human wrote it; resume where an earlier call was stopped.

    Guarantee: each p-value is valid as `human_tests` states it; the flags' false discovery rate over the corpus is at
    most `fdr` for documents that are independent of each other. One row per document, whenever the run is killed.

    Parameters
    ----------
    paths, out, text_column, id_column, copy_to, fdr, shard_rows, shard_characters, progress
        As in `assay.detection.corpus.run`.
    calibration
        From `calibrate`, or the file it was saved to.
    model, other_model
        Where every worker finds the calibrated models: "default", a folder or a hub id; default the calibration's own
        names. A model with other weights is refused.
    device
        "auto": GPUs where there are some, else CPUs; "cuda" or "cpu": these. On CPUs every worker holds a copy of the
        model and computes with one thread.
    source_column
        Field that reports group by and, if the calibration has groups, that names the group of each document.
    workers
        Processes; default: one per GPU, or per core, that this machine or the cluster has.
    engine, ray_address
        As in `assay.detection.corpus.run`. On a cluster with GPUs each slot takes one of them.

    Returns
    -------
    RunSummary; `results.parquet` has the columns of a key run but n_repeats_dropped, key_id and scheme.

    Raises
    ------
    CalibrationError
        If the calibration cannot be read.
    RunError
        As `assay.detection.corpus.run`; if a model is not there or not the calibrated one, or there is no usable GPU.
    ValueError
        On an option out of range.

    Notes
    -----
    The results are the same for every engine and number of workers on machines of one kind. A CPU and a GPU, or two
    kinds of either, agree up to the rounding of the model's arithmetic: see `ModelScorer`. A p-value, which is a rank,
    then rarely differs.
    """
    known = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", got {device!r}.')
    if (other_model is not None) and known.other is None:
        raise ValueError(f"other_model must not be given: score {known.score!r} of this calibration needs one model.")
    if known.grouped and source_column is None:
        names = ", ".join(known.group_names())
        raise ValueError(f"source_column must name the field of each document's group; calibrated are {names}.")
    second = other_model or (None if known.other is None else known.other.name)
    subject = HumanSubject(known, anywhere(model or known.scorer.name), second and anywhere(second), device)
    return run_subject(
        paths,
        subject,
        out=out,
        columns=Columns(text=text_column, id=id_column, source=source_column),
        workers=workers,
        engine=engine,
        ray_address=ray_address,
        copy_to=copy_to,
        fdr=fdr,
        shard_rows=shard_rows,
        shard_characters=shard_characters,
        progress=progress,
    )
