"""From test results to the numbers of a report: counts, shares with exact intervals, histogram, flags.

Flags: Benjamini and Hochberg (1995), in log space. Intervals: Clopper and Pearson (1934), exact binomial. Band of the
histogram: binomial quantiles with Bonferroni's correction over the bins.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from assay import __version__
from assay.detection.multiplicity import benjamini_hochberg
from assay.report import wording
from assay.report.excerpts import clean, fit
from assay.report.records import (
    SHORT_TOKENS,
    Counts,
    Document,
    Excerpt,
    Histogram,
    InputFile,
    KeyRecord,
    LengthBucket,
    RejectReason,
    SourceShare,
    TokenizerRecord,
    Version,
)
from assay.report.report import MADE_FORMAT, Report

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LENGTH_EDGES = (1, 50, 100, SHORT_TOKENS, 400, 800, 1600, 3200)
BINS = 20
BAND_LEVEL = 0.99
SHARE_LEVEL = 0.95
NO_SOURCE = "(no source)"
_MOST_SOURCES = 200


class Identity(NamedTuple):
    """What names one result: id, place in the input, and the key found."""

    doc_id: str
    file: str | None
    row: int | None
    scheme: str | None


@dataclass(frozen=True)
class ResultColumns:
    """Results column by column, so that millions of documents fit; arrays have shape (documents,).

    `sources` and `key_ids` are names; `source_codes` and `key_codes` (int64) point into them, key code -1: no key.
    `identify` returns the identities of the rows asked for.
    """

    statistic: Floats
    log_pvalue: Floats
    log_evalue: Floats
    n_tokens: Integers
    n_scored: Integers
    n_repeats_dropped: Integers
    sources: Sequence[str]
    source_codes: Integers
    key_ids: Sequence[str]
    key_codes: Integers
    identify: Callable[[Sequence[int]], Sequence[Identity]]


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a report says about its making besides the results."""

    title: str
    made: datetime | None
    listed: int
    keys: Sequence[KeyRecord]
    tests: Sequence[str]
    nulls: Sequence[str]
    assumptions: Sequence[str]
    inputs: Sequence[InputFile]
    results: InputFile | None
    tokenizer: TokenizerRecord | None
    rejects: Sequence[RejectReason]


def from_results(
    results: Iterable[Any],
    *,
    fdr: float,
    title: str,
    excerpts: Sequence[Excerpt],
    keys: Iterable[Any],
    inputs: Sequence[InputFile],
    tokenizer: Any,
    rejects: Sequence[RejectReason],
    listed: int,
    made: datetime | None,
) -> Report:
    """See `Report.from_results`."""
    rows = [_row(item) for item in results]
    found = [row[2] for row in rows]
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
        tests=_distinct(getattr(result, "test", None) for result in found),
        nulls=_distinct(getattr(result, "null", None) for result in found),
        assumptions=_distinct(note for result in found for note in getattr(result, "assumptions", ())),
        inputs=inputs,
        results=None,
        tokenizer=tokenizer_record(tokenizer),
        rejects=rejects,
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
    keys = _keys(columns, flagged, circumstances.keys)
    sources, sources_left_out = _sources(columns, tested, flagged)
    return Report(
        title=clean(circumstances.title),
        made=_timestamp(circumstances.made),
        software=_software(),
        fdr=float(fdr),
        verdict=wording.verdict(counts, fdr, keys),
        counts=counts,
        log_pvalue_threshold=float(np.max(columns.log_pvalue[flagged])) if counts.flagged else None,
        histogram=histogram(columns.log_pvalue[tested]),
        lengths=_lengths(columns, tested, flagged),
        sources=sources,
        sources_left_out=sources_left_out,
        documents=_documents(columns, log_qvalue, flagged, excerpts, circumstances.listed),
        keys=keys,
        tests=tuple(circumstances.tests),
        nulls=tuple(circumstances.nulls),
        assumptions=tuple(clean(note) for note in circumstances.assumptions),
        inputs=tuple(InputFile(name=clean(one.name), sha256=one.sha256, size=one.size) for one in circumstances.inputs),
        results=circumstances.results,
        tokenizer=circumstances.tokenizer,
        rejects=tuple(RejectReason(reason=clean(one.reason), rows=one.rows) for one in circumstances.rejects),
        limits=wording.LIMITS,
    )


def check_fdr(fdr: float) -> None:
    """Refuse what is no false discovery rate."""
    if not isinstance(fdr, (int, float)) or not 0 < fdr < 1:
        raise ValueError(f"fdr must be in (0, 1), got {fdr!r}. 0.01 keeps the expected share of false alarms at 1 %.")


