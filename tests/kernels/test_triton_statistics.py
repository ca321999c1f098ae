"""The Triton row statistics against float64 definitions. Runs on a GPU, or in Triton's interpreter
(TRITON_INTERPRET=1), which `test_triton_interpreter.py` starts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the package triton is not installed")

from scipy.special import log_softmax, logsumexp  # noqa: E402 - after the skips

from assay.kernels import triton_sampling  # noqa: E402
from assay.kernels.scoring.decoding import Decoding  # noqa: E402
from assay.kernels.scoring.head import Head  # noqa: E402
from assay.kernels.scoring.statistics import DEFAULT_TILTS  # noqa: E402
from assay.kernels.scoring.tokens import score_logits, score_tokens  # noqa: E402

DEVICE = "cpu" if triton_sampling.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (triton_sampling.INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU, or TRITON_INTERPRET=1 before Python starts",
)
# Largest absolute error at logits of standard deviation 3; the card's exponential is good to about 2 units.
TOLERANCE = {"log_prob": 4e-6, "entropy": 4e-6, "varentropy": 2e-5, "third_moment": 2e-4, "max_log_prob": 4e-6}


def draw(seed, rows, vocabulary, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def score(logits, targets, **options):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return score_logits(logits.to(DEVICE), targets.to(DEVICE), backend="triton", **options)


def assert_matches(found, logits, targets, tilts=DEFAULT_TILTS, other=None, scale=1.0):
    z, rows = logits.double().numpy(), np.arange(len(logits))
    log_p = log_softmax(z, axis=1)
    p = np.exp(log_p)
    surprisal = np.where(p > 0, -log_p, 0.0)
    entropy = (p * surprisal).sum(1)
    deviation = surprisal - entropy[:, None]
    expected = {
        "log_prob": log_p[rows, targets],
        "entropy": entropy,
        "varentropy": (p * deviation**2).sum(1),
        "third_moment": (p * deviation**3).sum(1),
        "max_log_prob": log_p.max(1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, atol=scale * TOLERANCE[name], err_msg=name)
    chosen = z[rows, targets][:, None]
    np.testing.assert_array_equal(found.rank, 1 + (z > chosen).sum(1))
    np.testing.assert_array_equal(found.ties, (z == chosen).sum(1) - 1)
    for k, s in enumerate(tilts):
        np.testing.assert_allclose(
            found.tilted_log_sums[:, k], logsumexp((1 - s) * log_p, axis=1), rtol=1e-6, atol=8e-6
        )
    if other is not None:
        log_q = log_softmax(other.double().numpy(), axis=1)
        with np.errstate(invalid="ignore"):
            cross = np.where(p > 0, -p * log_q, 0.0).sum(1)
        np.testing.assert_allclose(found.cross_entropy, cross, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 2048), (3, 2049), (2, 5001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_definitions(shape, dtype):
    logits, targets = draw(1, *shape)
    other, _ = draw(2, *shape)
    logits, other = logits.to(dtype), other.to(dtype)
    assert_matches(score(logits, targets, other_logits=other), logits, targets, other=other)


def test_other_tilts_and_temperature():
    logits, targets = draw(3, 2, 3000)
    tilts = (0.9, -2.0, 0.0)
    found = score(logits, targets, tilts=tilts, decoding=Decoding(temperature=0.5))
    assert_matches(found, logits / 0.5, targets, tilts)
    assert score(logits, targets, tilts=()).tilted_log_sums.shape == (2, 0)


def test_truncated_rules():
    logits, targets = draw(4, 3, 3000)
    rule = Decoding(top_k=40, top_p=0.9)
    found = score(logits, targets, decoding=rule)
    expected = score_logits(logits, targets, decoding=rule, backend="torch")
    for name in ("log_prob", "entropy", "varentropy", "tilted_log_sums"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5)
    np.testing.assert_array_equal(found.rank, expected.rank)


def test_rising_and_huge_logits():
    logits = torch.linspace(-40, 0, 9000)[None].repeat(3, 1)
    logits[1] = logits[1].flip(0)
    logits[2] = 1e4 * torch.sin(torch.arange(9000.0))
    assert_matches(score(logits, torch.tensor([3, 3, 3])), logits, np.array([3, 3, 3]))


def test_forbidden_candidates():
    logits, targets = draw(5, 3, 4100)
    other, _ = draw(6, 3, 4100)
    logits[0, :4096] = -torch.inf
    targets[0] = 4097
    logits[1, 100:] = -torch.inf
    targets[1] = 7
    targets[2] = 11
    logits[2, 11] = -torch.inf
    other[1, 200:] = -torch.inf
    other[0, :2100] = -torch.inf
    found = score(logits, targets, other_logits=other)
    assert found.log_prob[2] == -np.inf
    assert_matches(found, logits, targets, other=other)
    other[2, 3000] = -torch.inf
    assert score(logits, targets, other_logits=other).cross_entropy[2] == np.inf


@pytest.mark.parametrize(("bad", "place"), [(np.nan, 0), (np.nan, 4000), (np.inf, 2048)])
def test_bad_logits_are_refused(bad, place):
    logits, targets = draw(7, 3, 4001)
    logits[1, place] = bad
    with pytest.raises(ValueError, match=r"row 1 holds NaN or \+inf"):
        score(logits, targets)
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match="row 1 holds only -inf"):
        score(logits, targets)


def test_a_row_does_not_depend_on_its_batch():
    logits, targets = draw(8, 5, 2500)
    whole = score(logits, targets)
    for row in (0, 3):
        alone = score(logits[row : row + 1], targets[row : row + 1])
        for name, value in alone._columns().items():
            np.testing.assert_array_equal(value[0], whole._columns()[name][row], err_msg=name)


def test_score_tokens():
    generator = torch.Generator().manual_seed(9)
    hidden, weight = torch.randn(20, 32, generator=generator), torch.randn(2100, 32, generator=generator) / 2
    targets = torch.randint(0, 2100, (20,), generator=generator)
    found = score_tokens(hidden.to(DEVICE), Head(weight=weight.to(DEVICE)), targets.to(DEVICE), backend="triton")
    assert_matches(found, hidden.double() @ weight.double().T, targets, scale=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_s_row_hardly_depends_on_its_batch(dtype):
    # A card's BLAS may choose another kernel, and so another order of the sum over D, for another number of rows. With
    # float32 sums of 768 terms and logits of standard deviation 3 a log-probability moves by less than 1e-4. The near
    # miss: logits rounded to bfloat16 move it by more.
    rows, vocabulary = (300, 5000) if DEVICE == "cuda" else (9, 300)
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(rows, 768, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocabulary, 768, generator=generator) * 3 / 768**0.5).to(DEVICE, dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
    whole = score_tokens(hidden, weight, targets, backend="triton").log_prob
    for some in (1, 7):
        alone = score_tokens(hidden[:some], weight, targets[:some], backend="triton").log_prob
        np.testing.assert_allclose(alone, whole[:some], atol=1e-4, rtol=0)
    rounded = score_logits((hidden.float() @ weight.float().T).bfloat16(), targets, backend="triton").log_prob
    assert abs(rounded - whole).max() > 1e-3
