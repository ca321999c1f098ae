"""The fused sampler against the numpy words and the float64 race. Runs on a GPU, or in Triton's interpreter
(TRITON_INTERPRET=1), which `test_triton_interpreter.py` starts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the package triton is not installed")

from assay.kernels import chacha, triton_chacha, triton_sampling  # noqa: E402 - after the skips
from assay.kernels.prf import race_times  # noqa: E402

DEVICE = "cpu" if triton_sampling.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (triton_sampling.INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU, or TRITON_INTERPRET=1 before Python starts",
)

KEY = np.arange(8, dtype=np.uint32) * np.uint32(0x01234567) + np.uint32(0x80000001)


def contexts(rows, width, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32 - 1, (rows, width)).astype(np.uint32)


def as_words(tensor):
    return tensor.cpu().numpy().view(np.uint32)


@pytest.mark.parametrize(("rows", "width"), [(33, 1), (5, 4), (3, 9)])
def test_subkeys_equal_the_reference(rows, width):
    found = triton_chacha.subkeys(KEY, contexts(rows, width), DEVICE)
    np.testing.assert_array_equal(as_words(found), chacha.subkeys(KEY, contexts(rows, width)))


def test_known_answer():
    # The scheme's vectors: use key bytes 00..1f, context (1, 2, 3, 4), stream 0, aux 0; equal to OpenSSL's XChaCha20.
    key = np.frombuffer(bytes(range(32)), dtype="<u4").astype(np.uint32)
    keys = triton_chacha.subkeys(key, np.array([[1, 2, 3, 4]], dtype=np.uint32), DEVICE)
    logits = torch.zeros(1, 128256, device=DEVICE)
    _, words = triton_sampling.winners_and_words(keys, logits, blocks=8192 if DEVICE == "cpu" else 128)
    chosen = as_words(words)[0, [0, 1, 15, 16, 50256, 128255]]
    np.testing.assert_array_equal(chosen, [0xADF9F64B, 0x499805C3, 0x6E2B5218, 0xFE04786B, 0x5EC78DF5, 0x71CF05EC])


@pytest.mark.parametrize("vocabulary", [1, 17, 5003])
def test_words_and_winners_equal_the_race(vocabulary):
    rows = 3
    before = contexts(rows, 4, seed=vocabulary)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    if vocabulary > 2:
        logits[1, : vocabulary // 2] = -torch.inf
        logits[2] = -torch.inf
        logits[2, vocabulary - 1] = 0.0
    keys = triton_chacha.subkeys(KEY, before, DEVICE)
    found, words = triton_sampling.winners_and_words(keys, logits.to(DEVICE), blocks=256)
    expected = chacha.expand(KEY, before, vocabulary)
    np.testing.assert_array_equal(as_words(words), expected)
    scores = logits.numpy().astype(np.float64) - np.log(race_times(expected))
    best = np.argmax(scores, axis=1)
    differ = found.cpu().numpy() != best
    # Only where two candidates are closer than float32 can tell may the card choose otherwise; not on these seeds on a
    # CPU. A word order or a key that is off picks another candidate in nearly every row.
    gap = scores.max(1) - scores[np.arange(rows), found.cpu().numpy()]
    assert (gap < 1e-5).all()
    assert not differ.any() or DEVICE == "cuda"


def test_tiles_do_not_change_the_winner():
    keys = triton_chacha.subkeys(KEY, contexts(2, 2), DEVICE)
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[1] = 0.0
    first = triton_sampling.winners(keys, logits, blocks=64)
    assert torch.equal(triton_sampling.winners(keys, logits, blocks=32), first)


def test_small_race_times_keep_their_digits():
    # Below r = 2**-6 the series must agree with log1p to float32; the words of 2**15 candidates reach 2**-15.
    keys = triton_chacha.subkeys(KEY, contexts(1, 4), DEVICE)
    logits = torch.zeros(1, 1 << 15, device=DEVICE)
    found, words = triton_sampling.winners_and_words(keys, logits, blocks=2048 if DEVICE == "cpu" else 128)
    times = race_times(as_words(words))
    np.testing.assert_array_equal(found.cpu().numpy(), times.argmin(1))
    assert times.min() < 2.0**-13


def truncated(seed, rows, vocabulary, kept):
    """Logits of which each is kept with the given probability."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits[torch.rand(rows, vocabulary, generator=generator) > kept] = -torch.inf
    logits[torch.arange(rows), torch.randint(0, vocabulary, (rows,), generator=generator)] = 1.0
    return logits


