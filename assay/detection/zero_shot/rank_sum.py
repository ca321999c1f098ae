"""Several scores as one: the sum of their log ranks among human texts. A score, not a p-value.

Reference: Fisher (1932), combination of ranks; the scores of one text depend on each other, so the sum has no known law
and is calibrated like any score, on human texts that were not used here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.detection.zero_shot.scores import LARGER_MEANS_LLM
from assay.kernels.scoring.statistics import Floats


@dataclass(frozen=True, eq=False)
class RankSum:
    """A combination of scores, as `fit_rank_sum` learned it.

    Attributes
    ----------
    reference
        For each score its sorted values on the human texts, turned so that larger speaks for a language model.
    """

    reference: Mapping[str, Floats]

    def combine(self, scores: Mapping[str, npt.ArrayLike]) -> Floats:
        """The combined score of texts: the mean over scores of -log((1 + humans at least as extreme) / (1 + humans)).

        Parameters
        ----------
        scores
            Arrays of shape (documents,) under at least the fitted names, as `zero_shot_scores` gives them.

        Returns
        -------
        float64, shape (documents,), in [0, log(1 + humans)]; larger speaks for a language model. NaN where a score is.

        Raises
        ------
        ValueError
            If a fitted score is missing.
        """
        missing = set(self.reference) - set(scores)
        if missing:
            raise ValueError(f"scores must hold {sorted(self.reference)}, got none for {sorted(missing)}.")
        total: Floats = np.zeros(np.shape(scores[next(iter(self.reference))]))
        for name, human in self.reference.items():
            values = _turned(name, scores[name])
            beyond = len(human) - np.searchsorted(human, values, side="left")
            total -= np.where(np.isnan(values), np.nan, np.log((1 + beyond) / (1 + len(human))))
        return total / len(self.reference)


def fit_rank_sum(human: Mapping[str, npt.ArrayLike], names: Sequence[str] | None = None) -> RankSum:
    """Learn the ranks of human texts under several scores.

    Parameters
    ----------
    human
        Scores of human texts, arrays of shape (documents,), as `zero_shot_scores` gives them. Do not use these texts
        again to calibrate the combination: calibration needs texts that it has not seen.
    names
        Which scores to combine; None takes all of `human`.

    Raises
    ------
    ValueError
        If a name is unknown or missing, there is no text, or a score is NaN.
    """
    chosen = tuple(human) if names is None else tuple(names)
    unknown = [name for name in chosen if name not in human or name not in LARGER_MEANS_LLM]
    if unknown or not chosen:
        raise ValueError(f"names must be scores in human, of {sorted(LARGER_MEANS_LLM)}, got {list(chosen)}.")
    reference = {name: np.sort(_turned(name, human[name])) for name in chosen}
    for name, values in reference.items():
        if values.ndim != 1 or len(values) == 0 or np.isnan(values[-1]):
            raise ValueError(f"human[{name!r}] must be of shape (documents >= 1,) without NaN. Drop empty texts.")
    return RankSum(reference)


def _turned(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    return array if LARGER_MEANS_LLM[name] else -array
