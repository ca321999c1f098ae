"""Conformal p-values: where a new score lies among the scores of texts known to be human.

Under H0 the new text is exchangeable with the calibration texts, and P(p <= a) <= a with no assumption on the score.
Reference: Vovk, Gammerman, Shafer (2005), Prop. 2.8; Bates, Candes, Lei, Romano, Sesia (2023), Ann. Statist. 51,
arXiv:2104.08279; Tibshirani, Barber, Candes, Ramdas (2019), arXiv:1904.06019 (weights).
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from assay.conformal.conditional import monte_carlo_bounds, simes_bounds

Floats = npt.NDArray[np.float64]
Alternative = Literal["greater", "less"]
Ties = Literal["conservative", "smoothed"]
Guarantee = Literal["marginal", "simes", "monte-carlo"]

_EVERYONE = "all texts"
# A new text this much heavier than every calibration text has p-value 1 to the last digit; more would overflow.
_HEAVIEST = 1e300


class ConformalPValues(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """p-values of "this text is human" from the scores of human texts.

    Guarantee "marginal": over the draw of calibration texts and of the new text together, P(p <= a) <= a for every a.
    Guarantee "simes" or "monte-carlo": with probability at least `confidence` over the calibration texts, the rate of
    false positives that THESE calibration texts lead to is at most a, for all a at once. With groups, each guarantee
    holds within each group. Condition: new human texts are exchangeable with the calibration texts (of their group),
    and the scorer is the same.

    Parameters
    ----------
    alternative
        Which scores speak against the null: "greater" or "less".
    ties
        "conservative" counts a tie as a full point against the text; "smoothed" breaks ties at random with the
        generator given to `p_values`, which makes marginal p-values exactly uniform.
    guarantee
        "marginal", or calibration-conditional by the generalised Simes inequality ("simes", the sharper for small
        p-values; those above about a half become 1) or by a band fitted by Monte Carlo ("monte-carlo", even over all).
    confidence
        Of the calibration-conditional guarantees, in (0, 1).
    level
        The smallest level at which p-values will be used, in (0, 1). A group whose smallest p-value is larger is
        refused: fewer than 1 / level - 1 calibration texts (with weights: an effective size below that), and more for
        the calibration-conditional guarantees.
    simulations
        Monte-Carlo draws of the band, >= 100; at most 1,000,000; the band is valid for any number.
    random_state
        Seed of the band's draws, an integer.

    Attributes
    ----------
    groups_
        Names of the groups, sorted.
    counts_
        Calibration texts of each group, in that order.
    effective_sizes_
        The same for weighted texts: (sum w)^2 / sum w^2.
    floors_
        float64: the smallest p-value that a new text of each group can get; 0 with smoothed ties. With weights it is
        that of a text of the weight that new texts have on average, 1 / (effective size + 1).

    Examples
    --------
    >>> import numpy as np
    >>> human = np.random.default_rng(0).normal(size=999)
    >>> ConformalPValues().fit(human).p_values([human.max() + 1.0])
    array([0.001])
    """

    def __init__(
        self,
        *,
        alternative: Alternative = "greater",
        ties: Ties = "conservative",
        guarantee: Guarantee = "marginal",
        confidence: float = 0.9,
        level: float = 0.05,
        simulations: int = 1000,
        random_state: int = 0,
    ) -> None:
        self.alternative = alternative
        self.ties = ties
        self.guarantee = guarantee
        self.confidence = confidence
        self.level = level
        self.simulations = simulations
        self.random_state = random_state

    def fit(self, scores: npt.ArrayLike, groups: Any = None, *, weights: npt.ArrayLike | None = None) -> Any:
        """Keep the scores of human texts, sorted.

        Parameters
        ----------
        scores
            Shape (n,), finite: one score per text.
        groups
            Shape (n,): the group of each text (length bin, domain, language), as strings or integers; None for one
            group (Mondrian conformal prediction).
        weights
            Shape (n,), positive: how likely each text's covariates are among new texts relative to the calibration
            texts, up to a common factor. None for equal weights. Only for guarantee "marginal" and conservative ties.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            On settings out of range, scores that are not finite, or a group with too few texts for `level`.
        """
        self._check_settings(weighted=weights is not None)
        values = _finite("scores", scores)
        if len(values) == 0:
            raise ValueError("scores must have at least one text, got none. Score human texts first.")
        labels = _labels("groups", groups, len(values))
        masses = np.ones(len(values)) if weights is None else _positive("weights", weights, len(values))
        # Weights count up to a common factor: with the largest at 1 no sum or square of them overflows.
        self._scale = float(masses.max())
        masses = masses / self._scale
        self.groups_, places = np.unique(labels, return_inverse=True)
        self.counts_ = np.bincount(places)
        self.effective_sizes_ = np.array([_effective_size(masses[places == g]) for g in range(len(self.groups_))])
        self._refuse_small_groups()
        # As it is now: changed after fit, the calibration texts would be compared the wrong way round.
        self._greater, self._smoothed = self.alternative == "greater", self.ties == "smoothed"
        signed = values if self._greater else -values
        self._scores: list[Floats] = []
        self._masses: list[Floats] = []
        self._bounds: list[Floats | None] = []
        for place in range(len(self.groups_)):
            member = places == place
            order = np.argsort(signed[member], kind="stable")
            self._scores.append(signed[member][order])
            self._masses.append(masses[member][order])
            self._bounds.append(self._conditional_bounds(int(self.counts_[place])))
        self.floors_ = np.array(
            [
                # New texts are drawn with the weights, so theirs is sum w^2 / sum w on average, not the mean.
                1.0 / (size + 1) if bound is None else float(bound[0])
                for size, bound in zip(self.effective_sizes_, self._bounds, strict=True)
            ]
        )
        self._refuse_blind_groups()
        if self._smoothed:
            self.floors_ = np.zeros(len(self.groups_))
        self._weighted = weights is not None
        return self

    def p_values(
        self,
        scores: npt.ArrayLike,
        groups: Any = None,
        *,
        weights: npt.ArrayLike | None = None,
        rng: np.random.Generator | None = None,
    ) -> Floats:
        """The p-value of each new text.

        Parameters
        ----------
        scores, groups, weights
            As in `fit`, one entry per new text.
        rng
            Breaks ties; needed for ties="smoothed".

        Returns
        -------
        float64, shape (m,), in (0, 1].

        Raises
        ------
        ValueError
            On scores that are not finite, a group that was not calibrated, or a missing generator or weight.

        Notes
        -----
        O(log n) per text. p-values of texts that share calibration texts are positively dependent (PRDS), so the
        Benjamini-Hochberg procedure controls the false discovery rate (Bates et al., Thm 2; not for weighted ones).
        """
        check_is_fitted(self)
        values = _finite("scores", scores)
        labels = _labels("groups", groups, len(values))
        if (weights is not None) != self._weighted:
            raise ValueError(
                "weights must be given for new texts if and only if the calibration texts had them, got "
                f"{'some' if weights is not None else 'none'}."
            )
        masses = np.ones(len(values)) if weights is None else _positive("weights", weights, len(values))
        if self._smoothed and not isinstance(rng, np.random.Generator):
            raise ValueError(f"rng must be a numpy.random.Generator for ties='smoothed', got {rng!r}.")
        places = self._places(labels)
        signed = values if self._greater else -values
        out = np.empty(len(values))
        for place in np.unique(places):
            member = places == place
            out[member] = self._of_group(place, signed[member], masses[member], rng)
        return out

    def _of_group(self, place: int, signed: Floats, masses: Floats, rng: np.random.Generator | None) -> Floats:
        known, bounds = self._scores[place], self._bounds[place]
        below = np.searchsorted(known, signed, side="left")
        if self._weighted:
            with np.errstate(over="ignore"):
                masses = np.minimum(masses / self._scale, _HEAVIEST)
            # Mass of the calibration texts at least as extreme, from the top down so that no digits cancel.
            tail = np.append(np.cumsum(self._masses[place][::-1])[::-1], 0.0)
            weighted: Floats = (tail[below] + masses) / (tail[0] + masses)
            return weighted
        n = len(known)
        at_least = n - below
        if self._smoothed and rng is not None:
            above = n - np.searchsorted(known, signed, side="right")
            # 1 - random() lies in (0, 1]: a p-value of 0 would be a claim that no data support.
            ranks = above + (1.0 - rng.random(len(signed))) * (1 + at_least - above)
            smoothed: Floats = ranks / (n + 1)
            return smoothed
        if bounds is not None:
            conditional: Floats = bounds[at_least]
            return conditional
        marginal: Floats = (1.0 + at_least) / (n + 1)
        return marginal

    def _conditional_bounds(self, n: int) -> Floats | None:
        if self.guarantee == "marginal":
            return None
        if self.guarantee == "simes":
            return simes_bounds(n, self.confidence)
        rng = np.random.default_rng(self.random_state)
        return monte_carlo_bounds(n, self.confidence, simulations=self.simulations, rng=rng)

    def _places(self, labels: npt.NDArray[np.str_]) -> npt.NDArray[np.intp]:
        places = np.searchsorted(self.groups_, labels)
        unknown = (places == len(self.groups_)) | (self.groups_[np.minimum(places, len(self.groups_) - 1)] != labels)
        if unknown.any():
            raise ValueError(
                f"groups must be among the calibrated ones {self.groups_.tolist()}, got {str(labels[unknown][0])!r}. "
                "Calibrate on human texts of that group."
            )
        return places

    def _refuse_small_groups(self) -> None:
        needed = 1.0 / self.level - 1.0
        small = self.effective_sizes_ < needed * (1 - 1e-9)
        if small.any():
            counts, sizes = self.counts_[small], self.effective_sizes_[small]
            names = ", ".join(
                f"{g!r} has {c}" + (f", whose weights leave {s:.3g}" if s < c * (1 - 1e-9) else "")
                for g, c, s in zip(self.groups_[small].tolist(), counts, sizes, strict=True)
            )
            raise ValueError(
                f"each group needs at least {math.ceil(needed * (1 - 1e-9))} calibration texts for level "
                f"{self.level:.3g}: {names}. Add human texts, merge groups, or raise level."
            )

    def _refuse_blind_groups(self) -> None:
        """Refuse what could never be flagged: a conditional guarantee's smallest p-value lies far above 1 / (n + 1)."""
        blind = self.floors_ > self.level * (1 + 1e-9)
        if blind.any():
            names = ", ".join(
                f"{g!r} has {c} and {f:.3g}"
                for g, c, f in zip(self.groups_[blind].tolist(), self.counts_[blind], self.floors_[blind], strict=True)
            )
            # The smallest Simes bound is 1 - (1 - confidence)^(1 / ceil(n / 2)); the band's is much the same.
            order = math.ceil(math.log1p(-self.confidence) / math.log1p(-self.level) - 1e-9)
            raise ValueError(
                f"guarantee {self.guarantee!r} at confidence {self.confidence:.3g} needs about {2 * order} or more "
                f"calibration texts in each group for level {self.level:.3g} (texts and smallest p-value: {names}). "
                "Add human texts, merge groups, raise level, or lower confidence."
            )

    def _check_settings(self, *, weighted: bool) -> None:
        for name, kind in (("alternative", Alternative), ("ties", Ties), ("guarantee", Guarantee)):
            accepted = get_args(kind)
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {list(accepted)}, got {getattr(self, name)!r}.")
        for name in ("confidence", "level"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not 0.0 < value < 1.0:
                raise ValueError(f"{name} must be in (0, 1), got {value!r}.")
        if not isinstance(self.simulations, (int, np.integer)) or not 100 <= self.simulations <= 1_000_000:
            raise ValueError(f"simulations must be a whole number in [100, 1000000], got {self.simulations!r}.")
        if self.guarantee != "marginal" and (self.ties == "smoothed" or weighted):
            raise ValueError(
                f"guarantee {self.guarantee!r} is for conservative ties and equal weights. Use guarantee='marginal'."
            )
        if weighted and self.ties == "smoothed":
            raise ValueError("weights need ties='conservative', got ties='smoothed'.")


def _finite(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {array.shape}.")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[at]} at {at}. Leave out texts that could not be scored.")
    return array


def _positive(name: str, values: npt.ArrayLike, count: int) -> Floats:
    array = _finite(name, values)
    if len(array) != count or not (array > 0).all():
        raise ValueError(
            f"{name} must be {count} positive numbers, got {len(array)}, the least {array.min(initial=np.inf):.3g}."
        )
    return array


def _effective_size(weights: Floats) -> float:
    """(sum w)^2 / sum w^2, of any scale."""
    relative = weights / weights.max()
    return float(relative.sum() ** 2 / np.sum(relative**2))


def _labels(name: str, values: Any, count: int) -> npt.NDArray[np.str_]:
    if values is None:
        return np.full(count, _EVERYONE)
    array = np.asarray(values)
    # A column of a data frame holds strings as objects.
    if array.dtype == object and all(isinstance(one, str) for one in array.ravel()):
        array = array.astype(np.str_)
    if array.shape != (count,) or array.dtype.kind not in "USiu":
        raise ValueError(f"{name} must be {count} strings or integers, got shape {array.shape} of {array.dtype}.")
    return array.astype(np.str_)
