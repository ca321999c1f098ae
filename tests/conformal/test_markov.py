"""Block permutation p-values: every permutation written out, exact validity by summing over all sequences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.conformal import HMMSets, MarkovSets, StateSets
from assay.conformal.hmm import filter_score
from assay.conformal.markov import block_pvalue, cut, draw_tails, tail_law

Letter = tuple[int, int]


# --- the oracle: permutations one by one ----------------------------------------------------------------------------


def by_hand(letters: Sequence[Letter], steps: int, anchor: str, states: int, symbols: int) -> tuple[float, float]:
    """Shares of block permutations that score higher and equal; sequences are rebuilt whole and counted afresh."""
    letters = list(letters)

    def same(letter: Letter) -> bool:
        return letter[0] == letters[-1][0] if anchor == "state" else letter == letters[-1]

    blocks: list[list[Letter]] = []
    head: list[Letter] = []
    current: list[Letter] = []
    for letter in letters:
        current.append(letter)
        if same(letter):
            if head:
                blocks.append(current)
            else:
                head = current
            current = []
    assert not current  # the last block is complete
    observed = score_by_hand(letters, steps, states, symbols)
    higher = equal = total = 0
    for order in itertools.permutations(blocks):
        arrangement = head + [letter for block in order for letter in block]
        assert counts(arrangement, anchor) == counts(letters, anchor)
        found = score_by_hand(arrangement, steps, states, symbols)
        total += 1
        higher += found > observed + 1e-10
        equal += abs(found - observed) <= 1e-10
    return higher / total, equal / total


def counts(letters: Sequence[Letter], anchor: str) -> Any:
    """What decides the probability: transitions of pairs for the pair anchor, else of states, and emissions."""
    if anchor == "pair":
        return letters[0], sorted(itertools.pairwise(letters))
    return letters[0][0], sorted((a[0], b[0]) for a, b in itertools.pairwise(letters)), sorted(letters)


def score_by_hand(letters: Sequence[Letter], steps: int, states: int, symbols: int) -> float:
    """Sum over the last steps of 1 - filtered probability, counted and filtered with loops."""
    transition = [[0.5] * states for _ in range(states)]
    emission = [[0.5] * symbols for _ in range(states)]
    for (x, _), (following, _) in itertools.pairwise(letters):
        transition[x][following] += 1
    for x, y in letters:
        emission[x][y] += 1
    belief = [float(x == letters[-steps - 1][0]) for x in range(states)]
    total = 0.0
    for x, y in letters[-steps:]:
        ahead = [
            sum(belief[b] * transition[b][a] / sum(transition[b]) for b in range(states))
            * (emission[a][y] / sum(emission[a]))
            for a in range(states)
        ]
        belief = [value / sum(ahead) for value in ahead]
        total += 1 - belief[x]
    return total


def sequences(states: int, symbols: int, most: int) -> st.SearchStrategy[list[Letter]]:
    return st.lists(st.tuples(st.integers(0, states - 1), st.integers(0, symbols - 1)), min_size=4, max_size=most)


@given(sequences(2, 2, 11), st.integers(1, 3), st.sampled_from(["state", "pair"]), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=150, deadline=None)
def test_pvalues_are_those_of_all_permutations(letters: list[Letter], steps: int, anchor: Any, uniform: float) -> None:
    visits = sum(x[0] == letters[-1][0] for x in letters)
    if visits > 8:  # 7 blocks are 5,040 permutations
        return
    higher, equal = by_hand(letters, steps, anchor, 2, 2)
    sets = HMMSets([0, 1], [0, 1], anchor=anchor)
    known, new = letters[:-steps], letters[-steps:]
    sets.fit([x for x, _ in known], [y for _, y in known])
    candidate = np.array([x for x, _ in new])
    found = sets._pvalue(candidate, [y for _, y in new], uniform, np.random.default_rng(0))
    assert found == pytest.approx(higher + uniform * equal, abs=1e-9)
    if steps == 1:
        assert sets._one_step(new[0][1], uniform)[candidate[0]] == pytest.approx(found, abs=1e-9)


@given(sequences(3, 1, 10), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_a_chain_without_symbols(letters: list[Letter], steps: int) -> None:
    """MarkovSets by all permutations of blocks, with its own score: the sum of 1 - P(step)."""
    path = [x for x, _ in letters]
    places = [t for t, x in enumerate(path) if x == path[-1]]
    blocks = [path[a + 1 : b + 1] for a, b in itertools.pairwise(places)]
    if len(blocks) > 6:
        return
    transition = np.full((3, 3), 0.5)
    np.add.at(transition, (path[:-1], path[1:]), 1)
    transition /= transition.sum(axis=1, keepdims=True)

    def score(whole: list[int]) -> float:
        return sum(1 - transition[a, b] for a, b in itertools.pairwise(whole[-steps - 1 :]))

    every = [score(path[: places[0] + 1] + list(itertools.chain(*order))) for order in itertools.permutations(blocks)]
    higher = np.mean([s > score(path) + 1e-10 for s in every])
    equal = np.mean([abs(s - score(path)) <= 1e-10 for s in every])
    chain = MarkovSets([0, 1, 2]).fit(path[:-steps])
    found = chain._pvalue(tuple(path[-steps:]), 0.4, np.random.default_rng(0))
    assert found == pytest.approx(higher + 0.4 * equal, abs=1e-9)


# --- exact validity, with no simulation at all ------------------------------------------------------------------------

P = np.array([[0.8, 0.2], [0.4, 0.6]])
B = np.array([[0.7, 0.3], [0.1, 0.9]])


Emission = Callable[[Letter, int, int], float]


def probability(letters: Sequence[Letter], emission: Emission) -> float:
    """Of a sequence: start in either state; `emission(before, x, y)` may look at the letter before."""
    total = 0.5 * emission(letters[0], *letters[0])
    for before, (x, y) in itertools.pairwise(letters):
        total *= P[before[0], x] * emission(before, x, y)
    return float(total)


def exact_coverage(anchor: Any, steps: int, alpha: float, emission: Emission, length: int = 5) -> tuple[float, float]:
    """P(p > alpha) summed over all sequences of that length: randomised (integrated over U), and conservative."""
    randomised = conservative = 0.0
    letters_of = list(itertools.product((0, 1), (0, 1)))
    for letters in itertools.product(letters_of, repeat=length):
        sets = HMMSets([0, 1], [0, 1], anchor=anchor).fit(
            [x for x, _ in letters[:-steps]], [y for _, y in letters[:-steps]]
        )
        candidate = np.array([x for x, _ in letters[-steps:]])
        symbols = [y for _, y in letters[-steps:]]
        if steps == 1:
            low, high = (sets._one_step(symbols[0], u)[candidate[0]] for u in (0.0, 1.0))
        else:
            low, high = (sets._pvalue(candidate, symbols, u, np.random.default_rng(0)) for u in (0.0, 1.0))
        weight = probability(letters, emission)
        kept = 1.0 if low >= alpha else 0.0 if high <= alpha else (high - alpha) / (high - low)
        randomised += weight * kept
        conservative += weight * (high > alpha)
    return randomised, conservative


@pytest.mark.parametrize("anchor", ["state", "pair"])
@pytest.mark.parametrize("alpha", [0.2, 0.35])
def test_coverage_is_exact_in_a_hidden_markov_model(anchor: str, alpha: float) -> None:
    """To twelve digits, for five letters: no simulation, no asymptotics."""
    randomised, conservative = exact_coverage(anchor, 1, alpha, lambda before, x, y: B[x, y])
    assert randomised == pytest.approx(1 - alpha, abs=1e-12)
    assert conservative >= 1 - alpha


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["state", "pair"])
@pytest.mark.parametrize("steps", [2, 3])
def test_coverage_is_exact_for_several_steps(anchor: str, steps: int) -> None:
    randomised, conservative = exact_coverage(anchor, steps, 0.3, lambda before, x, y: B[x, y], length=6)
    assert randomised == pytest.approx(0.7, abs=1e-12)
    assert conservative >= 0.7


def test_where_the_state_anchor_fails() -> None:
    """It holds for symbols that depend on their state and the one before. Near-miss: on the symbol before, it does not.

    The pair anchor stays exact then, as (state, symbol) is still a Markov chain.
    """

    def of_states(before: Letter, x: int, y: int) -> float:
        share = 0.95 if before[0] == x else 0.05
        return share if y == 0 else 1 - share

    def of_the_symbol(before: Letter, x: int, y: int) -> float:
        return 0.9 if y == (before[1] ^ x) else 0.1

    assert exact_coverage("state", 1, 0.35, of_states)[0] == pytest.approx(0.65, abs=1e-12)
    assert abs(exact_coverage("state", 1, 0.35, of_the_symbol)[0] - 0.65) > 1e-4
    assert exact_coverage("pair", 1, 0.35, of_the_symbol)[0] == pytest.approx(0.65, abs=1e-12)


# --- tails ------------------------------------------------------------------------------------------------------------


def test_drawn_tails_follow_the_law() -> None:
    """20,000 draws against the enumeration: chi-square, false alarm 1e-6. Near-miss: blocks drawn with replacement."""
    from scipy.stats import chi2

    letters = [(x, 0) for x in (0, 1, 0, 0, 2, 0, 0, 1, 1, 0)]
    visits = [t for t, (x, _) in enumerate(letters) if x == 0]
    blocks = cut(letters, visits, 4)
    tails, law = tail_law(blocks, 3)
    assert law.sum() == pytest.approx(1)
    drawn = draw_tails(blocks, 3, 20_000, np.random.default_rng(1))
    observed = np.array([drawn.count(tail) for tail in tails])
    assert observed.sum() == 20_000
    assert ((observed - 20_000 * law) ** 2 / (20_000 * law)).sum() < chi2.isf(1e-6, len(law) - 1)
    once = [(0, 0)]
    contents = list(blocks.contents.elements())
    rng = np.random.default_rng(2)
    wrong = []
    for _ in range(20_000):
        tail: tuple[Letter, ...] = ()
        while len(tail) < 3:
            tail = (contents[rng.integers(len(contents))] + tail)[-4:]
        wrong.append(tail if len(tail) == 4 else (*once, *tail))
    seen = np.array([wrong.count(tail) for tail in tails])
    assert ((seen - 20_000 * law) ** 2 / (20_000 * law)).sum() > chi2.isf(1e-6, len(law) - 1)


def test_random_permutations_count_the_observed_one() -> None:
    """All scores equal: p = uniform whatever was drawn. All others higher: p = (n + uniform) / (n + 1)."""
    letters = [(0, 0), (1, 0), (0, 0), (0, 0)]
    blocks = cut(letters, [0, 2, 3], 2)
    rng = np.random.default_rng(3)
    observed = tuple(letters[-2:])
    flat = block_pvalue(blocks, observed, 1, lambda tails: np.zeros(len(tails)), 0.4, n_permutations=9, rng=rng)
    assert flat == pytest.approx(0.4)
    first = block_pvalue(
        blocks, observed, 1, lambda tails: np.r_[0, np.ones(len(tails) - 1)], 0.4, n_permutations=9, rng=rng
    )
    assert first == pytest.approx((9 + 0.4) / 10)
    with pytest.raises(ValueError, match="need rng"):
        block_pvalue(blocks, observed, 1, lambda tails: np.zeros(len(tails)), 0.4, n_permutations=9)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 1.0])
def test_without_blocks_the_pvalue_is_the_uniform(uniform: float) -> None:
    rng = np.random.default_rng(4)
    new = HMMSets(["a", "b", "c"], [0, 1]).fit(["a", "a", "b"], [0, 1, 1])
    assert new._one_step(0, uniform)[2] == pytest.approx(uniform)  # c was never seen: no block
    assert new._pvalue(np.array([2]), [0], uniform, rng) == pytest.approx(uniform)
    assert new._one_step(0, uniform)[1] == pytest.approx(uniform)  # b was seen once: one block
    assert HMMSets([0], [0]).fit([0], [0])._one_step(0, uniform)[0] == pytest.approx(uniform)


# --- sets -------------------------------------------------------------------------------------------------------------


def sample(n: int, seed: int) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    x = [0]
    while len(x) < n:
        x.append(int(rng.random() < P[x[-1], 1]))
    return x, [int(rng.random() < B[state, 1]) for state in x]


@pytest.mark.parametrize("anchor", ["state", "pair"])
def test_updates_equal_a_fit_on_everything(anchor: Any) -> None:
    x, y = sample(60, 5)
    grown = HMMSets([0, 1], [0, 1], anchor=anchor).fit(x[:1], y[:1])
    for t in range(1, 60):
        grown.update(x[t : t + 1], y[t : t + 1])
    whole = HMMSets([0, 1], [0, 1], anchor=anchor).fit(x, y)
    for symbols in ([0], [1], [1, 0]):
        ours, theirs = (one.predict(symbols, rng=np.random.default_rng(6)) for one in (grown, whole))
        np.testing.assert_array_equal(ours.pvalues, theirs.pvalues)


def test_a_set_and_its_projections() -> None:
    sets = StateSets(
        candidates=np.array([[0, 0], [0, 1], [1, 0], [1, 1]]),
        pvalues=np.array([0.3, 0.5, 0.05, 0.1]),
        included=np.array([True, True, False, False]),
        alpha=0.1,
        labels=("human", "llm"),
    )
    assert sets.sequences() == [("human", "llm"), ("human", "human")]
    assert (sets.size, sets.states_at(0), sets.states_at(1)) == (2, {"human"}, {"human", "llm"})
    assert ("human", "llm") in sets
    assert ("llm", "llm") not in sets
    assert 3 not in sets
    with pytest.raises(ValueError, match=r"step must be in 0\.\.1"):
        sets.states_at(2)


def test_conservative_sets_hold_the_randomised_ones_and_best_is_kept() -> None:
    x, y = sample(80, 7)
    empty = 0
    for t in range(30, 80):
        options = {"alpha": 0.4}
        random = HMMSets([0, 1], [0, 1], **options).fit(x[:t], y[:t]).predict([y[t]], rng=np.random.default_rng(t))
        safe = HMMSets([0, 1], [0, 1], randomised=False, **options).fit(x[:t], y[:t])
        best = HMMSets([0, 1], [0, 1], keep_best=True, **options).fit(x[:t], y[:t])
        assert not (random.included & ~safe.predict([y[t]], rng=np.random.default_rng(0)).included).any()
        kept = best.predict([y[t]], rng=np.random.default_rng(t))
        assert kept.size >= max(1, random.size)
        empty += random.size == 0
    assert empty > 0


def test_the_filter_score_sums_to_what_bayes_says() -> None:
    """One step: over the states the scores sum to n - 1, as filtered probabilities sum to one."""
    tails = np.array([[[0, 0], [x, 1]] for x in (0, 1)])
    scores = filter_score(tails, P, B)
    assert scores.sum() == pytest.approx(1)
    assert 1 - scores[1] == pytest.approx(P[0, 1] * B[1, 1] / (P[0, 0] * B[0, 1] + P[0, 1] * B[1, 1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HMMSets(["a", "a"], [0]), "states must be different"),
        (lambda: HMMSets([], [0]), "states must be different"),
        (lambda: HMMSets(["a"], [0], alpha=1), r"alpha must be in \(0, 1\)"),
        (lambda: HMMSets(["a"], [0], smoothing=0), "smoothing must be"),
        (lambda: HMMSets(["a"], [0], anchor="symbol"), 'anchor must be "state" or "pair"'),
        (lambda: HMMSets(["a"], [0], n_permutations=8), "at least 1 / alpha - 1 = 9"),
        (lambda: MarkovSets(["a"]).predict(1, rng=np.random.default_rng(0)), "fit comes before predict"),
        (lambda: MarkovSets(["a"]).fit([]), "at least one state"),
        (lambda: MarkovSets(["a", "b"]).fit(["a"]).predict(0, rng=np.random.default_rng(0)), "steps must be"),
        (lambda: MarkovSets(["a", "b"]).fit(["a"]).predict(17, rng=np.random.default_rng(0)), "Predict fewer steps"),
        (lambda: HMMSets(["a"], [0]).update(["a"], [0]), "fit comes first"),
        (lambda: HMMSets(["a"], [0]).fit([], []), "at least one state"),
        (lambda: HMMSets(["a"], [0]).fit("a", [0]), "one-dimensional sequence"),
        (lambda: HMMSets(["a"], [0]).fit(np.array([["a"]]), [0]), "one-dimensional sequence"),
    ],
)
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unseen_labels_are_named_and_change_nothing() -> None:
    x, y = sample(30, 8)
    sets = HMMSets([0, 1], [0, 1]).fit(np.array(x), np.array(y))
    before = sets.predict([1], rng=np.random.default_rng(0)).pvalues
    with pytest.raises(ValueError, match=r"states must be among \[0, 1\], got 2 at position 1"):
        sets.update([0, 2], [0, 0])
    with pytest.raises(ValueError, match=r"symbols must be among \[0, 1\], got nan at position 0"):
        sets.update([0], [np.nan])
    with pytest.raises(ValueError, match=r"got \[0\] at position 0"):
        sets.update([[0]], [0])
    with pytest.raises(ValueError, match="equal length, got 2 and 1"):
        sets.update([0, 1], [0])
    with pytest.raises(ValueError, match="got 'high' at position 0"):
        sets.predict(["high"], rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least one symbol"):
        sets.predict([], rng=np.random.default_rng(0))
    np.testing.assert_array_equal(sets.predict([1], rng=np.random.default_rng(0)).pvalues, before)


def test_update_before_fit_says_so() -> None:
    with pytest.raises(ValueError, match="fit comes before update"):
        MarkovSets(["a", "b"]).update(["a"])
