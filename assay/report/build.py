"""From test results to a report: flags by Benjamini and Hochberg (1995) in log space, totals, documents, words."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from assay import __version__
from assay.detection.multiplicity import benjamini_hochberg
from assay.report import shares, wording
from assay.report.columns import Booleans, Floats, Identity, Integers, ResultColumns, most_certain
from assay.report.excerpts import clean, fit
from assay.report.monitoring import Watched, watched
from assay.report.records import (
    SHORT_TOKENS,
    CalibrationGroup,
    CalibrationRecord,
    Counts,
    Document,
    Excerpt,
    InputFile,
    KeyRecord,
    RejectReason,
    ScoringModel,
    TokenizerRecord,
    Version,
)
from assay.report.report import MADE_FORMAT, Report

if TYPE_CHECKING:
    from assay.conformal.calibration import Calibration

NO_SOURCE = "(no source)"
_MOST_INPUTS = 1000


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a report says about its making besides the results."""

    title: str | None
    made: datetime | None
    listed: int
    keys: Sequence[KeyRecord]
    calibrations: Sequence[CalibrationRecord]
    tests: Sequence[str]
    nulls: Sequence[str]
    assumptions: Sequence[str]
    inputs: Sequence[InputFile]
    outputs: Sequence[InputFile]
    tokenizer: TokenizerRecord | None
    rejects: Sequence[RejectReason]
    watched: Watched


def from_results(
    results: Iterable[Any],
    *,
    fdr: float,
    title: str | None,
    excerpts: Sequence[Excerpt],
    keys: Iterable[Any],
    calibration: Calibration | None,
    inputs: Sequence[InputFile],
    tokenizer: Any,
    rejects: Sequence[RejectReason],
    listed: int,
    made: datetime | None,
    monitoring: Iterable[Any],
) -> Report:
    """See `Report.from_results`."""
    rows = [_row(item) for item in results]
    found = [row[2] for row in rows]
    _check_null(found, calibration)
    if calibration is not None and excerpts:
        raise ValueError("excerpts must be empty with a calibration: its scores are of whole texts, not of tokens.")
    source_names, source_codes = _codes([row[1] for row in rows])
    key_names, key_codes = _codes([result.key_id for result in found])
    columns = ResultColumns(
        statistic=np.array([result.statistic for result in found], dtype=np.float64),
        log_pvalue=np.array([result.log_pvalue for result in found], dtype=np.float64),
        log_evalue=np.array([result.log_evalue for result in found], dtype=np.float64),
        n_tokens=np.array([result.n_tokens for result in found], dtype=np.int64),
        n_scored=np.array([result.n_scored for result in found], dtype=np.int64),
        n_repeats_dropped=np.array([result.n_repeats_dropped for result in found], dtype=np.int64),
        sources=source_names,
        source_codes=source_codes,
        key_ids=key_names,
        key_codes=key_codes,
        identify=lambda chosen: [
            Identity(rows[i][0], getattr(found[i], "file", None), getattr(found[i], "row", None), found[i].scheme)
            for i in chosen
        ],
    )
    described = {record.id: record for record in map(key_record, keys)}
    for result in found:
        if result.key_id is not None and result.key_id not in described:
            described[result.key_id] = KeyRecord(
                id=result.key_id, scheme=result.scheme, parameters=None, fingerprint=None, state=None, flagged=0
            )
    circumstances = Circumstances(
        title=title,
        made=made,
        listed=listed,
        keys=tuple(described.values()),
        calibrations=() if calibration is None else (calibration_record(calibration.info()),),
        tests=_distinct(getattr(result, "test", None) for result in found),
        nulls=_distinct(getattr(result, "null", None) for result in found),
        assumptions=_distinct(note for result in found for note in getattr(result, "assumptions", ())),
        inputs=inputs,
        outputs=(),
        tokenizer=tokenizer_record(tokenizer),
        rejects=rejects,
        watched=watched(monitoring),
    )
    return assemble(columns, fdr, _placed([row[0] for row in rows], excerpts), circumstances)


