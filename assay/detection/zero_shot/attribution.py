"""A or B? Which of several models wrote a text: a set of them that holds the author, or "none of them".

Every candidate is tested by an e-process: half its tilt process, half the other candidates' likelihood over its own.
Those not rejected at the level are a confidence set: it misses the author with probability at most the level, however
many candidates there are. Setting: arXiv:2501.02406; Theorems 5 and 7 of docs/explanation/zero-shot.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import special

from assay.detection.result import TestResult
from assay.detection.text import load_tokenizer
from assay.detection.zero_shot.identity import (
    Document,
    after_burn_in,
    in_words,
    over_rules,
    readable,
    settings,
    vocabulary,
)
from assay.detection.zero_shot.likelihood import result
from assay.detection.zero_shot.tilt import tilt_path
from assay.kernels.scoring.decoding import Decoding
from assay.kernels.scoring.statistics import Floats, TokenStatistics

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer

Side = Literal["in-house", "non-sanctioned"]
_NOT_CANONICAL: Final = (
    "The tokenizers differ: the error rate grows by the probability that the author emits ids other than those its "
    "tokenizer gives to the finished text."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A model that may have written the text, and how it would have been sampled.

    Attributes
    ----------
    scorer
        The model; it needs a tokenizer where texts are given as strings.
    decoding
        Its rule; several rules are several candidates.
    support_noise
        As in `tilt_test`: for a generator whose arithmetic differs at the edge of its support.
    """

    scorer: ModelScorer
    decoding: Decoding = Decoding()  # noqa: RUF009 - frozen
    support_noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """One candidate's part in an attribution.

    Attributes
    ----------
    name, side
        Whom it stands for.
    log_likelihood
        Natural log of the probability of the counted tokens; -inf if it could not have written the text.
    bits_per_byte
        -log_likelihood in bits over the UTF-8 bytes of the text: comparable across tokenizers. None for a text given
        as ids.
    result
        The test of "this candidate wrote it".
    """

    name: str
    side: Side
    log_likelihood: float
    bits_per_byte: float | None
    result: TestResult


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Who may have written a text.

    Guarantee: if a candidate wrote it, that candidate is missing from `plausible` with probability at most `level`. So
    each of "another model alone", "the other side" and "none of them" is answered wrongly at most so often.

    Attributes
    ----------
    answer
        The name of the only plausible candidate; the side, where several of one side are plausible; "undecided", where
        both sides are; "none of them", where no candidate is.
    plausible
        Names of the candidates not rejected at `level`, the best explanation first.
    best
        The candidate with the highest likelihood, rejected or not.
    level
        Error rate of the answer.
    members
        Every candidate, in the order given.
    in_house, non_sanctioned
        The test of "some model of this side wrote it": its least refuted member. None if the side is empty.
    """

    answer: str
    plausible: tuple[str, ...]
    best: str
    level: float
    members: tuple[Member, ...]
    in_house: TestResult | None
    non_sanctioned: TestResult | None


def attribute(
    document: Document,
    in_house: Mapping[str, Candidate],
    non_sanctioned: Mapping[str, Candidate],
    *,
    level: float = 0.01,
    prompt: Any = None,
    burn_in: int = 0,
) -> Attribution:
    """Which of the candidates wrote the text, or none of them.

    Guarantee: see `Attribution`. Candidates that share a tokenizer, or a text given as ids, are compared token by
    token and whatever ended the text. Otherwise whole texts are compared, and the guarantee holds up to the probability
    that the author emits ids that its tokenizer would not give to the finished text.

    Parameters
    ----------
    document
        A string, UTF-8 bytes, or token ids of shape (n,) that all candidates share.
    in_house, non_sanctioned
        Candidates by name; together at least one, no name twice. `in-house`, `non-sanctioned`, `undecided` and `none of
        them` are taken.
    level
        Error rate of the answer, in (0, 1).
    prompt, burn_in
        As in `identity_test`; burn_in counts each tokenizer's own tokens.

    Returns
    -------
    Attribution.

    Raises
    ------
    TextError
        If the text is not valid Unicode or the bytes are not UTF-8.
    ValueError
        On names or settings out of range, candidates whose vocabularies differ for a text given as ids, or a string
        without a tokenizer.
    """
    prompts = None if prompt is None else [prompt]
    return attribute_all([document], in_house, non_sanctioned, level=level, prompt=prompts, burn_in=burn_in)[0]


def attribute_all(
    documents: Sequence[Document],
    in_house: Mapping[str, Candidate],
    non_sanctioned: Mapping[str, Candidate],
    *,
    level: float = 0.01,
    prompt: Sequence[Any] | None = None,
    burn_in: int = 0,
) -> list[Attribution]:
    """`attribute` on many texts, scored in batches.

    Parameters
    ----------
    documents
        As in `attribute`, one per text; all texts or all ids.
    prompt
        As in `ModelScorer.score`.
    in_house, non_sanctioned, level, burn_in
        As in `attribute`.

    Returns
    -------
    One Attribution per text; the level holds for each text by itself.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    names = _names(in_house, non_sanctioned)
    sides: list[Side] = ["in-house" for _ in in_house]
    sides += ["non-sanctioned" for _ in non_sanctioned]
    candidates = [*in_house.values(), *non_sanctioned.values()]
    checked = [readable(document) for document in documents]
    groups = _groups(candidates, {isinstance(document, str) for document in checked})
    found = [
        [after_burn_in(one, burn_in) for one in c.scorer.score(checked, prompt=prompt, **settings(c.decoding))]
        for c in candidates
    ]
    out = []
    for d, document in enumerate(checked):
        statistics = [one[d] for one in found]
        n_bytes = len(document.encode()) if isinstance(document, str) else 0
        results = _compare(statistics, candidates, groups)
        rows = zip(names, sides, candidates, statistics, results, strict=True)
        out.append(_answer([_member(*row, n_bytes, len(set(groups)) > 1) for row in rows], level))
    return out


