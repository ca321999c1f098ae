"""What a report holds: frozen records of plain values, and their exact round trip through JSON.

Probabilities are kept as natural logarithms, because real evidence goes far below the smallest float; an infinite
logarithm is written as the string "-inf" or "inf".
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

SHORT_TOKENS = 200
"""Documents with fewer tokens are marked as short."""

MOST_STEPS = 500
"""Most scores of a monitored source that a report holds."""

MOST_STATES = 64
"""Most states of a labelled source: more bars cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Consecutive tokens of one document; a report keeps the 200 with the most evidence.

    Attributes
    ----------
    doc_id
        The document's id, as in the results.
    pieces
        The text of each token; joined they give the excerpt. May be the whole document.
    log_tail
        For each token the natural logarithm of the probability, in [-inf, 0], of a score at least as large under the
        null; None where the token is not counted (a repeat, or too little text before it). Shape as `pieces`.
    start
        Place of the first token in the document, from 0.
    """

    doc_id: str
    pieces: tuple[str, ...]
    log_tail: tuple[float | None, ...]
    start: int = 0

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.log_tail):
            raise ValueError(
                f"log_tail must have one entry per piece, got {len(self.log_tail)} for {len(self.pieces)} pieces "
                f"(document {self.doc_id!r}). Use None for tokens that are not counted."
            )
        for value in self.log_tail:
            if value is not None and not value <= 0:
                raise ValueError(f"log_tail must hold logarithms of probabilities, at most 0, got {value}.")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One listed document. `flagged` is the decision at the report's false discovery rate."""

    doc_id: str
    source: str
    file: str | None
    row: int | None
    n_tokens: int
    n_scored: int
    n_repeats_dropped: int
    statistic: float
    log_pvalue: float
    log_qvalue: float
    log_evalue: float
    key_id: str | None
    scheme: str | None
    flagged: bool
    excerpt: Excerpt | None

    @property
    def short(self) -> bool:
        """Whether the document has fewer than 200 tokens."""
        return self.n_tokens < SHORT_TOKENS


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals of the run.

    Attributes
    ----------
    documents
        Documents with a result.
    tested
        Those with at least one token that counts; only these can be flagged and only these enter shares and histogram.
    flagged
        Those flagged at the report's false discovery rate.
    short, short_flagged
        Tested documents with fewer than 200 tokens, and the flagged ones among them.
    rejected
        Input rows that could not be read as documents.
    tokens, tokens_scored, repeats_dropped
        Sums over all documents.
    """

    documents: int
    tested: int
    flagged: int
    short: int
    short_flagged: int
    rejected: int
    tokens: int
    tokens_scored: int
    repeats_dropped: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """p-values of the tested documents in bins of equal width over [0, 1].

    Attributes
    ----------
    counts
        Documents per bin.
    band_low, band_high
        If no document were marked, all bins together would lie in this band with probability at least `band_level`
        (binomial quantiles, Bonferroni over the bins). A conservative test falls short of it on the left. None where
        the p-values share a calibration, which moves all bins together.
    band_level
        In (0, 1); None without a band.
    """

    counts: tuple[int, ...]
    band_low: int | None
    band_high: int | None
    band_level: float | None


@dataclass(frozen=True, kw_only=True)
class LengthBucket:
    """Tested documents with `shortest` to `longest` tokens (None: no upper end).

    `low` and `high` bound the share flagged: Clopper-Pearson, 95 %. The p-values are None in an empty bucket.
    """

    shortest: int
    longest: int | None
    documents: int
    flagged: int
    low: float
    high: float
    log_pvalue_smallest: float | None
    log_pvalue_median: float | None


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """Tested documents of one source; `low` and `high` as in `LengthBucket`."""

    source: str
    documents: int
    flagged: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """The public description of one key, and how many flagged documents name it.

    `parameters` is the canonical JSON of the scheme settings; what is not known is None.
    """

    id: str
    scheme: str | None
    parameters: str | None
    fingerprint: str | None
    state: str | None
    flagged: int


@dataclass(frozen=True, kw_only=True)
class CalibrationGroup:
    """Calibration texts of one kind or length, and the natural logarithm of the smallest p-value that they allow."""

    name: str
    texts: int
    log_pvalue_floor: float


@dataclass(frozen=True, kw_only=True)
class ScoringModel:
    """A model that scores were computed with: name for people, SHA-256 of its weights."""

    name: str
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """The human texts that documents were compared with, and what both were scored with.

    What is not known is None or empty.

    Attributes
    ----------
    id
        First 16 hexadecimal digits of the hash of the calibration's file, which holds no text.
    score
        Name of the zero-shot score.
    guarantee
        What the p-values promise, in words.
    min_tokens
        Documents with fewer counted tokens were not tested.
    texts_sha256
        Hash of the human texts.
    groups
        The texts by kind or length.
    models
        The scoring model, and the second one of scores that need two.
    """

    id: str
    score: str | None
    guarantee: str | None
    min_tokens: int | None
    texts_sha256: str | None
    groups: tuple[CalibrationGroup, ...]
    models: tuple[ScoringModel, ...]


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input file: name, SHA-256 in hexadecimal, size in bytes; what is not known is None."""

    name: str
    sha256: str | None
    size: int | None


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that made the token ids: name for people, SHA-256 of its canonical JSON."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RejectReason:
    """How many input rows were rejected for one reason."""

    reason: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class MonitoredSource:
    """What a monitor saw of one source: the alarm, its bound, and the series or the part of it that matters.

    Attributes
    ----------
    source
        Name of the source.
    words
        The outcome, with the anytime-valid bound on a false alarm, in two or three sentences.
    alpha
        Miscoverage level of the intervals, in (0, 1).
    max_miss_rate, false_alarm
        If every interval misses with probability at most the first, given the past, an alarm is ever raised with
        probability at most the second; both in (0, 1).
    n_scores, n_missed
        Scores watched, and those that left their intervals on a side that counts.
    alarm
        Place of the score at which the alarm was raised, from 0; None if none was.
    log_evalue_largest
        Largest natural logarithm of the e-value; the alarm stands where it first reaches -log(false_alarm).
    first
        Place of the first score of the series below, which has at most 500.
    scores, point, lower, upper
        Scores, forecasts and ends of the intervals; an end that is not watched is infinite.
    missed
        Which scores are counted in `n_missed`.
    log_evalue
        Natural logarithm of the e-value after each score.
    """

    source: str
    words: str
    alpha: float
    max_miss_rate: float
    false_alarm: float
    n_scores: int
    n_missed: int
    alarm: int | None
    log_evalue_largest: float
    first: int
    scores: tuple[float, ...]
    point: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    missed: tuple[bool, ...]
    log_evalue: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("alpha", "max_miss_rate", "false_alarm"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}.")
        n = len(self.scores)
        others = (self.point, self.lower, self.upper, self.missed, self.log_evalue)
        if not 1 <= n <= MOST_STEPS or any(len(series) != n for series in others):
            raise ValueError(f"the series of a monitored source must be of equal length in 1..{MOST_STEPS}, got {n}.")
        if not (0 <= self.first <= self.n_scores - n and 0 <= self.n_missed <= self.n_scores):
            raise ValueError(f"first must be in 0..{self.n_scores - n} and n_missed in 0..{self.n_scores}.")
        if self.alarm is not None and not 0 <= self.alarm - self.first < n:
            raise ValueError(f"alarm must be the place of a score in the series, got {self.alarm}.")
        if not all(map(math.isfinite, (*self.scores, *self.point))):
            raise ValueError("scores and point of a monitored source must be finite.")
        if not all(low <= high for low, high in zip(self.lower, self.upper, strict=True)):
            raise ValueError("lower of a monitored source must be at most upper.")


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """Exact sets of states for the steps of one source, such as authors of the sentences of a mixed document.

    Attributes
    ----------
    source
        Name of the source.
    words
        The outcome, with the coverage and what it rests on, in two sentences.
    alpha
        Miscoverage level of each set, in (0, 1).
    states
        The states that can occur, as text; at most 64.
    n_sets
        Sets, each for one or more steps at once.
    sizes
        sizes[k]: for how many steps k of the states remain possible, k from 0 to the number of states.
    """

    source: str
    words: str
    alpha: float
    states: tuple[str, ...]
    n_sets: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {self.alpha}.")
        if not 1 <= len(self.states) <= MOST_STATES or len(self.sizes) != len(self.states) + 1:
            raise ValueError(
                f"a labelled source must have 1..{MOST_STATES} states and one size more, got {len(self.states)} and "
                f"{len(self.sizes)}."
            )
        if min(self.sizes) < 0 or not 1 <= self.n_sets <= sum(self.sizes):
            raise ValueError(f"sizes must be at least 0 and n_sets in 1..{sum(self.sizes)}, got {self.n_sets}.")


