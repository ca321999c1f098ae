"""Exact p-values for how a labelled chain went on, by permuting its blocks; prediction sets for a Markov chain.

Cut z_1..z_n at the visits of one anchor, that of z_n: what comes up to its first visit is the head, each later visit
ends a block. A permutation of the blocks keeps the start and every count of transitions, so under a Markov law with any
parameters all arrangements are equally likely, and the rank of the score of the observed one is uniform.
Source: Diaconis and Freedman (1980), Ann. Probab. 8, 115-130; Nettasinghe, Chatterjee, Tipireddy and Halappanavar
(2023), Extending Conformal Prediction to Hidden Markov Models with Exact Validity via de Finetti's Theorem for Markov
Chains, ICML, PMLR 202, arXiv:2210.02271. Proof: docs/explanation/conformal-sequences.md.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator

from assay.conformal._arrays import Bools, Floats, Integers

# Scores are compared after rounding. That is a function of the arrangement alone, so exactness is kept, and tails whose
# scores are equal in exact arithmetic do not part by their rounding errors.
_DIGITS = 12
MAX_CANDIDATES = 65_536

# A letter is a tuple (state, symbol) as integers; a block is a tuple of letters.
Letter = tuple[int, int]
Block = tuple[Letter, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class StateSets:
    """A set of state sequences for the next m steps, with the p-value of every candidate.

    Guarantee: under the method's assumptions the true sequence is in the set with probability at least 1 - alpha
    (exactly 1 - alpha for randomised p-values without `keep_best`), over the labelled sequence, the new one and the
    draws together. It is one statement about the m steps at once.

    Attributes
    ----------
    candidates
        int64, shape (K, m): places in `labels`; every sequence there is.
    pvalues
        float64, shape (K,).
    included
        bool, shape (K,): which candidates form the set.
    alpha
        Miscoverage level.
    labels
        The states, in the order of their numbers.
    """

    candidates: Integers
    pvalues: Floats
    included: Bools
    alpha: float
    labels: tuple[Hashable, ...]

    @property
    def size(self) -> int:
        """Number of sequences in the set; 0 is possible without `keep_best`."""
        return int(self.included.sum())

    def sequences(self) -> list[tuple[Hashable, ...]]:
        """The sequences in the set, the largest p-value first."""
        places = np.flatnonzero(self.included)
        places = places[np.argsort(-self.pvalues[places], kind="stable")]
        return [tuple(self.labels[x] for x in self.candidates[k]) for k in places]

    def states_at(self, step: int) -> set[Hashable]:
        """The states that some sequence of the set has at a step, 0 for the first.

        All m of these sets hold the truth at once with the probability that the whole set has.
        """
        if not 0 <= step < self.candidates.shape[1]:
            raise ValueError(f"step must be in 0..{self.candidates.shape[1] - 1}, got {step}.")
        return {self.labels[x] for x in np.unique(self.candidates[self.included, step])}

    def __contains__(self, states: object) -> bool:
        """Whether a sequence of m labels is in the set."""
        return isinstance(states, Iterable) and tuple(states) in self.sequences()


@dataclass(frozen=True)
class Blocks:
    """A sequence cut at the visits of an anchor: its head, and how often each block occurs.

    Head and blocks are clipped to so many letters from their end as a score can reach: none looks through a longer one.
    """

    head: Block
    contents: Counter[Block]


def cut(letters: Sequence[Letter], visits: Sequence[int], reach: int) -> Blocks:
    """Blocks of a sequence whose anchor is visited at the increasing places `visits`, the last of them the end."""
    head = tuple(letters[max(0, visits[0] + 1 - reach) : visits[0] + 1])
    contents = Counter(
        tuple(letters[max(first + 1, last + 1 - reach) : last + 1]) for first, last in itertools.pairwise(visits)
    )
    return Blocks(head, contents)


def tail_law(blocks: Blocks, steps: int) -> tuple[list[Block], Floats]:
    """Law of the last steps + 1 letters when the blocks are permuted uniformly.

    A tail that ends where a block begins has the anchor before it; that letter is then taken from whatever precedes,
    so only its anchored part may be used by a score.

    Returns
    -------
    The distinct tails, and their probabilities. Enumerates ordered choices of at most steps + 1 kinds of block.
    """
    law: dict[Block, float] = {}
    remaining = Counter(blocks.contents)

    def extend(tail: Block, weight: float, left: int) -> None:
        need = steps + 1 - len(tail)
        # The anchor's state is the same wherever it comes from: one letter short of the reach, the head's will do.
        if need <= 1 and tail:
            whole = (blocks.head[-1:] + tail) if need == 1 else tail
            law[whole] = law.get(whole, 0.0) + weight
            return
        if left == 0:
            whole = (blocks.head + tail)[-(steps + 1) :]
            law[whole] = law.get(whole, 0.0) + weight
            return
        for content, count in list(remaining.items()):
            if count == 0:
                continue
            remaining[content] -= 1
            extend((content + tail)[-(steps + 1) :], weight * count / left, left - 1)
            remaining[content] += 1

    extend((), 1.0, blocks.contents.total())
    return list(law), np.array(list(law.values()))


def draw_tails(blocks: Blocks, steps: int, n: int, rng: np.random.Generator) -> list[Block]:
    """Tails as in `tail_law`, of n independent uniform permutations."""
    contents = list(blocks.contents.elements())
    tails = []
    for _ in range(n):
        tail: Block = ()
        unused = list(range(len(contents)))
        while len(tail) < steps and unused:
            pick = int(rng.integers(len(unused)))
            unused[pick], unused[-1] = unused[-1], unused[pick]
            tail = (contents[unused.pop()] + tail)[-(steps + 1) :]
        tails.append((blocks.head + tail)[-(steps + 1) :] if len(tail) <= steps else tail)
    return tails


def block_pvalue(
    blocks: Blocks,
    observed: Block,
    steps: int,
    score: Callable[[list[Block]], Floats],
    uniform: float,
    *,
    n_permutations: int | None = None,
    rng: np.random.Generator | None = None,
) -> float:
    """Exact p-value of the observed tail: the share of block permutations that score higher, and `uniform` of the ties.

    Guarantee: uniform on [0, 1] for `uniform` uniform and independent of the data; at least uniform, P(p <= a) <= a,
    for uniform = 1. Both hold for the enumeration and for any number of random permutations. With no or one block,
    p = uniform.

    Parameters
    ----------
    blocks
        The sequence, cut at its last letter's anchor.
    observed
        Its last steps + 1 letters.
    steps
        How many of them are new.
    score
        Nonconformity of tails, larger is stranger; a function of the tail and of what all arrangements share.
    uniform
        In [0, 1].
    n_permutations
        Number of random permutations; None enumerates.
    rng
        Needed for random permutations.

    Returns
    -------
    In [0, 1].

    References
    ----------
    Diaconis and Freedman (1980); Nettasinghe et al. (2023), arXiv:2210.02271.
    """
    if n_permutations is None:
        tails, law = tail_law(blocks, steps)
        scores = np.round(score([observed, *tails]), _DIGITS)
        higher, equal = law[scores[1:] > scores[0]].sum(), law[scores[1:] == scores[0]].sum()
        return float(min(1.0, higher + uniform * equal))
    if rng is None:
        raise ValueError("random permutations need rng, a numpy Generator.")
    scores = np.round(score([observed, *draw_tails(blocks, steps, n_permutations, rng)]), _DIGITS)
    # The observed arrangement counts as one of them: that makes every number of permutations exact.
    return float(((scores > scores[0]).sum() + uniform * (scores == scores[0]).sum()) / (n_permutations + 1))


def all_candidates(n_states: int, steps: int) -> Integers:
    """Every sequence of `steps` states, int64, shape (n_states ** steps, steps)."""
    if n_states**steps > MAX_CANDIDATES:
        raise ValueError(
            f"{n_states} states over {steps} steps make {n_states**steps} candidates, at most {MAX_CANDIDATES} are "
            "tried. Predict fewer steps at a time."
        )
    return np.array(list(itertools.product(range(n_states), repeat=steps)), dtype=np.int64).reshape(-1, steps)


def decide(
    candidates: Integers, pvalues: Floats, alpha: float, labels: tuple[Hashable, ...], *, keep_best: bool
) -> StateSets:
    """The set of candidates whose p-value exceeds alpha; with `keep_best` also the one with the largest."""
    included = pvalues > alpha
    if keep_best and not included.any():
        included[np.argmax(pvalues)] = True
    return StateSets(candidates=candidates, pvalues=pvalues, included=included, alpha=alpha, labels=labels)


def encode(values: Iterable[Hashable], labels: tuple[Hashable, ...], name: str) -> list[int]:
    """Places of the values among the labels.

    Raises
    ------
    ValueError
        For a value that is no label, by name and position.
    """
    places = {label: place for place, label in enumerate(labels)}
    found = []
    for position, value in enumerate(values):
        try:
            found.append(places[value])
        except (KeyError, TypeError):
            raise ValueError(
                f"{name} must be among {list(labels)}, got {value!r} at position {position}. Declare every label that "
                "can occur when the object is made."
            ) from None
    return found


def check_labels(labels: Iterable[Hashable], name: str) -> tuple[Hashable, ...]:
    """The labels as a tuple: at least one, all different."""
    found = tuple(labels)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"{name} must be different labels, at least one, got {found!r}.")
    return found


def check_sequence(values: Iterable[Hashable], name: str) -> list[Hashable]:
    """The values as a list; a text or a matrix is not a sequence of labels."""
    if isinstance(values, (str, bytes)) or (isinstance(values, np.ndarray) and values.ndim != 1):
        raise ValueError(f"{name} must be a one-dimensional sequence, one label for each step, got {values!r}.")
    # numpy's scalars equal the Python numbers that were declared, and hash alike.
    return list(values.tolist()) if isinstance(values, np.ndarray) else list(values)


class MarkovSets(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Exact prediction sets for the next states of a Markov chain whose transition law is unknown.

    Guarantee: exact coverage for every finite sample if the states are a Markov chain, or only partially exchangeable
    (start and transition counts decide the probability of a sequence).

    Parameters
    ----------
    states
        Every state that can occur: different labels.
    alpha
        Miscoverage level in (0, 1).
    smoothing
        Added to every transition count of the model that scores, > 0. It changes the size of sets, never coverage.
    randomised
        Break ties by a uniform draw: coverage exactly 1 - alpha. Otherwise at least 1 - alpha, with larger sets.
    n_permutations
        Random permutations for each candidate; None enumerates.
    keep_best
        Never give an empty set: the candidate with the largest p-value joins it, which only adds coverage.

    Examples
    --------
    >>> import numpy as np
    >>> chain = MarkovSets(["calm", "storm"], alpha=0.2)
    >>> chain = chain.fit(["calm"] * 12 + ["storm"] * 6 + ["calm"] * 12)
    >>> chain.predict(1, rng=np.random.default_rng(1)).sequences()
    [('calm',)]
    """

    def __init__(
        self,
        states: Iterable[Hashable],
        *,
        alpha: float = 0.1,
        smoothing: float = 0.5,
        randomised: bool = True,
        n_permutations: int | None = None,
        keep_best: bool = False,
    ) -> None:
        self.states = check_labels(states, "states")
        check_set_options(alpha, smoothing, n_permutations)
        self.alpha = alpha
        self.smoothing = smoothing
        self.randomised = randomised
        self.n_permutations = n_permutations
        self.keep_best = keep_best

    def fit(self, states: Iterable[Hashable]) -> MarkovSets:
        """Begin with a labelled sequence, at least one state long; labels that were not declared are refused."""
        # Here again: set_params sets without looking.
        labels = check_labels(self.states, "states")
        check_set_options(self.alpha, self.smoothing, self.n_permutations)
        found = encode(check_sequence(states, "states"), labels, "states")
        if not found:
            raise ValueError("states must hold at least one state, got none.")
        self._labels = labels
        self._letters = [(x, 0) for x in found]
        return self

    def update(self, states: Iterable[Hashable]) -> MarkovSets:
        """Append the states that followed."""
        if not hasattr(self, "_letters"):
            raise ValueError("fit comes before update: no labelled sequence was given yet.")
        self._letters += [(x, 0) for x in encode(check_sequence(states, "states"), self._labels, "states")]
        return self

    def predict(self, steps: int, *, rng: np.random.Generator | None = None) -> StateSets:
        """The set for the next `steps` states.

        One uniform draw if `randomised`, and the random permutations, come from `rng`; without either it may be None.
        """
        if not hasattr(self, "_letters"):
            raise ValueError("fit comes before predict: no labelled sequence was given yet.")
        check_set_options(self.alpha, self.smoothing, self.n_permutations)
        candidates = all_candidates(len(self._labels), check_steps(steps))
        uniform = first_draw(rng, randomised=self.randomised, n_permutations=self.n_permutations)
        pvalues = np.array([self._pvalue(tuple(row), uniform, rng) for row in candidates.tolist()])
        return decide(candidates, pvalues, self.alpha, self._labels, keep_best=self.keep_best)

    def _pvalue(self, candidate: tuple[int, ...], uniform: float, rng: np.random.Generator | None) -> float:
        letters = [*self._letters, *((x, 0) for x in candidate)]
        path = np.array(letters)[:, 0]
        counts = np.full((len(self._labels), len(self._labels)), self.smoothing)
        np.add.at(counts, (path[:-1], path[1:]), 1.0)
        transition = counts / counts.sum(axis=1, keepdims=True)

        def score(tails: list[Block]) -> Floats:
            states = np.array(tails)[:, :, 0]  # (K, steps + 1)
            return np.asarray((1 - transition[states[:, :-1], states[:, 1:]]).sum(axis=1))

        steps = len(candidate)
        visits = np.flatnonzero(path == path[-1]).tolist()
        return block_pvalue(
            cut(letters, visits, steps + 1),
            tuple(letters[-steps - 1 :]),
            steps,
            score,
            uniform,
            n_permutations=self.n_permutations,
            rng=rng,
        )


