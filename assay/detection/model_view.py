"""What a model says of one text's tokens: a function of the text alone, never of a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ModelView:
    """A model's law of each token of a text.

    Attributes
    ----------
    log_prob
        float64, shape (n,), natural log: of each token of the text; NaN where the model had nothing before it.
    rows
        Gives the whole laws, in order and in pieces: pairs of the place of a piece's first token in the text and
        float32 log-probabilities, shape (k, V), -inf where the decoding rule removed a candidate. Tokens that could not
        be scored have no row. Costs another pass of the model: call it only where a test needs more than `log_prob`.
    """

    log_prob: npt.NDArray[np.float64]
    rows: Callable[[], Iterator[tuple[int, npt.NDArray[np.float32]]]]

    def log_prob_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """`log_prob` of some tokens; one that the model could not score gets probability 1, and so no weight."""
        own = self.log_prob[positions]
        return np.where(np.isnan(own), 0.0, own)