def _member(
    name: str,
    side: Side,
    candidate: Candidate,
    statistics: TokenStatistics,
    found: TestResult,
    n_bytes: int,
    across: bool,
) -> Member:
    likelihood = float(np.sum(statistics.log_prob[statistics.scored]))
    return Member(
        name=name,
        side=side,
        log_likelihood=likelihood,
        bits_per_byte=-likelihood / math.log(2) / n_bytes if n_bytes else None,
        result=replace(
            found,
            n_tokens=len(statistics),
            null=f"{name} wrote the text at {in_words(candidate.decoding)}",
            assumptions=(*found.assumptions, _NOT_CANONICAL) if across else found.assumptions,
        ),
    )


def _names(in_house: Mapping[str, Candidate], non_sanctioned: Mapping[str, Candidate]) -> list[str]:
    names = [*in_house, *non_sanctioned]
    taken = {"in-house", "non-sanctioned", "undecided", "none of them"} & set(names)
    if not names or len(set(names)) < len(names) or taken:
        raise ValueError(f"candidates must have names of their own, at least one in all, got {names}.")
    return names


def _groups(candidates: Sequence[Candidate], as_text: set[bool]) -> list[int]:
    """Which candidates share a tokenizer: equal numbers for equal tokenizers."""
    if len(as_text) > 1:
        raise ValueError("documents must be all texts or all token ids, got both. Attribute them in two calls.")
    loaded = [c.scorer.tokenizer for c in candidates]
    seen: dict[str, int] = {}
    hashes = [None if one is None else load_tokenizer(one).sha256 for one in loaded]
    groups = [seen.setdefault(one, len(seen)) for one in hashes if one is not None]
    if True not in as_text:
        if len(seen) > 1 or len({vocabulary(c.scorer) for c in candidates}) > 1:
            raise ValueError("documents must be texts where the candidates' tokenizers differ, got token ids.")
        return [0] * len(candidates)
    return groups


