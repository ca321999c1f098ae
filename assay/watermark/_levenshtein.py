"""Edit-distance balls around i.i.d. tokens, collapsed by the symmetries that edit distance has.

Exchanging tokens of equal probability, everywhere in the text alike, and reading the text backwards keep rho and edit
distance; permuting places does not. The orbits are the patterns of equal tokens, so the gain is large where many tokens
share a probability, and a factor of two where none do. Proof in docs/explanation/ump.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy import sparse

from assay.watermark._laws import Floats, group_law
from assay.watermark._robust_lp import RobustSolution, check_size, solve

MAX_PATTERNS = 20_000
MAX_BALLS = 2_000_000  # texts in the balls of all patterns together

Word = tuple[tuple[int, int], ...]  # (group, which of its tokens) at each place


def levenshtein_orbits(n: int, law: Floats, radius: int, alpha: float) -> RobustSolution:
    """`robust.levenshtein_type2_error` for checked arguments."""
    log_p, multiplicity = group_law(law)
    sizes = [int(count) for count in multiplicity]
    texts = sorted(set(_patterns(n, sizes)))
    log_size = np.array([_log_orbit(word, sizes) for word in texts])
    mass = np.exp(log_size + np.array([sum(log_p[g] for g, _ in word) for word in texts]))
    rows: list[int] = []
    reached: list[Word] = []
    log_ways: list[float] = []
    for row, word in enumerate(texts):
        for found, log_count in _ball(word, radius, sizes):
            rows.append(row)
            reached.append(found)
            log_ways.append(log_count)
        if len(rows) > MAX_BALLS:
            raise ValueError(
                f"radius must be smaller for this n and token law, got {radius}: the balls of the {len(texts)} "
                f"patterns of {n} tokens hold more than {MAX_BALLS} texts."
            )
    regions = {word: column for column, word in enumerate(sorted(set(reached)))}
    columns = np.array([regions[word] for word in reached])
    log_region = np.array([_log_orbit(word, sizes) for word in regions])
    load = np.exp(np.array(log_ways) - log_region[columns])
    incidence = sparse.csr_matrix((load, (rows, columns)), shape=(len(texts), len(regions)))
    check_size(incidence.nnz)
    return solve(mass, incidence, alpha)


def _patterns(n: int, sizes: list[int]) -> Iterator[Word]:
    """The orbits of texts of n tokens, each by its smallest member, some more than once."""
    level: list[tuple[Word, tuple[int, ...]]] = [((), (0,) * len(sizes))]
    for _ in range(n):
        grown = []
        for word, used in level:
            for g, count in enumerate(used):
                grown += [((*word, (g, i)), used) for i in range(count)]
                if count < sizes[g]:
                    grown.append(((*word, (g, count)), (*used[:g], count + 1, *used[g + 1 :])))
        if len(grown) > 2 * MAX_PATTERNS:  # a pattern and its mirror image are one
            raise ValueError(
                f"n must be smaller for this token law, got {n}: there are more than {MAX_PATTERNS} patterns of equal "
                "tokens. Insertions and deletions see the order of the tokens, so nothing coarser will do."
            )
        level = grown
    for word, _ in level:
        yield _smallest(word)


def _relabelled(word: Word) -> Word:
    """The word with each group's tokens numbered by first appearance."""
    names: dict[tuple[int, int], tuple[int, int]] = {}
    used: dict[int, int] = {}
    for token in word:
        if token not in names:
            names[token] = (token[0], used.get(token[0], 0))
            used[token[0]] = used.get(token[0], 0) + 1
    return tuple(names[token] for token in word)


def _smallest(word: Word) -> Word:
    """The orbit's name: the smaller of the pattern and that of its mirror image."""
    return min(_relabelled(word), _relabelled(word[::-1]))


def _log_choices(free: int, taken: int) -> float:
    """log of free (free - 1) ... (free - taken + 1)."""
    return math.lgamma(free + 1) - math.lgamma(free - taken + 1)


def _log_orbit(word: Word, sizes: list[int]) -> float:
    """log of how many texts have the pattern or its mirror image."""
    used = [len({i for h, i in word if h == g}) for g in range(len(sizes))]
    mirrored = _relabelled(word) != _relabelled(word[::-1])
    return sum(_log_choices(size, taken) for size, taken in zip(sizes, used, strict=True)) + math.log(1 + mirrored)


def _ball(word: Word, radius: int, sizes: list[int]) -> Iterator[tuple[Word, float]]:
    """Orbits in the ball of a text: the log-number of texts for each way to use tokens that the text lacks.

    Tokens that the text lacks are alike, so each way stands for all texts that differ by which of them were taken.
    """
    own = [len({i for h, i in word if h == g}) for g in range(len(sizes))]
    ball = edge = {word}
    for _ in range(radius):
        edge = {_fresh_relabelled(new, own) for old in edge for new in _edits(old, own, sizes)} - ball
        ball = ball | edge
    for found in ball:
        fresh = [len({i for h, i in found if h == g and i >= own[g]}) for g in range(len(sizes))]
        ways = sum(_log_choices(size - o, f) for size, o, f in zip(sizes, own, fresh, strict=True))
        yield _smallest(found), ways


def _edits(word: Word, own: list[int], sizes: list[int]) -> Iterator[Word]:
    """One substitution, insertion or deletion; of the tokens that neither text has, the first."""
    tokens = []
    for g, size in enumerate(sizes):
        known = max([own[g], *(i + 1 for h, i in word if h == g)])
        tokens += [(g, i) for i in range(min(size, known + 1))]
    for place in range(len(word) + 1):
        head, tail = word[:place], word[place:]
        for token in tokens:
            yield (*head, token, *tail)
            if tail:
                yield (*head, token, *tail[1:])
        if tail:
            yield (*head, *tail[1:])


def _fresh_relabelled(word: Word, own: list[int]) -> Word:
    """The word with the tokens that the text lacks numbered by first appearance, after the text's own."""
    names: dict[tuple[int, int], tuple[int, int]] = {}
    used = list(own)
    for g, i in word:
        if i >= own[g] and (g, i) not in names:
            names[g, i] = (g, used[g])
            used[g] += 1
    return tuple(names.get(token, token) for token in word)
