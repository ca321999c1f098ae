"""Which sentences of a mixed document are a machine's: exact sets of labels from binned detector scores.

States are who wrote a sentence, symbols are bins of a detector's score of it. Guarantee: if authorship is a Markov
chain and a sentence's score depends on its author and the one before only, the true labelling of the new sentences is
in the set with probability at least 1 - alpha, however bad the detector is: a bad one gives large sets.
Source: `hmm`, with the state anchor; docs/explanation/conformal-sequences.md.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

from assay.conformal._arrays import Floats
from assay.conformal.hmm import HMMSets
from assay.conformal.markov import StateSets, check_labels, check_sequence

MAX_SENTENCES = 10
# Ends of more sentences than this are too many to enumerate; so many random permutations per 1 / alpha stand in, which
# are exact too.
_ENUMERATED, _PERMUTATIONS = 4, 20


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceLabels:
    """Sets of labels for a stretch of sentences.

    Attributes
    ----------
    sets
        The joint set over the stretch, with all p-values.
    verdicts
        For each sentence the labels that remain possible; all of them hold the truth at once with probability at least
        1 - alpha. One label: decided. Several: open. None: the stretch fits no labelling at this level.
    """

    sets: StateSets
    verdicts: tuple[frozenset[Hashable], ...]

    @property
    def decided(self) -> int:
        """Number of sentences with exactly one label."""
        return sum(len(verdict) == 1 for verdict in self.verdicts)

    def sentence(self) -> str:
        """The result in words."""
        if self.sets.size == 0:
            return (
                f"No labelling of these {len(self.verdicts)} sentences fits at level {self.sets.alpha:g}; this happens "
                f"with probability at most {self.sets.alpha:g} if the assumptions hold."
            )
        return (
            f"{self.decided} of {len(self.verdicts)} sentences are decided; all labels given are right at once with "
            f"probability at least {1 - self.sets.alpha:g}, if authorship is a Markov chain."
        )


class SentenceLabeller(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Exact label sets for sentence after sentence of a stream, with fixed bins of the score.

    Parameters
    ----------
    edges
        Inner edges of the bins, finite, strictly increasing, at least one. They must not depend on the stream: take
        them from other texts, such as by `score_bins`.
    labels
        Who may have written a sentence.
    alpha
        Miscoverage level in (0, 1), for all sentences of one call of `predict` together.
    randomised, keep_best
        As in `HMMSets`. By default ties count fully and a set is never empty: coverage is at least 1 - alpha, and for
        up to 4 sentences the same scores give the same sets.
    """

    def __init__(
        self,
        edges: npt.ArrayLike,
        labels: Iterable[Hashable] = ("human", "llm"),
        *,
        alpha: float = 0.1,
        randomised: bool = False,
        keep_best: bool = True,
    ) -> None:
        self.edges = edges
        self.labels = check_labels(labels, "labels")
        self.alpha = alpha
        self.randomised = randomised
        self.keep_best = keep_best
        self._made()

    def _made(self) -> tuple[Floats, HMMSets]:
        """The edges as checked, and the sets over the bins between them."""
        edges = np.asarray(self.edges, dtype=np.float64)
        steps = np.diff(edges) if edges.ndim == 1 else np.array([-1.0])
        if edges.size == 0 or not np.isfinite(edges).all() or not (steps > 0).all():
            raise ValueError(f"edges must be finite numbers that increase, at least one, got {self.edges!r}.")
        return edges, HMMSets(
            self.labels,
            range(len(edges) + 1),
            alpha=self.alpha,
            anchor="state",
            randomised=self.randomised,
            keep_best=self.keep_best,
        )

    def fit(self, labels: Iterable[Hashable], scores: npt.ArrayLike) -> SentenceLabeller:
        """Begin with sentences whose authors are known, in the order of the text."""
        edges, sets = self._made()
        sets.fit(labels, _bins(scores, edges))
        self._edges, self._sets = edges, sets
        return self

    def update(self, labels: Iterable[Hashable], scores: npt.ArrayLike) -> SentenceLabeller:
        """Append sentences that followed, once their authors are known; O(1) each."""
        self._check_fitted()
        self._sets.update(labels, _bins(scores, self._edges))
        return self

    def predict(self, scores: npt.ArrayLike, *, rng: np.random.Generator | None = None) -> SentenceLabels:
        """Label sets for the next sentences, 1 to 10 at a time (2 ** 10 labellings are tried).

        Up to 4 sentences every end that permutations can bring about is counted; for more, 20 / alpha - 1 random
        permutations are drawn from `rng` for each labelling. Coverage is the same. `rng` may be None for up to 4
        sentences unless `randomised`.
        """
        self._check_fitted()
        bins = _bins(scores, self._edges)
        if not 1 <= len(bins) <= MAX_SENTENCES:
            raise ValueError(f"scores must be of 1 to {MAX_SENTENCES} sentences at a time, got {len(bins)}.")
        many = len(bins) > _ENUMERATED
        self._sets.n_permutations = math.ceil(_PERMUTATIONS / self._sets.alpha) - 1 if many else None
        sets = self._sets.predict(bins, rng=rng)
        return SentenceLabels(sets=sets, verdicts=tuple(frozenset(sets.states_at(j)) for j in range(len(bins))))

    def _check_fitted(self) -> None:
        if not hasattr(self, "_sets"):
            raise ValueError("fit comes first: no labelled sentences were given yet.")


