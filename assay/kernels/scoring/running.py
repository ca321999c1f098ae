"""The running sums of one pass over the vocabulary, and the statistics they give when it ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.kernels.scoring.statistics import DEFAULT_TILTS, Floats, TokenStatistics

# Columns of the state: the largest logit m; under the weights exp(l - m): mass, mean logit, central sums of order two
# and three; the cross term with the second model; from TILTED on, sum exp((1 - s)(l - m)) for each tilt s.
MAXIMUM, MASS, MEAN, SECOND, THIRD, CROSS, TILTED = range(7)


@dataclass(frozen=True, eq=False)
class RunningSums:
    """Sums of n rows so far.

    Attributes
    ----------
    targets
        int64, shape (n,): the token of each row.
    chosen
        float32, shape (n,): the target's logit, known before the pass, against which the others are counted.
    seen
        float32, shape (n,): the target's logit as the pass met it; NaN before.
    state
        float64, shape (n, TILTED + t).
    others
        float64, shape (n, 3): the second model's maximum, mass and centre.
    greater, ties
        int64, shape (n,): candidates whose logit is larger than, or equal to, `chosen`; the target itself is among
        the equal.
    powers
        float64, shape (t,): 1 - s.
    """

    targets: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.float32]
    seen: npt.NDArray[np.float32]
    state: Floats
    others: Floats
    greater: npt.NDArray[np.int64]
    ties: npt.NDArray[np.int64]
    powers: Floats

    @property
    def default_tilts(self) -> bool:
        """Whether the tilts are those for which a faster sum exists."""
        return tuple(1 - self.powers) == DEFAULT_TILTS


def start(targets: npt.NDArray[np.int64], chosen: npt.NDArray[np.float32], tilts: Floats) -> RunningSums:
    """Sums before the first candidate."""
    n = len(targets)
    state = np.zeros((n, TILTED + len(tilts)))
    state[:, MAXIMUM] = -np.inf
    others = np.zeros((n, 3))
    others[:, 0] = -np.inf
    counts = np.zeros((2, n), dtype=np.int64)
    seen = np.full(n, np.nan, dtype=np.float32)
    return RunningSums(targets, chosen, seen, state, others, counts[0], counts[1], 1 - tilts)


def finish(
    sums: RunningSums, tilts: Floats, *, cross: bool, numbers: npt.NDArray[np.int64] | None = None
) -> TokenStatistics:
    """Statistics from the sums over the whole vocabulary; errors call the rows by `numbers`, else from 0 on.

    Raises
    ------
    ValueError
        If a row's logits, of either model, hold NaN or +inf, or are all -inf.
    """
    _check(sums.state[:, MAXIMUM], sums.state[:, MASS], "logits", numbers)
    mass = sums.state[:, MASS]
    log_mass = np.log(mass)
    top = sums.state[:, MAXIMUM]
    cross_entropy = None
    if cross:
        _check(sums.others[:, 0], sums.others[:, 1], "other logits", numbers)
        log_q_mass = sums.others[:, 0] + np.log(sums.others[:, 1])
        cross_entropy = np.maximum(log_q_mass - sums.others[:, 2] - sums.state[:, CROSS] / mass, 0.0)
    with np.errstate(divide="ignore"):
        tilted = np.log(sums.state[:, TILTED:]) - sums.powers * log_mass[:, None]
    return TokenStatistics(
        log_prob=np.minimum(sums.chosen.astype(np.float64) - top - log_mass, 0.0),
        entropy=np.maximum(top + log_mass - sums.state[:, MEAN], 0.0),
        varentropy=np.maximum(sums.state[:, SECOND] / mass, 0.0),
        # The surprisal falls as the logit rises, so odd central moments change sign.
        third_moment=-sums.state[:, THIRD] / mass,
        rank=1 + sums.greater,
        ties=sums.ties - 1,
        max_log_prob=-log_mass,
        tilts=tilts,
        tilted_log_sums=tilted,
        scored=np.ones(len(mass), dtype=np.bool_),
        cross_entropy=cross_entropy,
    )


def _check(top: Floats, mass: Floats, name: str, numbers: npt.NDArray[np.int64] | None) -> None:
    bad = np.flatnonzero(~np.isfinite(mass) | ~np.isfinite(top) | (mass == 0))
    if len(bad):
        what = "only -inf" if top[bad[0]] == -np.inf and mass[bad[0]] == 0 else "NaN or +inf"
        number = bad[0] if numbers is None else numbers[bad[0]]
        raise ValueError(
            f"{name} must be finite or -inf, with a finite one in every row; row {number} holds {what} "
            f"({len(bad)} of {len(mass)} rows). Check the model's weights and its precision."
        )