def assemble(
    columns: ResultColumns, fdr: float, excerpts: Mapping[int, Excerpt], circumstances: Circumstances
) -> Report:
    """The report on result columns; `excerpts` by row."""
    check_fdr(fdr)
    if isinstance(circumstances.listed, bool) or not isinstance(circumstances.listed, int) or circumstances.listed < 0:
        raise ValueError(f"listed must be an integer of at least 0, got {circumstances.listed!r}.")
    log_qvalue = benjamini_hochberg(columns.log_pvalue)
    tested = columns.n_scored > 0
    flagged = (log_qvalue <= math.log(fdr)) & tested
    short = (columns.n_tokens < SHORT_TOKENS) & tested
    counts = Counts(
        documents=len(tested),
        tested=int(np.sum(tested)),
        flagged=int(np.sum(flagged)),
        short=int(np.sum(short)),
        short_flagged=int(np.sum(short & flagged)),
        rejected=sum(reason.rows for reason in circumstances.rejects),
        tokens=int(np.sum(columns.n_tokens)),
        tokens_scored=int(np.sum(columns.n_scored)),
        repeats_dropped=int(np.sum(columns.n_repeats_dropped)),
    )
    keys, calibrations = _keys(columns, flagged, circumstances.keys), tuple(circumstances.calibrations)
    words = wording.words_of(calibrations)
    sources, sources_left_out = shares.by_source(columns, tested, flagged)
    return Report(
        title=clean(words.title if circumstances.title is None else circumstances.title),
        made=_timestamp(circumstances.made),
        software=_software(),
        fdr=float(fdr),
        verdict=wording.verdict(counts, fdr, keys, calibrations),
        counts=counts,
        log_pvalue_threshold=float(np.max(columns.log_pvalue[flagged])) if counts.flagged else None,
        # p-values of one calibration are dependent: their bins scatter together, and more than binomially.
        histogram=shares.histogram(columns.log_pvalue[tested], banded=not calibrations),
        lengths=shares.by_length(columns, tested, flagged),
        sources=sources,
        sources_left_out=sources_left_out,
        documents=_documents(columns, log_qvalue, flagged, excerpts, circumstances.listed),
        keys=keys,
        tests=tuple(circumstances.tests),
        nulls=tuple(circumstances.nulls),
        assumptions=tuple(clean(note) for note in circumstances.assumptions),
        inputs=tuple(replace(one, name=clean(one.name)) for one in circumstances.inputs[:_MOST_INPUTS]),
        inputs_left_out=max(0, len(circumstances.inputs) - _MOST_INPUTS),
        outputs=tuple(circumstances.outputs),
        tokenizer=circumstances.tokenizer,
        rejects=tuple(RejectReason(reason=clean(one.reason), rows=one.rows) for one in circumstances.rejects),
        limits=words.limits,
        monitoring=circumstances.watched.scores,
        labelling=circumstances.watched.labels,
        calibrations=calibrations,
    )


def check_fdr(fdr: float) -> None:
    """Refuse what is no false discovery rate."""
    if not isinstance(fdr, (int, float)) or not 0 < fdr < 1:
        raise ValueError(f"fdr must be in (0, 1), got {fdr!r}. 0.01 keeps the expected share of false alarms at 1 %.")


def _keys(columns: ResultColumns, flagged: Booleans, described: Sequence[KeyRecord]) -> tuple[KeyRecord, ...]:
    named = flagged & (columns.key_codes >= 0)
    hits = np.bincount(columns.key_codes[named], minlength=len(columns.key_ids))
    by_id = dict(zip(columns.key_ids, (int(hit) for hit in hits), strict=True))
    return tuple(
        KeyRecord(
            id=clean(one.id),
            scheme=None if one.scheme is None else clean(one.scheme),
            parameters=one.parameters,
            fingerprint=one.fingerprint,
            state=one.state,
            flagged=by_id.get(one.id, 0),
        )
        for one in described
    )


def _documents(
    columns: ResultColumns,
    log_qvalue: Floats,
    flagged: Booleans,
    excerpts: Mapping[int, Excerpt],
    listed: int,
) -> tuple[Document, ...]:
    order = most_certain(columns.log_pvalue, columns.log_evalue, listed)
    further = sorted(excerpts.keys() - set(order), key=lambda i: (columns.log_pvalue[i], i))
    chosen = sorted([*order, *further], key=lambda i: (columns.log_pvalue[i], -columns.log_evalue[i], i))
    documents = []
    for i, identity in zip(chosen, columns.identify(chosen), strict=True):
        key_code = int(columns.key_codes[i])
        documents.append(
            Document(
                doc_id=clean(identity.doc_id),
                source=clean(columns.sources[int(columns.source_codes[i])]),
                file=None if identity.file is None else clean(identity.file),
                row=identity.row,
                n_tokens=int(columns.n_tokens[i]),
                n_scored=int(columns.n_scored[i]),
                n_repeats_dropped=int(columns.n_repeats_dropped[i]),
                statistic=float(columns.statistic[i]),
                log_pvalue=float(columns.log_pvalue[i]),
                log_qvalue=float(log_qvalue[i]),
                log_evalue=float(columns.log_evalue[i]),
                key_id=clean(columns.key_ids[key_code]) if key_code >= 0 else None,
                scheme=None if identity.scheme is None else clean(identity.scheme),
                flagged=bool(flagged[i]),
                excerpt=fit(excerpts[i]) if i in excerpts else None,
            )
        )
    return tuple(documents)


