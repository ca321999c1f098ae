"""Did model A write this? From text and model to a result: one rule of decoding, or a declared grid of rules.

The null names the decoding rule. Without it a test of "A wrote it" rejects A's own truncated or cooled output.
Law under H0: see the tests in `tilt` and `bounds`; a grid keeps the largest p and the smallest e. Setting:
arXiv:2501.02406.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from assay.detection.result import TestResult
from assay.detection.text import check_text, decode_text
from assay.detection.zero_shot.bounds import freedman_test, gap_test
from assay.detection.zero_shot.tilt import tilt_test
from assay.kernels.scoring.decoding import Decoding
from assay.kernels.scoring.statistics import TokenStatistics

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer

_FROM_TEXT: Final = (
    "The ids were made from the text. Where the generator wrote others, a forbidden token is no refutation: give the "
    "ids that were generated, or support_noise=1e-3."
)

Test = Literal["tilt", "freedman", "entropy-gap"]
Document = str | bytes | npt.ArrayLike


def identity_test(
    document: Document,
    scorer: ModelScorer,
    *,
    decoding: Decoding | Sequence[Decoding] | None = None,
    prompt: Any = None,
    burn_in: int = 0,
    test: Test = "tilt",
    support_noise: float = 0.0,
) -> TestResult:
    """Test whether a model, sampled by a known rule, wrote the text. A small p-value says: it did not.

    Guarantee: if the text is the model's output under the rule, P(pvalue <= a) <= a for every a. With several rules
    this holds whichever of them was used. A large p-value is no proof that the model wrote the text.

    Parameters
    ----------
    document
        A string, UTF-8 bytes, or token ids of shape (n,). Ids as they were generated are best: a text's own ids may
        differ, and one of them that a truncating rule forbids refutes the null. Give `support_noise` with a text.
    scorer
        The model.
    decoding
        The rule of the null: temperature, top-k, top-p, min-p. None is plain sampling at temperature 1. Several rules
        make a composite null: p is their largest, e their smallest, at one scoring pass per rule.
    prompt
        What stood before the text, if known, as `ModelScorer.score` takes it.
    burn_in
        Tokens at the start that give context and are not counted, >= 0: for a prompt that is not known. The null is
        then that the later tokens were drawn given the visible text alone, which an unknown prompt makes nearly true.
    test
        "tilt" (exact, anytime-valid, most powerful), "freedman", or "entropy-gap" (the statistic of arXiv:2501.02406).
    support_noise
        For "tilt": see `tilt_test`.

    Returns
    -------
    TestResult. With no counted token p and e are 1. A token that the rule forbids makes p exactly 0.

    Raises
    ------
    TextError
        If the text is not valid Unicode or the bytes are not UTF-8.
    ValueError
        On ids outside the vocabulary, no rule, burn_in below 0, an unknown test, or a setting out of range.
    """
    prompts = None if prompt is None else [prompt]
    return identity_tests(
        [document],
        scorer,
        decoding=decoding,
        prompt=prompts,
        burn_in=burn_in,
        test=test,
        support_noise=support_noise,
    )[0]


def identity_tests(
    documents: Sequence[Document],
    scorer: ModelScorer,
    *,
    decoding: Decoding | Sequence[Decoding] | None = None,
    prompt: Sequence[Any] | None = None,
    burn_in: int = 0,
    test: Test = "tilt",
    support_noise: float = 0.0,
    progress: bool = False,
) -> list[TestResult]:
    """`identity_test` on many texts, scored in batches.

    Parameters
    ----------
    documents
        As in `identity_test`, one per text.
    prompt
        As in `ModelScorer.score`: ids for all texts, or one entry per text.
    scorer, decoding, burn_in, test, support_noise
        As in `identity_test`.
    progress
        Whether to show a progress bar on standard error.

    Returns
    -------
    One TestResult per text, each valid by itself; correct for their number with `holm` or `benjamini_hochberg`.
    """
    rules = decoding_rules(decoding)
    if test not in ("tilt", "freedman", "entropy-gap"):
        raise ValueError(f"test must be 'tilt', 'freedman' or 'entropy-gap', got {test!r}.")
    if support_noise and test != "tilt":
        raise ValueError(f"support_noise must be 0 for test {test!r}, got {support_noise}. Use test='tilt'.")
    checked = [readable(document) for document in documents]
    candidates = vocabulary(scorer)

    def run(statistics: TokenStatistics) -> TestResult:
        if test == "tilt":
            return tilt_test(statistics, support_noise=support_noise)
        return (freedman_test if test == "freedman" else gap_test)(statistics, candidates=candidates)

    per_rule = []
    for rule in rules:
        found = scorer.score(checked, prompt=prompt, progress=progress, **settings(rule))
        results = [run(after_burn_in(statistics, burn_in)) for statistics in found]
        named = [_named(result, rule, burn_in) for result in results]
        per_rule.append([_warned(result, one) for result, one in zip(named, checked, strict=True)])
    return [over_rules(results) for results in zip(*per_rule, strict=True)]


def over_rules(results: Sequence[TestResult]) -> TestResult:
    """One result for a composite null from one result per member: the largest p-value and the smallest e-value.

    Guarantee: if any member of the null is true, its own p-value is valid and the reported one is no smaller; likewise
    for the e-value. No correction is due, because the null is rejected only where every member is.

    Parameters
    ----------
    results
        One per member of the null, at least one, of one text.

    Returns
    -------
    The only result as it is; else the one with the largest p-value, with the others in `components`.
    """
    if len(results) == 0:
        raise ValueError("results must hold at least one result, got none.")
    if len(results) == 1:
        return results[0]
    kept = max(results, key=lambda result: result.log_pvalue)
    return replace(
        kept,
        log_evalue=min(result.log_evalue for result in results),
        null=" or ".join(dict.fromkeys(result.null for result in results)),
        assumptions=(*kept.assumptions, f"The null is composite: the least refuted of {len(results)} members counts."),
        components=tuple(results),
    )


def studentised_score(statistics: TokenStatistics) -> float:
    """sum(x - H) / sqrt(sum V): standard normal under "this model wrote it" as the text grows, and only then.

    A fast screen and NOT a p-value: at any given length no bound on its error is proved. It is minus the analytic
    curvature of Fast-DetectGPT.

    Parameters
    ----------
    statistics
        Of one text; tokens that were not scored do not count.

    Returns
    -------
    float; +inf if a token was impossible, 0 where nothing varies.

    References
    ----------
    Bao et al. (2024), arXiv:2310.05130; martingale central limit theorem: Hall and Heyde (1980), Theorem 3.2.
    """
    scored = statistics.rows(statistics.scored)
    if np.any(np.isneginf(scored.log_prob)):
        return math.inf
    spread = math.sqrt(float(np.sum(scored.varentropy)))
    return float(np.sum(-scored.log_prob - scored.entropy)) / spread if spread > 0 else 0.0


def decoding_rules(decoding: Decoding | Sequence[Decoding] | None) -> tuple[Decoding, ...]:
    """The rules of a null, at least one."""
    if decoding is None:
        return (Decoding(),)
    if isinstance(decoding, Decoding):
        return (decoding,)
    rules = tuple(decoding) if isinstance(decoding, Iterable) else ()
    if not rules or not all(isinstance(rule, Decoding) for rule in rules):
        raise ValueError(f"decoding must be a Decoding, several, or None, got {decoding!r}. None is plain sampling.")
    return rules


def settings(rule: Decoding) -> dict[str, Any]:
    """A rule as the arguments of `ModelScorer.score`."""
    return {"temperature": rule.temperature, "top_k": rule.top_k, "top_p": rule.top_p, "min_p": rule.min_p}


def in_words(rule: Decoding) -> str:
    """A rule for people, such as "temperature 0.7, top-k 50"."""
    parts = [f"temperature {rule.temperature:g}"]
    parts += [f"{name} {value:g}" for name, value in (("top-k", rule.top_k), ("top-p", rule.top_p)) if value]
    return ", ".join(parts + ([f"min-p {rule.min_p:g}"] if rule.min_p else []))


def vocabulary(scorer: ModelScorer) -> int:
    """Number of candidates of the model's law."""
    layer = scorer.model.get_output_embeddings()
    return int((scorer.model.get_input_embeddings() if layer is None else layer).weight.shape[0])


