"""Exact prediction sets for the hidden states of a hidden Markov model whose parameters are unknown.

Guarantee: coverage 1 - alpha for every finite sample, if (state, symbol) is a Markov chain (anchor "pair"), or if the
states are a Markov chain and a symbol depends on its own state and the one before only (anchor "state": more blocks).
Source: Nettasinghe et al. (2023), ICML, PMLR 202, arXiv:2210.02271; blocks and proof as in `markov`. The state anchor:
docs/explanation/conformal-sequences.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Literal

import numpy as np
from sklearn.base import BaseEstimator

from assay.conformal._arrays import Floats, Integers
from assay.conformal.markov import (
    _DIGITS,
    Block,
    StateSets,
    all_candidates,
    block_pvalue,
    check_labels,
    check_sequence,
    check_set_options,
    cut,
    decide,
    encode,
    first_draw,
)


class HMMSets(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Exact sets for the states of new steps whose symbols are seen, after a stretch whose states are known.

    A candidate for the new states is scored by the sum over the new steps of one minus its filtered probability, under
    transition and emission probabilities counted on the whole sequence with the candidate filled in. Its p-value is
    the rank of that score among the permutations of the blocks.

    Parameters
    ----------
    states, symbols
        Every state and every symbol that can occur: different labels.
    alpha
        Miscoverage level in (0, 1).
    anchor
        "state": blocks end where the state is that of the last step; needs symbols that depend on their own state
        and the one before only. "pair": as published, blocks end where state and symbol are those of the last step;
        larger sets.
    smoothing
        Added to every count of the model that scores, > 0. It changes the size of sets, never coverage.
    randomised
        Break ties by a uniform draw: coverage exactly 1 - alpha. Otherwise at least 1 - alpha, with larger sets.
    n_permutations
        Random permutations for each candidate; None enumerates the ends that permutations can bring about.
    keep_best
        Never give an empty set: the candidate with the largest p-value joins it, which only adds coverage.

    Notes
    -----
    One new step needs only how often each (state before, state, symbol) occurred: `update` costs O(1) per step and
    `predict` nothing that grows with the sequence. m new steps try n_states ** m candidates.

    Examples
    --------
    >>> import numpy as np
    >>> sets = HMMSets(["human", "llm"], ["low", "high"], alpha=0.2)
    >>> sets = sets.fit(["human"] * 20 + ["llm"] * 20, ["high"] * 20 + ["low"] * 20)
    >>> sets.predict(["low"], rng=np.random.default_rng(1)).sequences()
    [('llm',)]
    """

    def __init__(
        self,
        states: Iterable[Hashable],
        symbols: Iterable[Hashable],
        *,
        alpha: float = 0.1,
        anchor: Literal["state", "pair"] = "state",
        smoothing: float = 0.5,
        randomised: bool = True,
        n_permutations: int | None = None,
        keep_best: bool = False,
    ) -> None:
        self.states = check_labels(states, "states")
        self.symbols = check_labels(symbols, "symbols")
        self.alpha = alpha
        self.anchor = anchor
        self.smoothing = smoothing
        self.randomised = randomised
        self.n_permutations = n_permutations
        self.keep_best = keep_best
        self._check_options()

    def fit(self, states: Iterable[Hashable], symbols: Iterable[Hashable]) -> HMMSets:
        """Begin with a labelled sequence.

        Parameters
        ----------
        states, symbols
            Labels of equal number, at least one, in the order of time.

        Raises
        ------
        ValueError
            For labels that were not declared, unequal lengths, or nothing at all.
        """
        # Here again: set_params sets without looking.
        self._check_options()
        labels = (check_labels(self.states, "states"), check_labels(self.symbols, "symbols"))
        letters = _encode(states, symbols, *labels)
        if not letters:
            raise ValueError("states must hold at least one state, got none.")
        self._labels, self._alphabet = labels
        self._by_pair = self.anchor == "pair"
        x, y = len(self._labels), len(self._alphabet)
        self._letters: list[tuple[int, int]] = []
        self._triples = np.zeros((x, x, y))  # how often (state before, state, symbol) occurred
        self._emissions = np.zeros((x, y))
        # Where an anchor is visited first, its own triple ends the head, not a block: it is not among the blocks' ends.
        self._heads = np.zeros((x, x, y))
        self._visited = np.zeros((x, y), dtype=np.bool_)
        self._append(letters)
        return self

    def update(self, states: Iterable[Hashable], symbols: Iterable[Hashable]) -> HMMSets:
        """Append labelled steps that followed; O(1) for each. Raises as `fit`, and appends nothing then."""
        self._check_fitted()
        self._append(_encode(states, symbols, self._labels, self._alphabet))
        return self

    def predict(self, symbols: Iterable[Hashable], *, rng: np.random.Generator | None = None) -> StateSets:
        """The set of state sequences for the next steps, whose symbols these are.

        Parameters
        ----------
        symbols
            Labels of the m new symbols, m >= 1.
        rng
            Source of the uniform draw that breaks ties if `randomised`, and of the random permutations; may be None
            where neither is wanted.

        Raises
        ------
        ValueError
            For symbols that were not declared, none at all, more candidates than can be tried, or no `rng` where
            something is drawn.
        """
        self._check_fitted()
        self._check_options()
        seen = encode(check_sequence(symbols, "symbols"), self._alphabet, "symbols")
        if not seen:
            raise ValueError("symbols must hold at least one symbol, got none.")
        candidates = all_candidates(len(self._labels), len(seen))
        uniform = first_draw(rng, randomised=self.randomised, n_permutations=self.n_permutations)
        if len(seen) == 1 and self.n_permutations is None:
            pvalues = self._one_step(seen[0], uniform)
        else:
            pvalues = np.array([self._pvalue(row, seen, uniform, rng) for row in candidates])
        return decide(candidates, pvalues, self.alpha, self._labels, keep_best=self.keep_best)

    def _check_fitted(self) -> None:
        if not hasattr(self, "_letters"):
            raise ValueError("fit comes first: no labelled sequence was given yet.")

    def _check_options(self) -> None:
        check_set_options(self.alpha, self.smoothing, self.n_permutations)
        if self.anchor not in ("state", "pair"):
            raise ValueError(f'anchor must be "state" or "pair", got {self.anchor!r}.')

    def _append(self, letters: list[tuple[int, int]]) -> None:
        for x, y in letters:
            new = not (self._visited[x, y] if self._by_pair else self._visited[x].any())
            if self._letters:
                before = self._letters[-1][0]
                self._triples[before, x, y] += 1
                if new:
                    self._heads[before, x, y] += 1
            self._visited[x, y] = True
            self._emissions[x, y] += 1
            self._letters.append((x, y))

    def _one_step(self, symbol: int, uniform: float) -> Floats:
        """p-values of all states for one new step, from the counts alone; the same as `_pvalue` gives."""
        n = len(self._labels)
        each = np.arange(n)
        before = self._letters[-1][0]
        # One model for each candidate c: transitions with (before, c) and emissions with (c, symbol) once more.
        counts = np.repeat(self._triples.sum(axis=2)[None], n, axis=0) + self.smoothing  # (c, x', x)
        counts[each, before, each] += 1
        transition = counts / counts.sum(axis=2, keepdims=True)
        counts = np.repeat(self._emissions[None], n, axis=0) + self.smoothing  # (c, x, y)
        counts[each, each, symbol] += 1
        emission = counts / counts.sum(axis=2, keepdims=True)
        joint = transition[each, :, each][:, :, None] * emission[each, each][:, None, :]  # (c, x', y): end in c
        scores = np.round(1 - joint / (transition @ emission), _DIGITS)
        ends = np.moveaxis(self._triples - self._heads, 1, 0).copy()  # (c, x', y)
        if self._by_pair:
            ends[:, :, np.arange(len(self._alphabet)) != symbol] = 0
            known = np.asarray(self._visited[:, symbol])
        else:
            known = np.asarray(self._visited.any(axis=1))
        ends[each, before, symbol] += known
        observed = scores[:, before, symbol][:, None, None]
        higher = (ends * (scores > observed)).sum(axis=(1, 2))
        equal = (ends * (scores == observed)).sum(axis=(1, 2))
        # A state that was never visited has no block: p = uniform.
        total = np.where(known, ends.sum(axis=(1, 2)), 1.0)
        return np.asarray((higher + uniform * np.where(known, equal, 1.0)) / total)

    def _pvalue(
        self, candidate: Integers, symbols: list[int], uniform: float, rng: np.random.Generator | None
    ) -> float:
        new = list(zip(candidate.tolist(), symbols, strict=True))
        letters = [*self._letters, *new]
        steps = len(new)
        transition = self._triples.sum(axis=2) + self.smoothing
        emission = self._emissions + self.smoothing
        before = self._letters[-1][0]
        for x, y in new:
            transition[before, x] += 1
            emission[x, y] += 1
            before = x
        transition /= transition.sum(axis=1, keepdims=True)
        emission /= emission.sum(axis=1, keepdims=True)

        def score(tails: list[Block]) -> Floats:
            return filter_score(np.array(tails, dtype=np.int64), transition, emission)

        last = letters[-1]
        if self._by_pair:
            visits = [place for place, letter in enumerate(letters) if letter == last]
        else:
            visits = [place for place, letter in enumerate(letters) if letter[0] == last[0]]
        return block_pvalue(
            cut(letters, visits, steps + 1),
            tuple(letters[-steps - 1 :]),
            steps,
            score,
            uniform,
            n_permutations=self.n_permutations,
            rng=rng,
        )


