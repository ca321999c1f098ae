"""The tests of the inverse-transform mark: exact null laws, power, wrong models, edits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from assay.detection import inverse_transform
from assay.detection.inverse_transform import (
    TOLERANCE,
    documents_test,
    interval_test,
    intervals,
    robust_test,
    sum_test,
    test_ids,
    token_log_tails,
)
from assay.detection.model_view import ModelView
from assay.watermark.edits import edit
from assay.watermark.inverse_transform import InversePivots, InverseTransformConfig, observe, sampler

CONFIG = InverseTransformConfig()
V = 200


def words(number: int) -> np.ndarray:
    digest = hashlib.sha256(f"inverse {number}".encode()).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


def view_of(ids: np.ndarray, laws: np.ndarray) -> ModelView:
    """A model view in two uneven pieces, as a scorer gives it."""
    half = len(laws) // 3
    pieces = [(0, laws[:half]), (half, laws[half:])]
    return ModelView(lambda: laws[np.arange(len(ids)), ids].astype(np.float64), lambda: iter(pieces))


def marked_text(n: int, concentration: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt of four tokens and n tokens under key 1, and the laws of the n tokens in single precision."""
    rng = np.random.default_rng(seed)
    draw = sampler(words(1), CONFIG, words(2))
    ids, laws = rng.integers(0, V, (1, 4)), np.empty((n, V), dtype=np.float32)
    for t in range(n):
        laws[t] = np.log(np.maximum(rng.dirichlet(np.full(V, concentration)), 1e-30))
        ids = np.concatenate([ids, draw(ids, laws[t : t + 1], None)[:, None]], axis=1)
    return ids[0].astype(np.uint32), laws


def test_the_density_is_placketts_copula() -> None:
    # Independent oracle: the mixed derivative of Plackett's distribution function, by finite differences.
    def distribution(u: float, w: float, odds: float) -> float:
        total = 1 + (odds - 1) * (u + w)
        return (total - math.sqrt(total**2 - 4 * odds * (odds - 1) * u * w)) / (2 * (odds - 1))

    h = 1e-4
    for odds in (1.5, 6.0, 40.0):
        density = inverse_transform._density(odds)
        assert density.mean() == pytest.approx(1.0, abs=1e-12)
        for a, b in ((3, 5), (100, 120), (250, 2)):
            u, w = (a + 0.5) / 256, (b + 0.5) / 256
            corners = [(1, u + h, w + h), (-1, u + h, w - h), (-1, u - h, w + h), (1, u - h, w - h)]
            mixed = sum(sign * distribution(x, y, odds) for sign, x, y in corners) / (4 * h * h)
            assert density[a, b] == pytest.approx(mixed, rel=2e-3)