def _compare(statistics: list[TokenStatistics], candidates: Sequence[Candidate], groups: list[int]) -> list[TestResult]:
    """The test of each candidate against all the others."""
    out = []
    for i, (one, candidate) in enumerate(zip(statistics, candidates, strict=True)):
        # What one model cannot score (a first token without context) none that shares its tokens is asked for.
        same = [j for j, group in enumerate(groups) if group == groups[i]]
        counted = np.all([statistics[j].scored for j in same], axis=0)
        tolerant = candidate.support_noise > 0
        paths = [tilt_path(replace(one, scored=counted), support_noise=candidate.support_noise)]
        own = one.log_prob[counted]
        paths += [_ratio(own, statistics[j].log_prob[counted], tolerant) for j in same if j != i]
        foreign = [j for j in range(len(groups)) if groups[j] != groups[i]]
        out.append(_mixed(paths, [_text_ratio(one, statistics[j], candidates[j], tolerant) for j in foreign]))
    return out


def _mixed(paths: list[Floats], at_end: list[float]) -> TestResult:
    """Half the tilt process and half the mean of the ratios; those in `at_end` exist only once the text has ended."""
    n, count = len(paths[0]), len(paths) + len(at_end)
    if n == 0:
        return result("attribution", 0.0, 0.0, 0.0, 0)
    weights = np.array([0.0] if count == 1 else [-math.log(2)] + [-math.log(2 * (count - 1))] * (count - 1))
    whole = np.array([*(path[-1] for path in paths), *at_end])
    last = float(special.logsumexp(whole + weights))
    if at_end:
        return result("attribution", last, -max(0.0, last), last, n)
    path = special.logsumexp(np.array(paths) + weights[:, None], axis=0)
    highest = max(0.0, float(np.max(path)))
    return result("attribution", highest, -highest, last, n)


def _ratio(own: Floats, other: Floats, tolerant: bool) -> Floats:
    """log q / p after each token; a token that p forbids ends all doubt or, if tolerant, counts as no evidence."""
    forbidden = np.isneginf(own)
    path: Floats = np.cumsum(np.where(forbidden, 0.0, other - np.where(forbidden, 0.0, own)))
    return path if tolerant else np.where(np.logical_or.accumulate(forbidden), np.inf, path)


def _text_ratio(own: TokenStatistics, other: TokenStatistics, candidate: Candidate, tolerant: bool) -> float:
    """log Q(text) / p(text) across tokenizers; tokens of p that do not count stand as certain, see Theorem 7."""
    counted = own.log_prob[own.scored]
    if not tolerant and np.any(np.isneginf(counted)):
        return math.inf
    n = len(other)
    if n == 0:
        return 0.0
    known = ~np.isnan(other.log_prob)  # burn-in is the null's: the alternative may name a law for every token
    unknown = n - int(np.sum(known))
    q = float(np.sum(other.log_prob[known])) - unknown * math.log(vocabulary(candidate.scorer)) - math.log(n * (n + 1))
    return q - float(np.sum(counted[~np.isneginf(counted)]))


def _answer(members: list[Member], level: float) -> Attribution:
    order = sorted(members, key=lambda member: -member.log_likelihood)
    plausible = [member for member in order if member.result.log_pvalue > math.log(level)]
    sides = {member.side for member in plausible}
    if len(plausible) == 1:
        answer = plausible[0].name
    else:
        answer = "none of them" if not plausible else "undecided" if len(sides) > 1 else plausible[0].side
    return Attribution(
        answer=answer,
        plausible=tuple(member.name for member in plausible),
        best=order[0].name,
        level=level,
        members=tuple(members),
        in_house=_side(members, "in-house"),
        non_sanctioned=_side(members, "non-sanctioned"),
    )


def _side(members: list[Member], side: Side) -> TestResult | None:
    results = [member.result for member in members if member.side == side]
    return over_rules(results) if results else None
