"""How much of a text was left to chance: a mark lives there only, so decided texts are refused or warned about.

A test that flags every fixed text under at most a share alpha of the keys flags a text x, marked without distortion,
with chance at most alpha / p(x), where p(x) is its probability under the model and the decoding rule.
Reference: Huang et al. (2023), Theorem 3.2 (the best test's Type II error), arXiv:2312.07930.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from assay._errors import GenerationError
from assay.kernels.chacha import Words

TOKENS = 64
LEVEL = 0.01
_ENOUGH = math.log(0.5 / LEVEL)  # nats; with no more than this alpha / p(x) is at most a half

Tokens = npt.NDArray[np.int64]
LogWeights = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class WeakMarkWarning(UserWarning):
    """Texts were all but decided by the model and the decoding rule, so that hardly a mark is in them.

    The engines' adapters give it at the 64th token of a text whose tokens so far have, all together, a probability of
    2 % or more. A test that flags at most 1 % of the keys for every fixed text finds an undistorted mark in a text of
    probability p with chance at most 0.01 / p, here at most a half. Texts that end earlier are not judged.

    References
    ----------
    Huang et al. (2023), Theorem 3.2, arXiv:2312.07930.
    """


def check_candidates(*, top_k: Any = None, top_p: Any = None, min_p: Any = None, otherwise: str = "") -> None:
    """Refuse truncation that leaves one token whatever the model says.

    Parameters
    ----------
    top_k, top_p, min_p
        As the engine takes them; None where it does not.
    otherwise
        What else the caller may do: the end of the message.

    Raises
    ------
    GenerationError
        For top_k = 1, top_p = 0 and min_p = 1.
    """
    for name, value, lone, accepted in (
        ("top_k", top_k, 1, "above 1"),
        ("top_p", top_p, 0, "above 0"),
        ("min_p", min_p, 1, "below 1"),
    ):
        if value is not None and value == lone:
            raise GenerationError(
                f"{name} must be {accepted} for a watermark, got {value:g}: one candidate leaves no randomness to key. "
                f"Leave it out or change it; `assay plan` says how many tokens a setting needs.{otherwise}"
            )


class Watched:
    """A way to draw tokens that warns, once, where the first tokens of its texts were all but decided.

    The tokens are those of `draw`, which is called with the same arguments. Each position counts as it was last drawn,
    so that repeated and discarded steps do no harm, and as the freest of its rows has it: the settings are judged, and
    not one text.

    Attributes
    ----------
    draw
        `(ids, log_weights, ...) -> tokens`; see `assay.watermark.schemes.Sampler`.
    race_keys
        What keys the rows' races, where drawing is one keyed race per row, see `gumbel.RaceSampler`; else None.
    judged
        Whether it needs to see no more tokens: `draw` alone is then enough.
    """

    def __init__(self, draw: Callable[..., Tokens]) -> None:
        self.draw = draw
        self.race_keys: Callable[..., Words] | None = getattr(draw, "race_keys", None)
        self._surprisals: dict[int, npt.NDArray[np.float64]] = {}
        self.judged = False

    def __call__(self, ids: Tokens, log_weights: LogWeights, *rest: Any) -> Tokens:
        """The tokens of `draw`.

        Warns
        -----
        WeakMarkWarning
            At the `TOKENS`-th token, if no test of level `LEVEL` is likelier than not to find a mark in any row so far.
        """
        tokens = self.draw(ids, log_weights, *rest)
        if not self.judged:
            self.judge(ids.shape[1], surprisals(log_weights, tokens))
        return tokens

    def judge(self, place: int, drawn: npt.NDArray[np.float64]) -> None:
        """Take note of the surprisals, shape (rows,), of the tokens at a place, for draws that were made elsewhere."""
        self._surprisals[place] = drawn
        if np.sum(list(self._surprisals.values()), axis=0).max() > _ENOUGH:
            self.judged = True
        elif len(self._surprisals) == TOKENS:
            self.judged = True
            warnings.warn(
                f"the first {TOKENS} tokens of a text were all but decided before they were drawn: no test at level "
                f"{LEVEL:g} is likelier than not to find an undistorted mark in them. Raise the temperature, or "
                "truncate less; `assay plan` says how many tokens a setting needs.",
                WeakMarkWarning,
                stacklevel=2,
            )


def surprisals(log_weights: LogWeights, tokens: Tokens) -> npt.NDArray[np.float64]:
    """-log p of each row's token, in nats.

    Parameters
    ----------
    log_weights
        Shape (rows, V): unnormalised, -inf where removed.
    tokens
        int64, shape (rows,).
    """
    peaks = log_weights.max(axis=1, keepdims=True)
    masses = np.exp(log_weights - peaks).sum(axis=1, dtype=np.float64)
    drawn = np.take_along_axis(log_weights, tokens[:, None], axis=1)
    out: npt.NDArray[np.float64] = np.log(masses) - (drawn - peaks)[:, 0].astype(np.float64)
    return out
