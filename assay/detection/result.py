"""The one statistical object: what was tested, how extreme it is, how many tokens count, and what was assumed.

p-values and e-values are kept as natural logarithms, because real evidence goes far below the smallest float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SCHEMA = "assay.test-result/1"


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """Outcome of one test on one document.

    Guarantee: under the null hypothesis and the listed assumptions P(pvalue <= a) <= a for every a in [0, 1], and the
    expectation of the e-value is at most 1.

    Attributes
    ----------
    test
        Name of the test, such as "gumbel-sum".
    statistic
        The observed statistic; its law under the null is named in `null`.
    log_pvalue
        Natural logarithm of the p-value, in [-inf, 0].
    log_evalue
        Natural logarithm of the e-value, in [-inf, inf].
    n_tokens
        Tokens in the document.
    n_scored
        Tokens that count in the statistic.
    n_repeats_dropped
        Tokens left out because the same (context, token) was already counted.
    null
        The null hypothesis in words.
    alternative
        Which direction of the statistic speaks against the null.
    key_id
        Id of the key tested, or of the most significant key where several were tested.
    scheme
        Scheme and version of that key, such as "gumbel/1".
    assumptions
        What the guarantee rests on, one sentence each.
    components
        Results that this one combines: the tests or the keys.
    """

    __test__ = False  # pytest collects classes named Test*

    test: str
    statistic: float
    log_pvalue: float
    log_evalue: float
    n_tokens: int
    n_scored: int
    n_repeats_dropped: int = 0
    null: str
    alternative: Literal["greater", "less", "two-sided"]
    key_id: str | None = None
    scheme: str | None = None
    assumptions: tuple[str, ...] = ()
    components: tuple[TestResult, ...] = ()

    def __post_init__(self) -> None:
        if math.isnan(self.log_pvalue) or self.log_pvalue > 0:
            raise ValueError(f"log_pvalue must be at most 0, got {self.log_pvalue}.")
        if math.isnan(self.log_evalue):
            raise ValueError("log_evalue must be a number, got nan.")

    @property
    def pvalue(self) -> float:
        """The p-value; 0.0 only where it is below the smallest float (then read `log10_pvalue`)."""
        return math.exp(self.log_pvalue)

    @property
    def log10_pvalue(self) -> float:
        """Base-10 logarithm of the p-value."""
        return self.log_pvalue / math.log(10)

    @property
    def evalue(self) -> float:
        """The e-value; inf where it exceeds the largest float (then read `log_evalue`)."""
        return math.exp(self.log_evalue) if self.log_evalue < 709.78 else math.inf

    def sentence(self) -> str:
        """The result as one sentence for a reader who knows no statistics."""
        if self.n_scored == 0:
            reason = "the text is too short, or of a length that was not calibrated"
            if self.key_id is not None:
                reason = "no token has enough text before it"
            return f"Nothing could be tested: {reason}, so the result says nothing either way."
        odds = format_pvalue(self.log_pvalue)
        counted = f"({self.n_scored} of {self.n_tokens} tokens counted)"
        if self.key_id is None:
            return f"If {self.null}, evidence this strong would appear with probability at most {odds} {counted}."
        return (
            "If the text had been written without the key, "
            f"evidence this strong under key {self.key_id!r} would appear with probability at most {odds} {counted}."
        )

    def __repr__(self) -> str:
        parts = [
            f"test={self.test!r}",
            f"statistic={self.statistic:.6g}",
            f"pvalue={format_pvalue(self.log_pvalue)}",
            f"evalue={format_evalue(self.log_evalue)}",
            f"n_scored={self.n_scored}",
            f"n_repeats_dropped={self.n_repeats_dropped}",
            f"null={self.null!r}",
            f"alternative={self.alternative!r}",
        ]
        if self.key_id is not None:
            parts.append(f"key_id={self.key_id!r}")
        return f"TestResult({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back exactly. Infinities become the strings "-inf" and "inf"."""
        out: dict[str, Any] = {"schema": SCHEMA}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "components":
                value = [component.to_dict() for component in value]
            elif field.name == "assumptions":
                value = list(value)
            elif isinstance(value, float) and math.isinf(value):
                value = "inf" if value > 0 else "-inf"
            out[field.name] = value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TestResult:
        """The result that `to_dict` wrote; other entries, such as the sentence that `assay detect` adds, are left out.

        Raises
        ------
        ValueError
            If the schema is not one this version reads.
        """
        schema = data.get("schema")
        if schema != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA!r}, got {schema!r}. Read it with the version that wrote it.")
        values = {field.name: data[field.name] for field in fields(cls)}
        for name in ("statistic", "log_pvalue", "log_evalue"):
            values[name] = float(values[name])
        values["assumptions"] = tuple(values["assumptions"])
        values["components"] = tuple(cls.from_dict(component) for component in values["components"])
        return cls(**values)


class Counted(Protocol):
    """What a document shows under one key: which tokens count, of how many."""

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Shape (k,): the tokens that count."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the document."""

    @property
    def n_repeats_dropped(self) -> int:
        """Tokens left out as repeats."""


def evalue_result(
    test: str, log_evalue: float, counted: Counted, *, null: str, assumptions: tuple[str, ...]
) -> TestResult:
    """The result of a test by an e-value: p is 1 / e, valid by Markov's inequality where the mean of e is at most 1."""
    return TestResult(
        test=test,
        statistic=log_evalue,
        log_pvalue=min(0.0, -log_evalue),
        log_evalue=log_evalue,
        n_tokens=counted.n_tokens,
        n_scored=len(counted.positions),
        n_repeats_dropped=counted.n_repeats_dropped,
        null=null,
        alternative="greater",
        assumptions=assumptions,
    )


def format_pvalue(log_pvalue: float) -> str:
    """A p-value for people: three significant digits, scientific below 1e-4, exact far below the smallest float."""
    if log_pvalue == -math.inf:
        return "0"
    if log_pvalue > math.log(1e-4):
        return f"{math.exp(log_pvalue):.3g}"
    return _scientific(log_pvalue)


def format_evalue(log_evalue: float) -> str:
    """An e-value for people: three significant digits, scientific from 1e5 and below 1e-4."""
    if math.isinf(log_evalue):
        return "inf" if log_evalue > 0 else "0"
    if math.log(1e-4) < log_evalue < math.log(1e5):
        return f"{math.exp(log_evalue):.3g}"
    return _scientific(log_evalue)


def _scientific(log_value: float) -> str:
    exponent = math.floor(log_value / math.log(10))
    mantissa = math.exp(log_value - exponent * math.log(10))
    if mantissa >= 9.95:
        mantissa, exponent = 1.0, exponent + 1
    return f"{mantissa:.1f}e{exponent:+03d}"
