"""Uniformly most powerful watermarks of a known law rho, and the best ones whose rejection law ignores rho.

A watermark couples X ~ rho with a random rejection region R. Type I: max_y P(y in R) <= alpha, for every y. Type II:
P(X not in R). Source: Huang, Zhu, Zhu, Ramchandran, Jordan, Lee, Jiao (2023), arXiv:2312.07930, Theorems 3.2 and 3.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.watermark._agnostic import AgnosticCoupling as AgnosticCoupling
from assay.watermark._agnostic import agnostic_coupling as agnostic_coupling
from assay.watermark._agnostic import agnostic_type2_error as agnostic_type2_error
from assay.watermark._agnostic import minimax_excess as minimax_excess
from assay.watermark._laws import Floats, Integers, check_law, check_level

NO_REGION = -1  # marks an empty rejection region in samples of `Coupling`


@dataclass(frozen=True)
class Coupling:
    """The most powerful watermark of a law: R = {X} with probability min(1, alpha / law(X)), else R is empty.

    Guarantee: P(X = x, R = {x}) = min(law(x), alpha), so the Type I error is at most alpha for every text, and X has
    exactly the law `law`.

    Attributes
    ----------
    law
        float64, shape (n,): the law of X. It differs from rho only where distortion was asked for.
    alpha
        Bound on the Type I error.
    distortion
        Total variation distance between `law` and rho; at most the distortion asked for, less if less was enough.
    """

    law: Floats
    alpha: float
    distortion: float

    def joint(self) -> Floats:
        """P(X = x, R = {x}) in column 0 and P(X = x, R empty) in column 1; float64, shape (n, 2)."""
        hit = np.minimum(self.law, self.alpha)
        return np.column_stack([hit, self.law - hit])

    @property
    def type2_error(self) -> float:
        """P(X not in R), exactly."""
        return math.fsum(self.joint()[:, 1])

    def sample(self, rng: np.random.Generator, size: int) -> tuple[Integers, Integers]:
        """Draws of (X, R).

        Parameters
        ----------
        rng
            Source of randomness; the shared secret of the watermark, in practice a PRF.
        size
            Number of draws.

        Returns
        -------
        (x, region): int64, shape (size,). region is the only element of R, or `NO_REGION` where R is empty.
        """
        x = rng.choice(len(self.law), size=size, p=self.law).astype(np.int64)
        kept = rng.random(size) * self.law[x] < self.alpha
        return x, np.where(kept, x, NO_REGION)


def type2_error(rho: npt.ArrayLike, alpha: float, distortion: float = 0.0) -> float:
    """The smallest Type II error of any watermark of rho at level alpha.

    Parameters
    ----------
    rho
        float64, shape (n,): the law of the output. Atoms of probability zero count: distortion may use them.
    alpha
        Bound on the Type I error, in (0, 1).
    distortion
        Allowed total variation distance between the law of X and rho, in [0, 1].

    Returns
    -------
    sum_x max(rho(x) - alpha, 0) - min(distortion, D, F), with D = sum_x max(rho(x) - alpha, 0) the surplus and
    F = sum_x max(alpha - rho(x), 0) the room below alpha; in [0, 1).

    Raises
    ------
    ValueError
        If rho is not a law, alpha is outside (0, 1) or distortion outside [0, 1].
    """
    law = check_law(rho, "rho")
    level = check_level(alpha, "alpha")
    moved = _movable(law, level, distortion)
    return max(0.0, math.fsum(np.maximum(law - level, 0.0)) - moved)


def optimal_coupling(rho: npt.ArrayLike, alpha: float, distortion: float = 0.0) -> Coupling:
    """A watermark that attains `type2_error`.

    With distortion, mass min(distortion, D, F) is moved by proportional water-filling: every atom above alpha gives in
    proportion to its surplus over alpha, every atom below receives in proportion to its room. No giver falls below
    alpha and no receiver rises above, which is what makes a transport optimal; others are equally good.

    Parameters
    ----------
    rho, alpha, distortion
        As in `type2_error`. Leave out of rho the texts that must never be written: an atom of probability zero has
        room, and distortion may fill it.

    Raises
    ------
    ValueError
        As in `type2_error`.
    """
    law = check_law(rho, "rho")
    level = check_level(alpha, "alpha")
    moved = _movable(law, level, distortion)
    if moved > 0.0:
        surplus = np.maximum(law - level, 0.0)
        room = np.maximum(level - law, 0.0)
        law = law - surplus * (moved / math.fsum(surplus)) + room * (moved / math.fsum(room))
        law = np.maximum(law, 0.0)
    return Coupling(law=law, alpha=level, distortion=moved)


def _movable(law: Floats, alpha: float, distortion: float) -> float:
    """The mass that lowers the Type II error one for one: min(distortion, surplus above alpha, room below)."""
    if not 0.0 <= distortion <= 1.0:
        raise ValueError(f"distortion must be in [0, 1], got {distortion}.")
    surplus = math.fsum(np.maximum(law - alpha, 0.0))
    room = math.fsum(np.maximum(alpha - law, 0.0))
    return min(float(distortion), surplus, room)


def race_type2_error(rho: npt.ArrayLike, alpha: float) -> float:
    """Type II error of one exponential race over rho, whose rejection law knows nothing of rho.

    E_x ~ Exp(1) independent, X = argmin E_x / rho(x), R = {x : E_x <= t}, t = -log(1 - alpha). X ~ rho exactly, the
    Type I error is alpha for every text, and the Type II error sum_x rho(x) exp(-t / rho(x)) is within 1/e of the best.

    Parameters
    ----------
    rho, alpha
        As in `type2_error`.
    """
    law = check_law(rho, "rho")
    threshold = -math.log1p(-check_level(alpha, "alpha"))
    positive = law[law > 0.0]
    return math.fsum(positive * np.exp(-threshold / positive))