@dataclass(frozen=True, kw_only=True)
class Version:
    """Name and version of one piece of software that the numbers depend on."""

    name: str
    version: str


R = TypeVar("R")


def to_plain(value: Any) -> Any:
    """A record, or anything inside one, as JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        optional = optional_fields(type(value))
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: to_plain(item) for name, item in found.items() if item or name not in optional}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def from_plain(kind: type[R], value: Any, where: str) -> R:
    """The record of type `kind` that `to_plain` wrote; strict about names and types.

    Raises
    ------
    ValueError
        Naming the place and what was expected there.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}.")
    # mypy does not take a type variable's type for hashable.
    hints = field_types(typing.cast(typing.Hashable, kind))
    odd = sorted((value.keys() ^ hints.keys()) - (optional_fields(kind) - value.keys()))
    if odd:
        raise ValueError(f"{where} must have exactly the fields {sorted(hints)}; missing or unknown: {odd}.")
    present = {name: hint for name, hint in hints.items() if name in value}
    return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in present.items()})


@cache
def field_types(kind: Any) -> dict[str, Any]:
    """The field names of a record and their resolved types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def optional_fields(kind: Any) -> frozenset[str]:
    """Fields that are left out of the JSON while they are empty, so that what was written without them stays valid."""
    return frozenset(field.name for field in dataclasses.fields(kind) if field.default == ())


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _read(next(kind for kind in arguments if kind is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be an array, got {type(value).__name__}.")
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if hint is float:
        return _read_float(value, where)
    # bool is a subclass of int, and true is not a count.
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {type(value).__name__}.")
    return value


def _read_float(value: Any, where: str) -> float:
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'{where} must be a number, "inf" or "-inf", got {type(value).__name__}.')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise ValueError(f'{where} must be a finite float, or "inf" or "-inf", got a number beyond the largest float.')
    return number