def _bins(scores: npt.ArrayLike, edges: Floats) -> list[int]:
    return np.searchsorted(edges, check_scores(scores)).tolist()  # type: ignore[no-any-return]


def label_sentences(
    labels: Iterable[Hashable],
    scores: npt.ArrayLike,
    new_scores: npt.ArrayLike,
    *,
    alpha: float = 0.1,
    n_bins: int = 4,
    names: Iterable[Hashable] = ("human", "llm"),
    randomised: bool = False,
    keep_best: bool = True,
    rng: np.random.Generator | None = None,
) -> SentenceLabels:
    """Label sets for the sentences that follow a labelled stretch, with bins taken from these very scores.

    Guarantee: as `SentenceLabeller`. The bins are quantiles of all scores, labelled and new together: permuting blocks
    leaves that collection as it is, so every arrangement is scored with the same bins.

    Parameters
    ----------
    labels, scores
        Known authors of the first sentences and the detector's scores of them, shape (n,), finite.
    new_scores
        Scores of the 1 to 10 sentences that follow.
    alpha
        Miscoverage level in (0, 1), for all new sentences together.
    n_bins
        At least 2.
    names
        Who may have written a sentence.
    randomised, keep_best
        As in `SentenceLabeller`.
    rng
        Needed if `randomised`, and for more than 4 new sentences.

    Raises
    ------
    ValueError
        On NaN, wrong shapes, unequal lengths, or labels that are not among the names.
    """
    known, new = check_scores(scores), check_scores(new_scores)
    edges = score_bins(np.concatenate([known, new]), n_bins)
    labeller = SentenceLabeller(edges, names, alpha=alpha, randomised=randomised, keep_best=keep_best)
    return labeller.fit(check_sequence(labels, "labels"), known).predict(new, rng=rng)


def score_bins(scores: npt.ArrayLike, n_bins: int = 4) -> Floats:
    """Inner edges of bins that hold about equally many of the scores; fewer where scores are equal.

    Raises
    ------
    ValueError
        If n_bins is below 2 or all scores are equal.
    """
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)) or n_bins < 2:
        raise ValueError(f"n_bins must be a whole number of at least 2, got {n_bins!r}.")
    values = check_scores(scores)
    if len(values) == 0 or values.min() == values.max():
        raise ValueError("scores must hold at least two different values: equal scores cannot be told apart.")
    edges = np.unique(np.quantile(values, np.arange(1, n_bins) / n_bins))
    # A score equal to an edge lies below it, so an edge at the largest score would leave an empty bin.
    edges = edges[edges < values.max()]
    return np.asarray(edges) if len(edges) else np.array([(values.min() + values.max()) / 2])


def check_scores(scores: npt.ArrayLike) -> Floats:
    """The scores as float64, shape (n,), finite."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"scores must be finite numbers, shape (n,), got shape {values.shape} or NaN or infinity.")
    return values