def histogram(log_pvalue: Floats) -> Histogram:
    """p-values in bins of equal width, with the band in which uniform p-values stay."""
    n = len(log_pvalue)
    counts, _ = np.histogram(np.exp(log_pvalue), bins=BINS, range=(0.0, 1.0))
    tail = (1 - BAND_LEVEL) / (2 * BINS)
    return Histogram(
        counts=tuple(int(count) for count in counts),
        band_low=_binomial_quantile(tail, n, 1 / BINS),
        band_high=_binomial_quantile(1 - tail, n, 1 / BINS),
        band_level=BAND_LEVEL,
    )


def clopper_pearson(successes: int, trials: int, level: float = SHARE_LEVEL) -> tuple[float, float]:
    """The exact binomial interval: it covers the true share with probability at least `level`.

    Reference: Clopper and Pearson (1934), Biometrika 26, 404-413.
    """
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(special.betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def _binomial_quantile(probability: float, trials: int, share: float) -> int:
    """The smallest k with P(Binomial(trials, share) <= k) >= probability."""
    low, high = 0, trials
    while low < high:
        middle = (low + high) // 2
        if special.bdtr(middle, trials, share) >= probability:
            high = middle
        else:
            low = middle + 1
    return low


def _lengths(columns: ResultColumns, tested: npt.NDArray[np.bool_], flagged: npt.NDArray[np.bool_]) -> tuple[
    LengthBucket, ...
]:
    buckets = []
    bucket_of = np.searchsorted(np.array(LENGTH_EDGES), columns.n_tokens, side="right") - 1
    for place, shortest in enumerate(LENGTH_EDGES):
        inside = (bucket_of == place) & tested
        documents, hits = int(np.sum(inside)), int(np.sum(inside & flagged))
        low, high = clopper_pearson(hits, documents)
        evidence = columns.log_pvalue[inside]
        buckets.append(
            LengthBucket(
                shortest=shortest,
                longest=LENGTH_EDGES[place + 1] - 1 if place + 1 < len(LENGTH_EDGES) else None,
                documents=documents,
                flagged=hits,
                low=low,
                high=high,
                log_pvalue_smallest=float(np.min(evidence)) if documents else None,
                # The lower of two middle values, so that the median is a p-value that occurred, even among infinities.
                log_pvalue_median=float(np.sort(evidence)[(documents - 1) // 2]) if documents else None,
            )
        )
    return tuple(buckets)


def _sources(
    columns: ResultColumns, tested: npt.NDArray[np.bool_], flagged: npt.NDArray[np.bool_]
) -> tuple[tuple[SourceShare, ...], int]:
    documents = np.bincount(columns.source_codes[tested], minlength=len(columns.sources))
    hits = np.bincount(columns.source_codes[flagged], minlength=len(columns.sources))
    names = [clean(name) for name in columns.sources]
    order = sorted((i for i in range(len(names)) if documents[i]), key=lambda i: (-int(documents[i]), names[i]))
    shares = []
    for i in order[:_MOST_SOURCES]:
        low, high = clopper_pearson(int(hits[i]), int(documents[i]))
        shares.append(
            SourceShare(source=names[i], documents=int(documents[i]), flagged=int(hits[i]), low=low, high=high)
        )
    return tuple(shares), max(0, len(order) - _MOST_SOURCES)


def _keys(
    columns: ResultColumns, flagged: npt.NDArray[np.bool_], described: Sequence[KeyRecord]
) -> tuple[KeyRecord, ...]:
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
    flagged: npt.NDArray[np.bool_],
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


def most_certain(log_pvalue: Floats, log_evalue: Floats, count: int) -> list[int]:
    """The rows with the smallest p-values, ties by larger e-value, then by row; at most `count`."""
    rows = np.arange(len(log_pvalue))
    if 0 < count < len(rows):
        rows = np.flatnonzero(log_pvalue <= np.partition(log_pvalue, count - 1)[count - 1])
    order = np.lexsort((rows, -log_evalue[rows], log_pvalue[rows]))
    return [int(i) for i in rows[order[:count]]]


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


def tokenizer_record(tokenizer: Any) -> TokenizerRecord | None:
    """Name and hash of a tokenizer, or None where none is given."""
    if tokenizer is None or isinstance(tokenizer, TokenizerRecord):
        return tokenizer
    from assay.detection.text import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return TokenizerRecord(name=clean(loaded.name), sha256=loaded.sha256)


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