def first_draw(rng: np.random.Generator | None, *, randomised: bool, n_permutations: int | None) -> float:
    """The uniform draw that breaks ties, or 1 where none is wanted; refuses what cannot draw where draws are needed."""
    if (randomised or n_permutations is not None) and not isinstance(rng, np.random.Generator):
        raise ValueError(
            f"rng must be a numpy Generator, such as numpy.random.default_rng(), got {rng!r}: ties are broken by a "
            "draw if randomised=True, and n_permutations draws permutations. With randomised=False and "
            "n_permutations=None nothing is drawn."
        )
    return float(rng.random()) if randomised and rng is not None else 1.0


def check_steps(steps: int) -> int:
    """A whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}.")
    return int(steps)


def check_set_options(alpha: float, smoothing: float, n_permutations: int | None) -> None:
    """Refuse options of the sets that are out of range."""
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}.")
    if not isinstance(smoothing, (int, float)) or not 0 < smoothing < np.inf:
        raise ValueError(f"smoothing must be a positive number, got {smoothing!r}.")
    if n_permutations is not None and (
        isinstance(n_permutations, bool)
        or not isinstance(n_permutations, (int, np.integer))
        or (n_permutations + 1) * alpha < 1
    ):
        raise ValueError(
            f"n_permutations must be None, or a whole number of at least 1 / alpha - 1 = {1 / alpha - 1:g}: with fewer "
            f"no candidate could be left out for certain; got {n_permutations!r}."
        )
