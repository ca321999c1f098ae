"""score_tokens and score_logits against float64 definitions written here, on odd shapes, edges and ties."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scipy.special import log_softmax, logsumexp  # noqa: E402 - after the skip

from assay.kernels.scoring import running, statistics_numba  # noqa: E402
from assay.kernels.scoring.decoding import Decoding  # noqa: E402
from assay.kernels.scoring.head import Head, Projection, blocks  # noqa: E402
from assay.kernels.scoring.statistics import DEFAULT_TILTS  # noqa: E402
from assay.kernels.scoring.tokens import score_logits, score_tokens  # noqa: E402

FIELDS = ("log_prob", "entropy", "varentropy", "third_moment", "max_log_prob", "tilted_log_sums", "cross_entropy")
# Largest absolute errors allowed at logits of standard deviation 3. FROM_LOGITS is the error of the sums alone, on
# logits of any type. FROM_HIDDEN adds that of a float32 product of D <= 96 terms (about 3e-6 per logit, whatever the
# type of the weights), which a moment of order k multiplies by about k (log V)^(k - 1).
FROM_LOGITS = {
    "log_prob": 2e-6,
    "entropy": 2e-6,
    "varentropy": 5e-6,
    "third_moment": 4e-5,
    "max_log_prob": 2e-6,
    "tilted_log_sums": 4e-6,
    "cross_entropy": 1e-5,
}
FROM_HIDDEN = {
    "log_prob": 1e-5,
    "entropy": 1e-5,
    "varentropy": 4e-5,
    "third_moment": 3e-4,
    "max_log_prob": 1e-5,
    "tilted_log_sums": 2e-5,
    "cross_entropy": 2e-5,
}


def oracle(logits, targets, tilts=DEFAULT_TILTS, other=None):
    """The definitions in float64, each from p itself; the third moment by its definition, not from raw sums."""
    logits = np.asarray(logits, dtype=np.float64)
    rows = np.arange(len(logits))
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    surprisal = np.where(p > 0, -log_p, 0.0)
    entropy = (p * surprisal).sum(1)
    chosen = logits[rows, targets][:, None]
    out = {
        "log_prob": log_p[rows, targets],
        "entropy": entropy,
        "varentropy": (p * (surprisal - entropy[:, None]) ** 2).sum(1),
        "third_moment": (p * (surprisal - entropy[:, None]) ** 3).sum(1),
        "max_log_prob": log_p.max(1),
        "tilted_log_sums": np.stack([logsumexp((1 - s) * log_p, axis=1) for s in tilts], axis=1),
        "rank": 1 + (logits > chosen).sum(1),
        "ties": (logits == chosen).sum(1) - 1,
    }
    if other is not None:
        log_q = log_softmax(np.asarray(other, dtype=np.float64), axis=1)
        with np.errstate(invalid="ignore"):
            out["cross_entropy"] = np.where(p > 0, -p * log_q, 0.0).sum(1)
    return out


def assert_matches(found, expected, tolerance=FROM_LOGITS, scale=1.0):
    np.testing.assert_array_equal(found.rank, expected["rank"])
    np.testing.assert_array_equal(found.ties, expected["ties"])
    assert found.scored.all()
    for name in FIELDS:
        if name in expected:
            np.testing.assert_allclose(
                getattr(found, name), expected[name], rtol=1e-6, atol=scale * tolerance[name], err_msg=name
            )


def random_logits(seed, rows, vocabulary, spread=3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, vocabulary)) * spread).astype(np.float32)
    return torch.from_numpy(logits), torch.from_numpy(rng.integers(0, vocabulary, rows))


SHAPES = [(1, 1), (1, 2), (3, 5), (17, 97), (5, 2047), (4, 2048), (3, 2049), (2, 5001), (1, 50257), (200, 33)]


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tilts", [DEFAULT_TILTS, (0.9, -2.0, 0.0), ()])
def test_score_logits_matches_definitions(backend, shape, tilts):
    logits, targets = random_logits(1, *shape)
    other, _ = random_logits(2, *shape)
    found = score_logits(logits, targets, tilts=tilts, other_logits=other, backend=backend)
    expected = (
        oracle(logits, targets.numpy(), tilts, other) if tilts else oracle(logits, targets.numpy(), (0.0,), other)
    )
    if not tilts:
        expected.pop("tilted_log_sums")
        assert found.tilted_log_sums.shape == (shape[0], 0)
    assert_matches(found, expected)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 5), (3, 33, 17), (20, 64, 2049), (50, 96, 5000)])
def test_score_tokens_matches_definitions(backend, dtype, rows, width, vocabulary):
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = draw(rows, width).to(dtype), (3 * draw(vocabulary, width) / width**0.5).to(dtype)
    hidden2, weight2 = draw(rows, 2 * width).to(dtype), (draw(vocabulary, 2 * width) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    found = score_tokens(hidden, weight, targets, other=(hidden2, Head(weight=weight2)), backend=backend)
    logits = hidden.double() @ weight.double().T
    expected = oracle(logits, targets.numpy(), other=hidden2.double() @ weight2.double().T)
    # Ranks of float64 logits may differ from ranks of float32 logits where two lie within rounding: not on this seed.
    assert_matches(found, expected, FROM_HIDDEN)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_logits_in_the_type_of_the_weights(backend):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    weight = (torch.randn(3001, 64, generator=generator) * 0.4).bfloat16()
    targets = torch.randint(0, 3001, (40,), generator=generator)
    found = score_tokens(hidden, weight, targets, logits_dtype=torch.bfloat16, backend=backend)
    # The very logits a bfloat16 model samples from, ties included.
    logits = (hidden @ weight.T).float()
    assert_matches(found, oracle(logits, targets.numpy()))
    assert found.ties.max() > 0


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("parts", ["bias", "scale", "soft_cap", "all"])
def test_head_with_bias_scale_and_soft_cap(backend, parts):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(21, 32, generator=generator), torch.randn(2100, 32, generator=generator)
    bias = torch.randn(2100, generator=generator)
    targets = torch.randint(0, 2100, (21,), generator=generator)
    head = Head(
        weight=weight,
        bias=bias if parts in ("bias", "all") else None,
        scale=0.25 if parts in ("scale", "all") else 1.0,
        soft_cap=7.0 if parts in ("soft_cap", "all") else None,
    )
    logits = hidden.double() @ weight.double().T
    if head.bias is not None:
        logits = logits + bias.double()
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = 7.0 * torch.tanh(logits / 7.0)
    assert_matches(
        score_tokens(hidden, head, targets, backend=backend), oracle(logits, targets.numpy()), FROM_HIDDEN, 4
    )


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_ranks_count_strictly_larger_and_name_ties(backend):
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0]]).repeat(6, 1)
    found = score_logits(logits, torch.arange(6), backend=backend)
    np.testing.assert_array_equal(found.rank, [1, 2, 2, 2, 5, 6])
    np.testing.assert_array_equal(found.ties, [0, 2, 2, 2, 0, 0])


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_duplicate_weight_rows_tie_exactly_across_blocks(backend):
    # The same weight row in three blocks of candidates: the product must give each the same bits, and every rank must
    # see the other two as ties, not as larger.
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(70, 48, generator=generator), torch.randn(4500, 48, generator=generator)
    weight[2100] = weight[4499] = weight[7]
    for target in (7, 2100, 4499):
        found = score_tokens(hidden, weight, torch.full((70,), target), backend=backend)
        assert (found.ties == 2).all()
        logits = (hidden.double() @ weight.double().T).numpy()
        np.testing.assert_array_equal(found.rank, 1 + (logits > logits[:, [7]]).sum(1))


def test_ranks_are_counted_again_where_the_early_product_has_other_bits(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(30, 16, generator=generator), torch.randn(2500, 16, generator=generator)
    targets = torch.randint(0, 2500, (30,), generator=generator)
    expected = score_tokens(hidden, weight, targets)
    right = Projection.chosen
    monkeypatch.setattr(Projection, "chosen", lambda self, t: right(self, t) + 0.05 * (torch.arange(len(t)) % 2))
    found = score_tokens(hidden, weight, targets)
    for name in ("rank", "ties", "log_prob"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_forbidden_candidates(backend):
    logits, targets = random_logits(4, 6, 5000)
    logits[:, :2500] = -torch.inf  # a whole block of candidates
    logits[0, 1:] = -torch.inf
    logits[0, 0] = 3.0
    targets[0], targets[1], targets[2] = 0, 17, 3000
    found = score_logits(logits, targets, backend=backend)
    assert found.log_prob[0] == found.entropy[0] == found.varentropy[0] == found.max_log_prob[0] == 0.0
    np.testing.assert_allclose(found.tilted_log_sums[0], 0.0, atol=1e-12)
    assert found.log_prob[1] == -np.inf
    assert (found.rank[1], found.ties[1]) == (2501, 2499)
    assert_matches(found.rows(slice(2, None)), oracle(logits[2:], targets[2:].numpy()))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_cross_entropy_is_infinite_where_the_second_model_forbids(backend):
    logits, targets = random_logits(4, 3, 2500)
    other, _ = random_logits(5, 3, 2500)
    other[1, 2400] = -torch.inf
    logits[2, :2100] = -torch.inf
    other[2, :2100] = -torch.inf
    found = score_logits(logits, targets, other_logits=other, backend=backend).cross_entropy
    assert np.isfinite(found[[0, 2]]).all()
    assert found[1] == np.inf
    expected = oracle(logits[2:, 2100:], [0], other=other[2:, 2100:])["cross_entropy"]
    np.testing.assert_allclose(found[2], expected[0], atol=5e-5)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_huge_logits(backend, size):
    logits, targets = random_logits(8, 5, 3000, spread=1.0)
    logits *= size
    found = score_logits(logits, targets, backend=backend)
    expected = oracle(logits, targets.numpy())
    np.testing.assert_array_equal(found.rank, expected["rank"])
    np.testing.assert_allclose(found.log_prob, expected["log_prob"], rtol=1e-6)
    for name in ("entropy", "varentropy", "max_log_prob"):
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=1e-4)
    assert np.isfinite(found.third_moment).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_rising_logits_keep_their_digits(backend):
    # Every block outweighs all before it, and the first blocks are 40 nats below the last: raw moments around an early
    # centre would lose the third moment here.
    logits = torch.linspace(-40, 0, 20_000)[None].repeat(2, 1)
    logits[1] = logits[1].flip(0)
    found = score_logits(logits, torch.tensor([3, 3]), backend=backend)
    assert_matches(found, oracle(logits, [3, 3]))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 2047, 2048, 4999])
def test_bad_logits_are_refused_by_row(backend, bad, place):
    logits, targets = random_logits(9, 4, 5000)
    logits[2, place] = np.copysign(bad, -1.0) if np.isnan(bad) and place else bad
    with pytest.raises(ValueError, match=r"row 2 holds NaN or \+inf \(1 of 4 rows\)"):
        score_logits(logits, targets, backend=backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan])
def test_nan_among_forbidden_candidates_is_refused(backend, bad):
    # A block that holds nothing else than -inf is passed over; a NaN in it must not be.
    logits, targets = random_logits(9, 2, 5000)
    logits[1, 2048:4096] = -torch.inf
    logits[1, 3000] = bad
    with pytest.raises(ValueError, match=r"row 1 holds NaN or \+inf"):
        score_logits(logits, targets, backend=backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_rows_without_a_candidate_are_refused(backend):
    logits, targets = random_logits(9, 2, 2100)
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match="row 1 holds only -inf"):
        score_logits(logits, targets, backend=backend)


def test_bad_arguments_are_refused():
    logits, targets = random_logits(9, 2, 10)
    cases = [
        ({"logits": logits[0]}, "logits must be floating"),
        ({"logits": logits[:, :0]}, "logits must be floating"),
        ({"targets": targets[:1]}, "targets must be integers of shape"),
        ({"targets": targets.float()}, "targets must be integers"),
        ({"targets": torch.tensor([0, 10])}, r"targets must be ids in \[0, 10\)"),
        ({"targets": torch.tensor([-1, 0])}, r"targets must be ids in \[0, 10\)"),
        ({"tilts": (1.0,)}, "tilts must be finite and below 1"),
        ({"other_logits": logits[:, :5]}, "other_logits must have shape"),
        ({"backend": "fast"}, "backend must be"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            score_logits(**{"logits": logits, "targets": targets, **change})
    with pytest.raises(ValueError, match=r"head.weight must have shape \(V, 10\)"):
        score_tokens(logits, torch.zeros(4, 9), targets)
    with pytest.raises(ValueError, match="must share their vocabulary"):
        score_tokens(logits, torch.zeros(4, 10), targets % 4, other=(logits, Head(weight=torch.zeros(5, 10))))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("rule", [Decoding(), Decoding(top_k=3), Decoding(top_p=0.9), Decoding(min_p=0.1)])
def test_no_rows(backend, rule):
    weight, none = torch.zeros(70, 4), torch.zeros(0, dtype=torch.int64)
    found = score_tokens(torch.zeros(0, 4), weight, none, decoding=rule, backend=backend)
    assert len(found) == 0
    assert found.tilted_log_sums.shape == (0, len(DEFAULT_TILTS))
    assert len(score_logits(torch.zeros(0, 70), none, decoding=rule, backend=backend)) == 0


@pytest.mark.parametrize("rule", [Decoding(top_k=20, top_p=0.9), Decoding(top_p=0.9), Decoding(min_p=0.05)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_under_a_truncating_rule_does_not_depend_on_its_batch_bit_for_bit(rule, dtype):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(90, 96, generator=generator).to(dtype)
    weight = (torch.randn(4101, 96, generator=generator) / 4).to(dtype)
    targets = torch.randint(0, 4101, (90,), generator=generator)
    for logits_dtype in {torch.float32, dtype}:
        whole = score_tokens(hidden, weight, targets, decoding=rule, logits_dtype=logits_dtype)
        for rows in (slice(0, 1), slice(7, 40), slice(89, 90)):
            part = score_tokens(hidden[rows], weight, targets[rows], decoding=rule, logits_dtype=logits_dtype)
            for name, value in part._columns().items():
                np.testing.assert_array_equal(value, whole._columns()[name][rows], err_msg=f"{name} {rows}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "vocabulary", "threads"), [(768, 4101, 2), (96, 2040, 1), (33, 7, 1), (256, 2048, 1)]
)
def test_a_row_does_not_depend_on_its_batch_bit_for_bit(dtype, width, vocabulary, threads):
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(1100, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (1100,), generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for logits_dtype in {torch.float32, dtype}:
            whole = score_tokens(hidden, weight, targets, logits_dtype=logits_dtype)
            for rows in (slice(0, 1), slice(3, 5), slice(10, 27), slice(1000, 1040), slice(1099, 1100), slice(5, 300)):
                part = score_tokens(hidden[rows], weight, targets[rows], logits_dtype=logits_dtype)
                for name, value in part._columns().items():
                    np.testing.assert_array_equal(value, whole._columns()[name][rows], err_msg=f"{name} {rows}")
    finally:
        torch.set_num_threads(before)


def test_early_products_have_the_bits_of_the_pass():
    # Not needed for exact ranks (they would be counted again) but for their cost: one pass, not two.
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(100, 64, generator=generator), torch.randn(5000, 64, generator=generator)
    targets = torch.randint(0, 5000, (100,), generator=generator)
    projection = Projection(hidden, Head(weight=weight), torch.float32)
    early = projection.chosen(targets)
    for block in blocks(5000):
        logits = projection.logits(block)
        inside = (targets >= block.start) & (targets < block.stop)
        met = logits.gather(1, (targets - block.start).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        assert torch.equal(met[inside], early[inside])


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 2048, 2049, 2063, 2064, 50257])
def test_blocks_cover_the_vocabulary_once(vocabulary):
    found = list(blocks(vocabulary))
    assert [c for b in found for c in range(b.start, b.stop)] == list(range(vocabulary))
    assert len(found) == 1 or min(b.stop - b.start for b in found) >= 16


def test_threads_do_not_change_the_result():
    logits, targets = random_logits(2, 300, 3000)
    chosen = logits.gather(1, targets[:, None])[:, 0].numpy()
    states = []
    for threads in (1, 3):
        sums = running.start(targets.numpy(), chosen, np.array(DEFAULT_TILTS))
        statistics_numba.update(sums, slice(0, 300), logits.numpy(), slice(0, 3000), 0, None, threads)
        states.append(sums)
    np.testing.assert_array_equal(states[0].state, states[1].state)
    np.testing.assert_array_equal(states[0].greater, states[1].greater)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_temperature_is_division_of_the_logits(backend):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 32, generator=generator), torch.randn(2100, 32, generator=generator)
    targets = torch.randint(0, 2100, (9,), generator=generator)
    found = score_tokens(hidden, weight, targets, decoding=Decoding(temperature=2.5), backend=backend)
    assert_matches(found, oracle(hidden.double() @ weight.double().T / 2.5, targets.numpy()), FROM_HIDDEN)


def test_tilted_sums_are_the_cumulant_generating_function():
    # exp(s S - tilted) has mean 1 under p: the property every tilt e-process stands on.
    logits, targets = random_logits(11, 4, 700)
    found = score_logits(logits, targets)
    log_p = log_softmax(logits.numpy().astype(np.float64), axis=1)
    for k, s in enumerate(DEFAULT_TILTS):
        means = np.exp(log_p - s * log_p - found.tilted_log_sums[:, [k]]).sum(1)
        np.testing.assert_allclose(means, 1.0, atol=1e-5)


def test_narrower_sums_would_be_noticed():
    # The near miss: float16 sums, or a third moment taken about the largest logit, miss the tolerance by far.
    logits, targets = random_logits(12, 3, 50257)
    expected = oracle(logits, targets.numpy())
    rough = oracle(logits.half(), targets.numpy())
    assert np.abs(rough["log_prob"] - expected["log_prob"]).max() > 10 * FROM_HIDDEN["log_prob"]
    raw = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True), dtype=np.float32)
    d = (logits.numpy() - logits.numpy().max(1, keepdims=True)).astype(np.float16).astype(np.float32)
    mass, m1 = raw.sum(1), (raw * d).sum(1)
    m2, m3 = (raw * d * d).sum(1), (raw * d**3).sum(1)
    third = -(m3 / mass - 3 * m1 * m2 / mass**2 + 2 * (m1 / mass) ** 3)
    assert np.abs(third - expected["third_moment"]).max() > 5 * FROM_LOGITS["third_moment"]
