"""The robust linear program: maximise sum w, 0 <= w <= capacity, incidence^T w <= alpha, with both certificates.

Modelled in PuLP, solved by HiGHS; feasibility and objective of both certificates are repaired and evaluated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from assay._errors import MissingDependencyError
from assay.watermark._laws import Floats, Integers

MAX_ENTRIES = 2_000_000  # pairs (x, y in B(x)) of a linear program
MAX_GAP = 1e-6


@dataclass(frozen=True)
class RobustSolution:
    """The optimum of the robust linear program, with the two certificates that prove it.

    Guarantee: `plan` is feasible, so a watermark with Type II error `type2_error` exists; the dual point is feasible,
    so none has less than `lower_bound`. Both are repaired and evaluated here, whatever the solver's tolerances.

    Attributes
    ----------
    type2_error
        Of the watermark that `plan` describes.
    lower_bound
        What the dual certificate proves: no watermark does better.
    plan
        float64, shape (n,): w(x) = P(X = x, R = B(x)). For orbits: total over the texts of the orbit.
    text_prices
        float64, shape (n,): dual u >= 0 of w <= rho.
    region_prices
        float64, shape (m,): dual v >= 0 of the Type I constraints. For orbits: total over the texts of the orbit. For
        every x, u(x) + sum over y in B(x) of v(y) >= 1, and lower_bound = 1 - sum rho u - alpha sum v.
    text_orbits, region_orbits
        int64, shape (n, groups) and (m, groups): for orbits, how many tokens of each distinct probability, largest
        first, the texts of the orbit have. None for the full program.
    """

    type2_error: float
    lower_bound: float
    plan: Floats
    text_prices: Floats
    region_prices: Floats
    text_orbits: Integers | None = None
    region_orbits: Integers | None = None

    @property
    def gap(self) -> float:
        """type2_error - lower_bound, >= 0 up to rounding."""
        return self.type2_error - self.lower_bound


def check_size(pairs: int) -> None:
    """Refuse programs that would not fit."""
    if pairs > MAX_ENTRIES:
        raise ValueError(
            f"the linear program must have at most {MAX_ENTRIES} pairs of neighbours, got {pairs}. "
            "Use a smaller space, a smaller radius, or hamming_type2_error, which collapses symmetric spaces."
        )


def solve(capacity: Floats, incidence: Any, alpha: float, left_out: float = 0.0) -> RobustSolution:
    """Solve the program; incidence is sparse, shape (n, m), entries >= 0, a positive one in every row.

    left_out is probability of texts that have no variable; the lower bound grants all of it.
    """
    # In units of the most that each variable can be, every coefficient is at most 1: alpha = 1e-9 and orbit sizes of
    # 1e60 would otherwise drown in the solver's tolerances.
    scaled = sparse.csr_matrix(incidence / alpha)
    heaviest = scaled.max(axis=1).toarray().ravel()
    most = np.minimum(capacity, 1.0 / np.maximum(heaviest, 1e-300))
    used = most > 0.0
    matrix = sparse.csr_matrix(sparse.diags(most) @ scaled)
    # A constraint whose left side cannot reach 1 needs no row.
    binding = np.asarray(matrix.sum(axis=0)).ravel() > 1.0 - 1e-9
    share, row_prices = _highs(most, used, capacity <= most, sparse.csc_matrix(matrix[:, binding]))

    w = np.clip(share, 0.0, 1.0) * most
    load = np.asarray(scaled.T @ w).ravel()
    # The solver keeps to its tolerance only: each text gives way to its most overloaded neighbour.
    overload = sparse.csr_matrix(scaled.sign().multiply(np.maximum(load, 1.0)[None, :]))
    w = w / np.maximum(overload.max(axis=1).toarray().ravel(), 1.0)
    v = np.zeros(scaled.shape[1])
    v[binding] = np.maximum(row_prices, 0.0)
    u = np.maximum(0.0, 1.0 - np.asarray(scaled @ v).ravel())
    hit, bound = math.fsum(w), math.fsum(capacity * u) + math.fsum(v) + left_out
    solution = RobustSolution(
        type2_error=max(0.0, 1.0 - hit),
        lower_bound=max(0.0, 1.0 - bound),
        plan=w,
        text_prices=u,
        region_prices=v / alpha,
    )
    if solution.gap > MAX_GAP:
        raise ArithmeticError(f"the linear program was solved only to a duality gap of {solution.gap:.1e}.")
    return solution


def _highs(
    most: Floats, used: npt.NDArray[np.bool_], capped: npt.NDArray[np.bool_], columns: Any
) -> tuple[Floats, Any]:
    """Shares w / most that maximise sum most * share under columns^T share <= 1, and the prices of the rows."""
    try:
        import pulp
    except ImportError as error:  # pragma: no cover
        raise MissingDependencyError("robust watermarks need PuLP and HiGHS: pip install pulp highspy") from error

    share = np.ones(len(most))
    if columns.shape[1] == 0:
        return share, np.zeros(0)
    # The solver's tolerances are absolute: where alpha is 1e-9 the whole objective would lie below them.
    unit = float(most[used].max(initial=0.0)) or 1.0
    problem = pulp.LpProblem("robust", pulp.LpMinimize)
    names = {int(x): problem.add_variable(f"w{x}", 0.0, 1.0 if capped[x] else None) for x in np.flatnonzero(used)}
    problem += pulp.lpSum(-most[x] / unit * variable for x, variable in names.items())
    for y in range(columns.shape[1]):
        part = slice(columns.indptr[y], columns.indptr[y + 1])
        entries = zip(columns.indices[part].tolist(), columns.data[part].tolist(), strict=True)
        problem += pulp.LpAffineExpression([(names[x], value) for x, value in entries if x in names]) <= 1.0, f"y{y}"
    status = problem.solve(pulp.HiGHS(msg=False))
    if pulp.LpStatus[status] != "Optimal":
        raise ArithmeticError(f"HiGHS ended with status {pulp.LpStatus[status]!r}.")
    for x, variable in names.items():
        share[x] = variable.varValue
    # Prices in a minimisation are <= 0 for constraints of the form <=.
    rows = [problem.get_constraint_by_name(f"y{y}") for y in range(columns.shape[1])]
    return share, np.array([-(row.pi or 0.0) * unit for row in rows])
