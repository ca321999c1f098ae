"""Watermarks that survive an edit: the most powerful one when the user may turn x into any text of B(x).

Robust Type II: P(B(X) not inside R). Best: R = B(X) or empty. With w(x) = P(X = x, R = B(x)) it is a linear program:
maximise sum w, 0 <= w <= rho, and for every y, sum of w(x) over x with y in B(x) <= alpha.
Source: Huang et al. (2023), arXiv:2312.07930, section 5. HiGHS solves it through PuLP; both certificates are checked.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from assay.watermark._hamming import hamming_orbits
from assay.watermark._laws import check_count, check_law, check_level
from assay.watermark._levenshtein import levenshtein_orbits
from assay.watermark._robust_lp import RobustSolution as RobustSolution
from assay.watermark._robust_lp import check_size, solve

MAX_TEXTS = 200_000

Edits = Literal["substitutions", "levenshtein"]


def robust_type2_error(rho: npt.ArrayLike, neighbours: npt.ArrayLike, alpha: float) -> RobustSolution:
    """The smallest robust Type II error at level alpha, by the full linear program.

    Parameters
    ----------
    rho
        float64, shape (n,): the law of the output.
    neighbours
        Boolean, shape (n, m): neighbours[x, y] says that the user may turn text x into text y, y in B(x). Usually m = n
        and the diagonal is true; m may differ (insertions and deletions change the length). A scipy sparse matrix will
        do.
    alpha
        Bound on the Type I error, in (0, 1).

    Raises
    ------
    ValueError
        If an argument is out of range, a text has no neighbour, or there are more than 2,000,000 pairs.
    MissingDependencyError
        If PuLP or HiGHS is not installed.
    """
    law = check_law(rho, "rho")
    level = check_level(alpha, "alpha")
    relation = _relation(neighbours, len(law))
    return solve(law, relation, level)


def _relation(neighbours: npt.ArrayLike, n: int) -> Any:
    """The relation as a sparse 0/1 matrix."""
    try:
        dense_or_sparse: Any = neighbours if sparse.issparse(neighbours) else np.asarray(neighbours)
    except ValueError:
        raise ValueError(f"neighbours must be a matrix of shape ({n}, m), got rows of different lengths.") from None
    if dense_or_sparse.ndim != 2 or dense_or_sparse.shape[0] != n:
        raise ValueError(f"neighbours must have shape ({n}, m), one row per atom of rho, got {dense_or_sparse.shape}.")
    entries = np.unique(dense_or_sparse.data if sparse.issparse(dense_or_sparse) else dense_or_sparse)
    if not np.all((entries == 0) | (entries == 1)):
        # Lists of the numbers of neighbours, say, which would be read as something else.
        raise ValueError(f"neighbours must hold only true and false, or 1 and 0, got {entries[-1]}.")
    relation = sparse.csr_matrix(dense_or_sparse, dtype=bool).astype(np.float64)
    relation.eliminate_zeros()
    alone = np.flatnonzero(np.diff(relation.indptr) == 0)
    if len(alone):
        raise ValueError(f"neighbours must give every text at least one neighbour (itself), row {alone[0]} has none.")
    check_size(relation.nnz)
    return relation


def hamming_type2_error(
    n: int, token_law: npt.ArrayLike, radius: int, alpha: float, *, edits: Edits = "substitutions"
) -> RobustSolution:
    """The smallest robust Type II error for n i.i.d. tokens of which the user may replace up to `radius`.

    Equal to `robust_type2_error` on all V^n texts, with one variable for each way to divide n tokens among the distinct
    probabilities of the token law: token order does not matter, nor which of several tokens of equal probability
    stands where. Proof in docs/explanation/ump.md.

    Parameters
    ----------
    n
        Number of tokens, at least 1.
    token_law
        float64, shape (V,). A replacement may be any token; tokens of probability zero change nothing.
    radius
        Largest number of replaced tokens, in 0..n.
    alpha
        Bound on the Type I error, in (0, 1).
    edits
        "substitutions", or "levenshtein" for substitutions, insertions and deletions. The reduction needs a set of
        edits that does not depend on the order of the tokens, and insertions and deletions do depend on it: 0011 loses
        one token to 2 different texts, 0101 to 4. So "levenshtein" is accepted for radius 0 only, where it is the same.

    Returns
    -------
    RobustSolution, one entry per orbit; orbits of total probability below 1e-12 are left out of the plan.

    Raises
    ------
    ValueError
        If an argument is out of range, the reduction does not hold, or the token law has too many distinct
        probabilities for this n and radius.
    """
    count = check_count(n, "n", 1)
    law = check_law(token_law, "token_law")
    reach = check_count(radius, "radius", 0, count)
    level = check_level(alpha, "alpha")
    if edits not in ("substitutions", "levenshtein"):
        raise ValueError(f"edits must be 'substitutions' or 'levenshtein', got {edits!r}.")
    if edits == "levenshtein" and reach > 0:
        raise ValueError(
            "edits must be 'substitutions' for radius > 0, got 'levenshtein': insertions and deletions see the order "
            "of the tokens, so texts of one type are not alike. Use levenshtein_type2_error, which keeps the order."
        )
    return hamming_orbits(count, law, reach, level)


def levenshtein_type2_error(n: int, token_law: npt.ArrayLike, radius: int, alpha: float) -> RobustSolution:
    """The smallest robust Type II error for n i.i.d. tokens and up to `radius` substitutions, insertions and deletions.

    Equal to `robust_type2_error` with `levenshtein_neighbours`, with one variable for each pattern of equal tokens up
    to reading backwards: exchanging tokens of equal probability throughout a text changes nothing, permuting places
    does. So a vocabulary of a thousand equal tokens is no harder than one of n, and a law without equal tokens gains a
    factor of two only. Proof in docs/explanation/ump.md.

    Parameters
    ----------
    n
        Number of tokens, at least 1.
    token_law
        float64, shape (V,). An edit may bring in any token; tokens of probability zero change nothing.
    radius
        Largest number of edits, in 0..n.
    alpha
        Bound on the Type I error, in (0, 1).

    Returns
    -------
    RobustSolution, one entry per orbit; `text_orbits` and `region_orbits` are None.

    Raises
    ------
    ValueError
        If an argument is out of range, or there are too many patterns or too large balls: about 12 tokens of a law with
        two probabilities, 9 tokens of equal ones.
    """
    count = check_count(n, "n", 1)
    law = check_law(token_law, "token_law")
    reach = check_count(radius, "radius", 0, count)
    return levenshtein_orbits(count, law, reach, check_level(alpha, "alpha"))


def levenshtein_neighbours(n: int, alphabet: int, radius: int) -> Any:
    """Which texts of length n - radius..n + radius are within `radius` substitutions, insertions and deletions.

    Parameters
    ----------
    n
        Length of the texts, at least 1.
    alphabet
        Number of tokens q, at least 1.
    radius
        In 0..n.

    Returns
    -------
    Boolean scipy sparse matrix: a row for each of the q^n texts in the order of their digits (the law of i.i.d. tokens
    is then the n-fold Kronecker power of the token law), a column for each text of length n - radius, then
    n - radius + 1, and so on, each in the same order.

    Raises
    ------
    ValueError
        If an argument is out of range or there are more than 200,000 columns.
    """
    length, q = check_count(n, "n", 1), check_count(alphabet, "alphabet", 1)
    reach = check_count(radius, "radius", 0, length)
    lengths = range(length - reach, length + reach + 1)
    sizes = [q**k for k in lengths]
    if sum(sizes) > MAX_TEXTS:
        raise ValueError(f"alphabet^(n + radius) must be at most about {MAX_TEXTS}, got {sum(sizes)} texts in all.")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows, columns = [np.arange(starts[-1])], [np.arange(starts[-1])]
    for index, k in enumerate(lengths):
        text = np.arange(q**k)
        for place in range(k):
            unit = q**place
            digit = text // unit % q
            for token in range(q):
                rows.append(starts[index] + text)
                columns.append(starts[index] + text + (token - digit) * unit)
            if index > 0:
                longer, shorter = starts[index] + text, starts[index - 1] + text // (unit * q) * unit + text % unit
                rows += [longer, shorter]
                columns += [shorter, longer]
    i, j = np.concatenate(rows), np.concatenate(columns)
    step = sparse.csr_matrix((np.ones(len(i), dtype=bool), (i, j)), shape=(starts[-1], starts[-1]))
    near = sparse.identity(starts[-1], dtype=bool, format="csr")[starts[reach] : starts[reach + 1]]
    for _ in range(reach):
        near = near @ step
    return near
