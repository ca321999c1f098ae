"""`Report`: what a corpus of test results shows, ready to be read, saved, signed and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from assay.report import canonical
from assay.report.records import (
    CalibrationRecord,
    Counts,
    Document,
    Excerpt,
    Histogram,
    InputFile,
    KeyRecord,
    LabelledSource,
    LengthBucket,
    MonitoredSource,
    RejectReason,
    SourceShare,
    TokenizerRecord,
    Version,
    from_plain,
    to_plain,
)

if TYPE_CHECKING:
    from assay.conformal.calibration import Calibration
    from assay.conformal.markov import StateSets
    from assay.conformal.mixed_documents import SentenceLabels
    from assay.conformal.monitor import MonitorResult
    from assay.detection.detect import DetectionKeys
    from assay.watermark.keys import KeyInfo, SecretKey

MADE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True)
class Report:
    """An audit report: numbers, and the words that say what they mean.

    Build one with `from_results` or `from_run`. Equal reports give equal JSON and, on one installation, equal HTML.

    Attributes
    ----------
    title
        Heading.
    made
        When the report was made: UTC, ISO 8601, whole seconds.
    software
        Versions that the numbers depend on; Assay's own first.
    fdr
        The false discovery rate chosen, in (0, 1): the expected share of false alarms among the flagged documents.
    verdict
        The outcome in one or two sentences.
    counts
        Totals.
    log_pvalue_threshold
        Largest natural logarithm of a p-value that was flagged; None where nothing was.
    histogram
        p-values against the uniform law.
    lengths
        Share flagged by length in tokens.
    sources
        Share flagged by source, largest sources first; at most 200.
    sources_left_out
        Further sources that are not listed.
    documents
        The most certain documents, smallest p-value first.
    keys
        Keys named by the results or tested in the run.
    tests, nulls, assumptions
        What was tested and what the guarantee rests on; empty where the results do not say.
    inputs, inputs_left_out
        Files that were read, at most 1000, and how many more there were; a run lists all of them in `inputs.jsonl`.
    outputs, tokenizer
        Files that the run wrote, and its tokenizer: by hash; empty and None where the results do not say.
    rejects
        Why input rows were rejected; most frequent first.
    limits
        What the numbers do and do not mean, one sentence or two each.
    monitoring
        Sources whose scores were watched over time; left out of the JSON where there are none.
    labelling
        Sources for whose steps there are sets of states; left out of the JSON where there are none.
    calibrations
        The calibration that documents were tested against, where the null hypothesis is that humans wrote them: then
        there is one, and no key. Left out of the JSON where there is none.
    """

    SCHEMA: ClassVar[str] = "assay.report/1"

    title: str
    made: str
    software: tuple[Version, ...]
    fdr: float
    verdict: str
    counts: Counts
    log_pvalue_threshold: float | None
    histogram: Histogram
    lengths: tuple[LengthBucket, ...]
    sources: tuple[SourceShare, ...]
    sources_left_out: int
    documents: tuple[Document, ...]
    keys: tuple[KeyRecord, ...]
    tests: tuple[str, ...]
    nulls: tuple[str, ...]
    assumptions: tuple[str, ...]
    inputs: tuple[InputFile, ...]
    inputs_left_out: int
    outputs: tuple[InputFile, ...]
    tokenizer: TokenizerRecord | None
    rejects: tuple[RejectReason, ...]
    limits: tuple[str, ...]
    monitoring: tuple[MonitoredSource, ...] = ()
    labelling: tuple[LabelledSource, ...] = ()
    calibrations: tuple[CalibrationRecord, ...] = ()

    def __post_init__(self) -> None:
        datetime.strptime(self.made, MADE_FORMAT)
        if not 0 < self.fdr < 1 or not self.software:
            raise ValueError("fdr must be in (0, 1) and software must not be empty.")
        if len(self.calibrations) + bool(self.keys) > 1:
            raise ValueError("a report must be about keys or about one calibration. Make one report for each.")

    @classmethod
    def from_results(
        cls,
        results: Iterable[Any],
        *,
        fdr: float = 0.01,
        title: str | None = None,
        excerpts: Sequence[Excerpt] = (),
        keys: Iterable[SecretKey | KeyInfo] = (),
        calibration: Calibration | None = None,
        inputs: Sequence[InputFile] = (),
        tokenizer: Any = None,
        rejects: Sequence[RejectReason] = (),
        listed: int = 20,
        made: datetime | None = None,
        monitoring: Iterable[tuple[str, MonitorResult | Sequence[SentenceLabels | StateSets]]] = (),
    ) -> Report:
        """A report on test results in memory.

        Guarantee: with p-values that are independent or positively dependent between documents, the expected share of
        unmarked documents among the flagged ones is at most `fdr` (Benjamini-Hochberg).

        Parameters
        ----------
        results
            Tuples (doc_id, source, TestResult), or records with the columns of a corpus run as attributes.
        fdr
            False discovery rate, in (0, 1).
        title
            Heading of the report; default "Watermark audit", or "Human-text audit" with a calibration.
        excerpts
            Excerpts to show; their documents are listed in any case. Without any, the report holds no document text.
        keys
            The keys tested: their public descriptions go into the report, never a secret.
        calibration
            Of results of `human_tests`, in place of keys: its description goes into the report.
        inputs, tokenizer, rejects
            What was read: files with their hashes; a loaded tokenizer, or what `load_tokenizer` takes; rejected rows.
        listed
            How many of the most certain documents to list, >= 0.
        made
            Time of the report, with a time zone; default now.
        monitoring
            Tuples (source, MonitorResult) of sources watched over time, at most 30. Of a longer series the report holds
            500 scores in a row: those around the alarm, else the last ones. Or (source, list of `SentenceLabels` or
            `StateSets`) of sources whose steps were labelled, of one level and one list of states each.

        Raises
        ------
        ValueError
            If `fdr` or `listed` is out of range, `made` has no time zone, an excerpt names an unknown document or one
            id that several documents share, `monitoring` holds something else, too much, or a source twice, or results
            are of another null hypothesis than the rest.

        References
        ----------
        Benjamini and Hochberg (1995); Benjamini and Yekutieli (2001), Theorem 1.2.
        """
        from assay.report import build

        return build.from_results(
            results,
            fdr=fdr,
            title=title,
            excerpts=excerpts,
            keys=keys,
            calibration=calibration,
            inputs=inputs,
            tokenizer=tokenizer,
            rejects=rejects,
            listed=listed,
            made=made,
            monitoring=monitoring,
        )

    @classmethod
    def from_run(
        cls,
        out_dir: str | Path,
        *,
        fdr: float | None = None,
        keys: SecretKey | DetectionKeys | Iterable[SecretKey] | None = None,
        tokenizer: Any = None,
        excerpts: int = 10,
        title: str | None = None,
        listed: int = 20,
        made: datetime | None = None,
        monitoring: Iterable[tuple[str, MonitorResult | Sequence[SentenceLabels | StateSets]]] = (),
    ) -> Report:
        """A report on a finished corpus run.

        Parameters
        ----------
        out_dir
            The folder that `assay detect ... --out` wrote, whether for keys or against "a human wrote it".
        fdr
            False discovery rate, in (0, 1); default the run's.
        keys
            The run's keys, needed only to score the tokens of the excerpts. Without them there are no excerpts, and so
            none of a run against "a human wrote it".
        tokenizer
            The run's tokenizer; default the one that the run names. Its hash must be the run's.
        excerpts
            How many of the most certain flagged documents to show with their text, >= 0. With 0 the report holds no
            document text at all; document ids, sources and file names remain.
        title, listed, made, monitoring
            As in `from_results`.

        Raises
        ------
        RunError
            If the folder holds no finished run, or a document to be shown is no longer the one that was tested.
        ValueError
            If an argument is out of range, or the tokenizer is not the run's.
        """
        from assay.report import run

        return run.from_run(
            Path(out_dir),
            fdr=fdr,
            keys=keys,
            tokenizer=tokenizer,
            excerpts=excerpts,
            title=title,
            listed=listed,
            made=made,
            monitoring=monitoring,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, with the schema's name."""
        plain: dict[str, Any] = to_plain(self)
        return {"schema": self.SCHEMA, **plain}

    def to_json(self) -> bytes:
        """Canonical JSON, the bytes that a signature covers; `from_json` reads them back to an equal report.

        Raises
        ------
        ValueError
            If a string holds a lone surrogate; the builders replace those.
        """
        return canonical.encode(self.to_dict())

    @classmethod
    def from_json(cls, data: bytes | str) -> Report:
        """The report that `to_json` wrote. It may come from a stranger: nothing in it is run or trusted.

        Raises
        ------
        ValueError
            If it is not a report of this schema; the message says where it departs.
        """
        values = canonical.decode(data)
        if not isinstance(values, dict) or values.get("schema") != cls.SCHEMA:
            got = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"schema must be {cls.SCHEMA!r}, got {got!r}. Read it with the version that wrote it.")
        del values["schema"]
        return from_plain(cls, values, "report")

    def to_html(self) -> str:
        """The report as one self-contained page: inline pictures and styles, no script, nothing fetched."""
        from assay.report import render

        return render.page(self)

    def save(self, directory: str | Path, *, sign_with: SecretKey | None = None) -> Path:
        """Write report.json, report.html and, with a signing key, report.sig.json.

        Each file is replaced atomically; the old signature is removed first and the new one written last, so that a
        signature never stands beside files that it does not cover.

        Parameters
        ----------
        directory
            Made if missing.
        sign_with
            An active key of scheme "ed25519".

        Returns
        -------
        The path of report.html.

        Raises
        ------
        ValueError
            If the key is not a signing key.
        RevokedKeyError
            If the key is retired or revoked.
        """
        from assay.report import signature

        contents = {signature.REPORT_JSON: self.to_json(), signature.REPORT_HTML: self.to_html().encode("utf-8")}
        signature.save(contents, Path(directory), sign_with=sign_with)
        return Path(directory) / signature.REPORT_HTML