@pytest.mark.parametrize(
    ("vocabulary", "blocks", "kept"), [(1, 1, 0.0), (17, 1, 0.5), (5003, 8, 0.01), (5003, 64, 0.0), (5003, 64, 0.03)]
)
def test_survivors_alone_are_given_words_and_race_as_if_all_were(vocabulary, blocks, kept):
    rows = 2
    logits = truncated(vocabulary + blocks, rows, vocabulary, kept)
    keys = triton_chacha.subkeys(KEY, contexts(rows, 4), DEVICE)
    found, words = triton_sampling.winners_and_words(keys, logits.to(DEVICE), truncated=True, blocks=blocks)
    expected, left = chacha.expand(KEY, contexts(rows, 4), vocabulary), torch.isfinite(logits).numpy()
    if vocabulary > 17:
        assert left.sum() <= 0.04 * left.size  # few in every tile, so none is raced whole
    np.testing.assert_array_equal(as_words(words)[left], expected[left])
    if vocabulary > 17:
        assert not as_words(words)[~left].any()
    scores = logits.numpy().astype(np.float64) - np.log(race_times(expected))
    np.testing.assert_array_equal(found.cpu().numpy(), scores.argmax(1))


def test_a_tile_with_many_survivors_is_raced_whole():
    # Tiles of 512 candidates: of the first all survive, of the second exactly the 32 that may be listed, of the third
    # one more, of the fourth none. The winner stands in another one in each row.
    logits = torch.full((3, 2048), -torch.inf)
    logits[:, :512] = 0.0
    logits[:, 512:1024:16] = 0.0
    logits[:, [*range(1024, 1536, 16), 1535]] = 0.0
    for row, place in enumerate((100, 512 + 160, 1024 + 320)):
        logits[row, place] = 40.0
    keys = triton_chacha.subkeys(KEY, contexts(3, 4), DEVICE)
    found, words = triton_sampling.winners_and_words(keys, logits.to(DEVICE), truncated=True, blocks=32)
    assert found.tolist() == [100, 512 + 160, 1024 + 320]
    computed = as_words(words) != 0  # no word of these keys is 0
    np.testing.assert_array_equal(computed.reshape(3, 4, 512).sum(2), [[512, 32, 512, 0]] * 3)


@pytest.mark.parametrize("few", [False, True])
def test_ties_go_to_the_lowest_id(few):
    # Equal words are found at V = 200,000 by the birthday paradox (about five pairs); equal logits then tie exactly,
    # within a tile or across tiles.
    expanded = chacha.expand(KEY, contexts(1, 4), 200_000)[0]
    order = np.argsort(expanded, kind="stable")
    (equal,) = np.nonzero(np.diff(expanded[order]) == 0)
    assert len(equal) > 0
    low, high = sorted(order[equal[0] : equal[0] + 2].tolist())
    logits = torch.full((1, 200_000), -torch.inf, device=DEVICE)
    logits[0, [low, high]] = 0.5
    keys = triton_chacha.subkeys(KEY, contexts(1, 4), DEVICE)
    blocks = 2048 if DEVICE == "cpu" else 128
    assert triton_sampling.winners(keys, logits, truncated=few, blocks=blocks).item() == low


@pytest.mark.parametrize("few", [False, True])
def test_rows_that_cannot_be_drawn_from_have_no_winner(few):
    logits = torch.full((5, 600), -torch.inf)
    logits[:, 300] = 0.0
    logits[1, 17], logits[2, 599], logits[3, 300] = torch.nan, torch.inf, -torch.inf
    keys = triton_chacha.subkeys(KEY, contexts(5, 4), DEVICE)
    found = triton_sampling.winners(keys, logits.to(DEVICE), truncated=few, blocks=64)
    assert found.tolist() == [300, -1, -1, -1, 300]


def test_bad_arguments_are_refused():
    keys = torch.zeros(2, 8, dtype=torch.int32)
    for bad_keys, bad_logits in [
        (keys, torch.zeros(3, 5)),
        (keys.long(), torch.zeros(2, 5)),
        (keys, torch.zeros(5, 2).T),
        (keys, torch.zeros(2)),
        (keys, torch.zeros(2, 0)),
    ]:
        for few in (False, True):
            with pytest.raises(ValueError, match="logits must be contiguous with shape"):
                triton_sampling.winners(bad_keys, bad_logits, truncated=few)


def test_no_rows():
    keys = triton_chacha.subkeys(KEY, contexts(0, 4), DEVICE)
    for few in (False, True):
        assert triton_sampling.winners(keys, torch.zeros(0, 10, device=DEVICE), truncated=few).shape == (0,)


@pytest.mark.skipif(DEVICE == "cpu", reason="4000 programs take an hour in the interpreter; exact winners are tested")
@pytest.mark.parametrize("few", [False, True])
def test_winners_have_the_law_of_the_softmax(few):
    # 4000 keys, 8 candidates: chi-square with 7 degrees of freedom, false alarm 1e-4 at 29.9; the seed is fixed.
    logits = torch.log(torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])).repeat(4000, 1)
    keys = torch.from_numpy(chacha.subkeys(KEY, contexts(4000, 4)).view(np.int32)).to(DEVICE)
    found = triton_sampling.winners(keys, logits.to(DEVICE), truncated=few, blocks=8 if few else 1)
    counts = np.bincount(found.cpu().numpy(), minlength=8)
    expected = 4000 * torch.softmax(logits[0], 0).numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 29.9