def key_record(key: Any) -> KeyRecord:
    """The public description of a `SecretKey` or `KeyInfo`."""
    info = getattr(key, "info", key)
    return KeyRecord(
        id=info.id,
        scheme=info.config.tag,
        parameters=info.config.canonical().decode(),
        fingerprint=info.fingerprint,
        state=info.state,
        flagged=0,
    )


def calibration_record(info: Mapping[str, Any]) -> CalibrationRecord:
    """The record of what `Calibration.info` says; of a run that names its calibration and no more, of `{"id": ...}`."""
    groups, models = info.get("groups", ()), info.get("models", ())
    return CalibrationRecord(
        id=info["id"],
        score=info.get("score"),
        guarantee=info.get("guarantee"),
        min_tokens=info.get("min_tokens"),
        texts_sha256=info.get("texts_sha256"),
        groups=tuple(
            CalibrationGroup(
                name=clean(one["name"]),
                texts=one["texts"],
                log_pvalue_floor=math.log(one["smallest_pvalue"]) if one["smallest_pvalue"] else -math.inf,
            )
            for one in groups
        ),
        models=tuple(ScoringModel(name=clean(one["name"]), weights_sha256=one["weights_sha256"]) for one in models),
    )


def tokenizer_record(tokenizer: Any) -> TokenizerRecord | None:
    """Name and hash of a tokenizer, or None where none is given."""
    if tokenizer is None or isinstance(tokenizer, TokenizerRecord):
        return tokenizer
    from assay.detection.text import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return TokenizerRecord(name=clean(loaded.name), sha256=loaded.sha256)


def _check_null(results: Sequence[Any], calibration: Calibration | None) -> None:
    """Refuse results of two null hypotheses, which no words of one report fit."""
    from assay.conformal.human import NULL

    human = {str(getattr(result, "null", "")).startswith(NULL) for result in results if hasattr(result, "null")}
    if len(human) == 2:
        raise ValueError('results must be of keys or against "a human wrote it", got both. Make one report for each.')
    if human == {True} and calibration is None:
        raise ValueError('calibration must be given for results against "a human wrote it". Pass what tested them.')
    if human == {False} and calibration is not None:
        raise ValueError("calibration must not be given for results of keys. Leave it out.")


def _row(item: Any) -> tuple[str, str, Any]:
    if isinstance(item, tuple) and len(item) == 3:
        return str(item[0]), _source(item[1]), item[2]
    for name in ("doc_id", "source", "log_pvalue"):
        if not hasattr(item, name):
            raise ValueError(
                f"results must hold tuples (doc_id, source, TestResult) or records of a corpus run, got "
                f"{type(item).__name__} without {name!r}."
            )
    return str(item.doc_id), _source(item.source), item


def _source(source: Any) -> str:
    return NO_SOURCE if source is None else str(source)


def _placed(doc_ids: Sequence[str], excerpts: Sequence[Excerpt]) -> dict[int, Excerpt]:
    """The excerpts by row."""
    wanted = {excerpt.doc_id for excerpt in excerpts}
    rows: dict[str, list[int]] = {}
    for row, doc_id in enumerate(doc_ids):
        if doc_id in wanted:
            rows.setdefault(doc_id, []).append(row)
    placed = {}
    for excerpt in excerpts:
        found = rows.get(excerpt.doc_id, [])
        if len(found) != 1 or found[0] in placed:
            raise ValueError(
                f"excerpts must name each one document, got {excerpt.doc_id!r}, which {len(found)} results carry. "
                "Give every document an id of its own and at most one excerpt."
            )
        placed[found[0]] = excerpt
    return placed


def _codes(values: Sequence[str | None]) -> tuple[list[str], Integers]:
    """Distinct names in order of appearance, and each value's place among them; -1 for None."""
    places: dict[str, int] = {}
    codes = [-1 if value is None else places.setdefault(value, len(places)) for value in values]
    return list(places), np.array(codes, dtype=np.int64)


def _distinct(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value is not None))


def _timestamp(made: datetime | None) -> str:
    made = datetime.now(UTC) if made is None else made
    if made.tzinfo is None:
        raise ValueError(f"made must have a time zone, got {made!r}. Use datetime.now(timezone.utc).")
    return made.astimezone(UTC).strftime(MADE_FORMAT)


@cache
def _software() -> tuple[Version, ...]:
    return (
        Version(name="assay", version=__version__),
        Version(name="python", version=platform.python_version()),
        *(Version(name=name, version=metadata.version(name)) for name in ("numpy", "scipy", "tokenizers")),
    )