def readable(document: Document) -> Any:
    """A text or ids as the scorer reads them; bytes decoded, text checked."""
    if isinstance(document, (bytes, bytearray)):
        document = decode_text(bytes(document))
    return check_text(document) if isinstance(document, str) else np.asarray(document)


def after_burn_in(statistics: TokenStatistics, burn_in: int) -> TokenStatistics:
    """The statistics with the first `burn_in` tokens marked as not scored."""
    if isinstance(burn_in, bool) or burn_in != int(burn_in) or burn_in < 0:
        raise ValueError(f"burn_in must be an integer >= 0, got {burn_in}.")
    if burn_in == 0:
        return statistics
    return replace(statistics, scored=statistics.scored & (np.arange(len(statistics)) >= burn_in))


def _warned(result: TestResult, document: Any) -> TestResult:
    """The result, with a word on its ids if they were made from a text and one of them refuted the null."""
    if not isinstance(document, str) or not math.isinf(result.log_pvalue):
        return result
    return replace(result, assumptions=(*result.assumptions, _FROM_TEXT))


def _named(result: TestResult, rule: Decoding, burn_in: int) -> TestResult:
    notes = (f"The first {burn_in} tokens only gave context, in place of an unknown prompt.",) if burn_in else ()
    null = f"the model wrote the text at {in_words(rule)}"
    return replace(result, null=null, assumptions=(*result.assumptions, *notes))
