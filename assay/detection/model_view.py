"""What a model says of one text's tokens: a function of the text alone, never of a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelView:
    """A model's law of each token of a text, read when a test asks for it: what no test asks for costs nothing.

    Attributes
    ----------
    score
        Gives `log_prob`. Costs a pass of the model.
    rows
        Gives the whole laws, in order and in pieces: pairs of the place of a piece's first token in the text and
        float32 log-probabilities, shape (k, V), -inf where the decoding rule removed a candidate. Tokens that could not
        be scored have no row. Costs a pass of the model: a test that reads rows takes the tokens' own from them too.
    """

    score: Callable[[], Floats]
    rows: Callable[[], Iterator[tuple[int, npt.NDArray[np.float32]]]]

    @cached_property
    def log_prob(self) -> Floats:
        """Natural logarithm of each token's probability, float64, shape (n,); NaN where nothing stood before it."""
        return self.score()

    def log_prob_at(self, positions: npt.NDArray[np.int64]) -> Floats:
        """`log_prob` of some tokens; one that the model could not score gets probability 1, and so no weight."""
        own = self.log_prob[positions]
        return np.where(np.isnan(own), 0.0, own)