def test_the_sum_has_its_exact_law() -> None:
    # Two terms by enumeration of all pairs of values, against the convolution.
    _, values, probabilities = inverse_transform._score_table()
    sums = np.add.outer(values, values).ravel()
    chances = np.multiply.outer(probabilities, probabilities).ravel()
    for score in (-100, 0, 57, 200, int(2 * values[-1])):
        exact = float(chances[sums >= score].sum())
        assert math.exp(inverse_transform._log_tail(score, 2)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("concentration", [0.005, 0.05])
def test_marked_text_is_found_and_other_keys_see_nothing(concentration: float) -> None:
    ids, laws = marked_text(150, concentration, seed=3)
    view = view_of(ids[4:], laws)
    results = {
        (key, test): test_ids(ids, 4, words(key), CONFIG, test=test, model=view)
        for key in (1, 3)
        for test in ("sum", "model-aware", "robust", "auto")
    }
    for test, bound in (("sum", 1e-8), ("model-aware", 1e-30), ("robust", 1e-30), ("auto", 1e-30)):
        assert results[1, test].pvalue < bound
        assert results[3, test].pvalue > 1e-3
    # Verbatim text of the model: every U is in its interval, so the p-value is near the product of the lengths.
    found = observe(ids, words(1), CONFIG, prompt_length=4)
    hits, lengths = intervals(ids, 4, words(1), CONFIG, found, view)
    assert hits.all()
    assert results[1, "model-aware"].log_pvalue < 0.97 * np.log(lengths).sum()
    own = np.exp(laws[found.positions, ids[4 + found.positions]])
    assert np.all(lengths <= own + 2 * TOLERANCE + 1e-6)


def test_rounding_within_the_tolerance_costs_no_hit() -> None:
    ids, laws = marked_text(150, 0.05, seed=3)
    moved = laws + np.random.default_rng(0).normal(0, 2e-5, laws.shape).astype(np.float32)
    found = observe(ids, words(1), CONFIG, prompt_length=4)
    hits, _ = intervals(ids, 4, words(1), CONFIG, found, view_of(ids[4:], moved))
    assert hits.all()
    far = laws + np.random.default_rng(0).normal(0, 0.3, laws.shape).astype(np.float32)
    hits, _ = intervals(ids, 4, words(1), CONFIG, found, view_of(ids[4:], far))
    assert not hits.all()
    assert test_ids(ids, 4, words(1), CONFIG, test="robust", model=view_of(ids[4:], far)).pvalue < 1e-30


def test_edits() -> None:
    ids, laws = marked_text(200, 0.05, seed=4)
    edited = np.concatenate([ids[:4], edit(ids[4:], "substitute", 0.2, V, np.random.default_rng(1))])
    for test in ("sum", "model-aware", "robust"):
        result = test_ids(edited, 4, words(1), CONFIG, test=test, model=view_of(edited[4:], laws))
        assert result.pvalue < (1e-4 if test == "sum" else 1e-12), test


def null_results(ids: np.ndarray, keys: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """log p and log e of one unmarked text under many keys, with a model that is wrong."""
    laws = np.log(np.random.default_rng(2).dirichlet(np.full(64, 0.3), len(ids)) + 1e-12).astype(np.float32)
    rows: dict[str, list[tuple[float, float]]] = {"sum": [], "model-aware": [], "robust": []}
    for number in range(100, 100 + keys):
        found = observe(ids, words(number), CONFIG)
        hits, lengths = intervals(ids, 0, words(number), CONFIG, found, view_of(ids, laws))
        for name, result in (
            ("sum", sum_test(found)),
            ("model-aware", interval_test(found, hits, lengths)),
            ("robust", robust_test(found, hits, lengths)),
        ):
            rows[name].append((result.log_pvalue, result.log_evalue))
    return {name: tuple(np.array(pairs).T) for name, pairs in rows.items()}


def check_size(found: dict[str, tuple[np.ndarray, np.ndarray]], keys: int) -> None:
    for name, (log_p, log_e) in found.items():
        for level in (0.05, 0.01):
            bound = stats.binom.ppf(1 - 1e-6, keys, level)
            assert np.sum(log_p <= math.log(level)) <= bound, (name, level)
            assert np.sum(log_e >= -math.log(level)) <= bound, (name, level)
    # The sum's p-value is uniform up to the size of its steps: KS at level 1e-6.
    assert stats.kstest(np.exp(found["sum"][0]), "uniform").pvalue > 1e-6


def test_size_on_repetitive_text_under_a_wrong_model() -> None:
    rng = np.random.default_rng(1)
    check_size(null_results(np.tile(rng.integers(0, 64, 30), 3).astype(np.uint32), 120), 120)


@pytest.mark.slow
def test_size_at_length() -> None:
    rng = np.random.default_rng(1)
    check_size(null_results(np.tile(rng.integers(0, 64, 60), 4).astype(np.uint32), 1500), 1500)


def test_counting_repeated_contexts_is_rejected() -> None:
    # Near-miss: each place counts, though a context that returns brings the same U again.
    ids = np.random.default_rng(1).integers(0, 64, 30).astype(np.uint32)
    rejections = 0
    for number in range(100, 200):
        once = observe(ids, words(number), CONFIG)
        again = [np.tile(part, 5) for part in (once.positions, once.uniforms, once.places)]
        rejections += sum_test(InversePivots(*again, 150, 0)).pvalue <= 0.01
    assert rejections > stats.binom.ppf(1 - 1e-6, 100, 0.01)


def test_an_interval_shorter_than_stated_is_rejected() -> None:
    # Near-miss for the model-aware test: lengths without the widening understate how often U hits.
    rng = np.random.default_rng(0)
    lengths, hits = np.full(400, 3e-4), rng.random((500, 400)) < 3e-4
    pivots = InversePivots(np.arange(400), np.zeros(400, np.uint32), np.zeros(400, np.uint32), 400, 0)
    honest = sum(interval_test(pivots, row, lengths).pvalue <= 0.05 for row in hits)
    narrow = sum(interval_test(pivots, row, lengths - 2 * TOLERANCE).pvalue <= 0.05 for row in hits)
    bound = stats.binom.ppf(1 - 1e-6, 500, 0.05)
    assert honest <= bound < narrow


def test_e_values_have_mean_one() -> None:
    # Of the sum: over all cells of one token. Of the others: over the two outcomes.
    middles = ((np.arange(256) + 0.5) * 2**24).astype(np.uint32)
    log_densities = inverse_transform._log_densities()
    assert np.exp(log_densities).mean(axis=(1, 2)) == pytest.approx(np.ones(len(log_densities)), abs=1e-12)
    one = [
        inverse_transform._scores(middles[a : a + 1], middles[b : b + 1])[1] for a in range(0, 256, 5) for b in (0, 99)
    ]
    assert np.all(np.isfinite(one))
    pivots = InversePivots(np.array([0]), np.zeros(1, np.uint32), np.zeros(1, np.uint32), 1, 0)
    for length in (0.3, 1e-4, 1.0):
        lengths = np.array([length])
        for test in (interval_test, robust_test):
            hit, miss = (math.exp(test(pivots, np.array([h]), lengths).log_evalue) for h in (True, False))
            assert length * hit + (1 - length) * miss == pytest.approx(1.0, rel=1e-9)


def test_batch_equals_single_bit_for_bit(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    lengths = [0, 1, 4, 5, 17, 400, 3]
    documents = [zipf_ids(n, n) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    batch = documents_test(np.concatenate(documents), offsets, words(1), CONFIG)
    for i, document in enumerate(documents):
        single = test_ids(document, 0, words(1), CONFIG, test="auto", model=None)
        for name in ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped"):
            assert getattr(batch, name)[i] == getattr(single, name), name


def test_tokens_beyond_the_model_say_nothing() -> None:
    ids, laws = marked_text(20, 0.05, seed=3)
    found = observe(ids, words(1), CONFIG, prompt_length=4)
    view = ModelView(lambda: np.zeros(20), lambda: iter([(0, laws[:, :1])]))
    hits, lengths = intervals(ids, 4, words(1), CONFIG, found, view)
    beyond = ids[4 + found.positions] >= 1
    assert hits[beyond].all()
    assert np.all(lengths[beyond] == 1.0)
    empty = test_ids(ids[:4], 4, words(1), CONFIG, test="auto", model=view)
    assert empty.pvalue == empty.evalue == 1.0


def test_token_tails_never_understate(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    tails = token_log_tails(np.arange(5000, dtype=np.uint32), words(9), CONFIG)
    assert np.isnan(tails[:4]).all()
    p = np.exp(tails[4:])
    for level in (0.5, 0.1, 0.01):
        assert np.sum(p <= level) <= stats.binom.ppf(1 - 1e-6, len(p), level)
    assert p.min() < 2e-3


@pytest.mark.parametrize("concentration", [0.01, 0.03])
def test_the_odds_of_the_sum_suit_texts_of_low_entropy(concentration: float) -> None:
    # Chernoff's exponent of the score, over odds: 6 is within a tenth of the best, also where a text has 0.3 nats a
    # token less or more.
    rng, n = np.random.default_rng(0), 3000
    u, w, v = rng.random(n), np.empty(n), rng.random((n, V))
    for i, law in enumerate(rng.dirichlet(np.full(V, concentration), n)):
        order = np.argsort(v[i])
        w[i] = v[i, order[np.searchsorted(np.cumsum(law[order]), u[i] * law.sum())]]
    exponents = {}
    for odds in (1.5, 3.0, inverse_transform._ODDS, 12.0, 100.0):
        null = np.log(inverse_transform._density(odds))
        marked = null[(u * 256).astype(int), (w * 256).astype(int)].mean()
        exponents[odds] = max(r * marked - math.log(np.mean(np.exp(r * null))) for r in np.linspace(0.1, 4, 40))
    assert exponents[inverse_transform._ODDS] > 0.9 * max(exponents.values())
    assert min(exponents.values()) < 0.85 * max(exponents.values())


@pytest.mark.slow
def test_a_text_of_the_bundled_model_hits_every_interval() -> None:
    # Generated token by token with a cache, tested in one pass of the whole text: what rounding really moves. No rule
    # that the test does not know, such as a least length: it would move the intervals by the end token's probability.
    import torch

    from assay.detection.inputs import model_view_of
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model
    from assay.watermark import for_transformers
    from assay.watermark.keys import SecretKey, use_key

    key, model = SecretKey(bytes(32), id="whole", config=CONFIG), load_model()
    prompt, decoding = torch.tensor([[20, 300, 7, 41, 530]]), {"temperature": 0.7, "top_p": 0.95}
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 100, **decoding}
    out = model.generate(prompt, watermarking_config=for_transformers(key, seed=1), **options)
    ids = out[0].numpy().astype(np.uint32)
    view = model_view_of(ModelScorer(model), ids[5:], ids[:5], {"top_k": None, "min_p": None, **decoding})
    found = observe(ids, use_key(key), CONFIG, prompt_length=5)
    hits, lengths = intervals(ids, 5, use_key(key), CONFIG, found, view)
    assert hits.all()
    assert interval_test(found, hits, lengths).log_pvalue < 0.97 * np.log(lengths).sum() < -20