def _encode(
    states: Iterable[Hashable],
    symbols: Iterable[Hashable],
    labels: tuple[Hashable, ...],
    alphabet: tuple[Hashable, ...],
) -> list[tuple[int, int]]:
    x = encode(check_sequence(states, "states"), labels, "states")
    y = encode(check_sequence(symbols, "symbols"), alphabet, "symbols")
    if len(x) != len(y):
        raise ValueError(f"states and symbols must have equal length, got {len(x)} and {len(y)}.")
    return list(zip(x, y, strict=True))


def filter_score(tails: Integers, transition: Floats, emission: Floats) -> Floats:
    """Sum over the new steps of 1 - P(state | symbols up to it, the state before the stretch); larger is stranger.

    Parameters
    ----------
    tails
        int64, shape (K, m + 1, 2): (state, symbol) of the step before the stretch and of its m steps.
    transition, emission
        float64, shapes (n, n) and (n, symbols): rows sum to one.

    Returns
    -------
    float64, shape (K,), in [0, m].
    """
    rows = np.arange(len(tails))
    belief = transition[tails[:, 0, 0]]  # (K, n)
    total = np.zeros(len(tails))
    for step in range(1, tails.shape[1]):
        if step > 1:
            belief = belief @ transition
        belief = belief * emission[:, tails[:, step, 1]].T
        belief = belief / belief.sum(axis=1, keepdims=True)
        total += 1 - belief[rows, tails[:, step, 0]]
    return total
