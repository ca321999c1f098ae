"""vLLM and llama.cpp: the adapters against fakes that behave as the engines do, see `test_serving_engines.py`."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import BatchUpdate, LogitsProcessor, MoveDirectionality, SamplingParams

from assay._errors import GenerationError, KeyringError, MissingDependencyError, RevokedKeyError, UnknownKeyError
from assay.kernels.scoring.decoding import Decoding, warp
from assay.watermark.adapters import vllm as adapter
from assay.watermark.adapters.llama_cpp import for_llama_cpp, truncated
from assay.watermark.adapters.vllm import RequestRows
from assay.watermark.gumbel import GumbelConfig, pivots, unmarked_key
from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.profiles.hf_kgw import HfKgwConfig
from assay.watermark.profiles.hf_synthid import HfSynthIdConfig
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig, official_scores
from assay.watermark.schemes import sampler_of
from assay.watermark.signing import Ed25519Config

V = 64
CONFIGS = [GumbelConfig(), HfKgwConfig(vocab_size=V), HfSynthIdConfig(sampling_table_size=1024), VllmGumbelConfig()]


def key_of(config: Any) -> SecretKey:
    return SecretKey(bytes(range(32)), id="k", config=config)


# ---------------------------------------------------------------- vLLM


def update(
    added: Sequence[Any] = (), removed: Sequence[int] = (), moved: Sequence[Any] = (), size: int = 8
) -> BatchUpdate:
    return BatchUpdate(size, removed, added, moved)


def params_of(**settings: Any) -> SamplingParams:
    """A request whose unmarked draws are keyed, unless it says otherwise."""
    return SamplingParams(**({"seed": 1} | settings))


def logits_of(rows: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def serve(config: Any, prompt: list[int], n: int, params: SamplingParams, others: int = 0) -> list[int]:
    """One request's output, with requests of other lengths beside it that come, go and move its row."""
    requests = RequestRows(key_of(config))
    output: list[int] = []
    row, busy = others, list(range(others))
    aside = {index: ([7] * index, []) for index in busy}
    requests.update(update([(i, params_of(seed=i), *aside[i]) for i in busy] + [(row, params, prompt, output)]))
    for step in range(n):
        logits = logits_of(1, step).repeat(others + 1, 1)
        before = logits.clone()
        out = requests.apply(logits)
        tokens = out.argmax(1).tolist()
        for index in (*busy, row):
            one = out[index]
            assert (one == 0).sum() == 1
            assert (one == -torch.inf).sum() == V - 1
        output.append(tokens[row])
        for index in busy:
            aside[index][1].append(tokens[index])
        if others and step == n // 3:
            requests.update(update(moved=[(row, 0, MoveDirectionality.SWAP)]))
            aside[row] = aside.pop(0)
            busy = [index for index in range(others + 1) if index != 0]
            row = 0
        if others > 1 and step == n // 2:
            last = max(busy)
            requests.update(update(removed=[last]))
            busy.remove(last)
            assert torch.equal(requests.apply(before.clone())[last], before[last])  # an empty row is left alone
    return output


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.scheme)
def test_vllm_rows_follow_their_requests(config: Any) -> None:
    prompt = [3, 1, 4, 1, 5]
    alone = serve(config, prompt, 18, params_of(temperature=0.7))
    assert alone == serve(config, prompt, 18, params_of(temperature=0.7), others=3)
    # Oracle: the scheme's own sampler, token by token, on the tempered scores.
    draw = sampler_of(config, use_key(key_of(config)), unmarked_key(f"vllm 1 {prompt}".encode()))
    read = [] if getattr(config, "completion_only", False) else prompt
    history: list[int] = []
    for step in range(18):
        scores = (logits_of(1, step) / 0.7).numpy()
        history.append(int(draw(np.array([read + history], dtype=np.int64), scores, None)[0]))
    assert alone == history


def test_vllm_text_reads_as_vllms_own() -> None:
    config = VllmGumbelConfig()
    text = serve(config, [1, 2, 3], 40, params_of())
    n, score = official_scores(np.array(text, dtype=np.uint32), use_key(key_of(config)), config)
    assert n > 35
    assert score > 2 * n  # mean 1 without the mark: 6 standard deviations


def test_vllm_truncation_is_vllms() -> None:
    logits = [logits_of(1, step)[0].double().numpy() for step in range(6)]
    # Hardly any mass is left beside the likeliest token: whatever the key, it is drawn.
    for settings in ({"top_p": 1e-6}, {"min_p": 0.999999}, {"temperature": 1e-4}):
        text = serve(GumbelConfig(), [1, 2, 3, 4], 6, params_of(**settings))
        assert text == [int(row.argmax()) for row in logits], settings
    # A greedy engine with the rule beside it; of three candidates one is drawn, and not always the first.
    extra = {"assay_temperature": 4.0, "assay_top_k": 3}
    text = serve(GumbelConfig(), [1, 2, 3, 4], 6, params_of(temperature=0.0, extra_args=extra))
    ranks = [int((row > row[token]).sum()) for row, token in zip(logits, text, strict=True)]
    assert max(ranks) in (1, 2)


def test_vllm_updates_come_in_order_removed_added_moved() -> None:
    requests = RequestRows(key_of(GumbelConfig()))
    first, second = [1, 2, 3, 4], [9, 8, 7, 6]
    requests.update(update([(0, params_of(), first, []), (1, params_of(), second, [])]))
    expected = requests.apply(logits_of(1, 5).repeat(2, 1)).argmax(1).tolist()
    # Row 0 leaves and is taken at once by a third request; the second then moves over it, one way.
    requests.update(
        update([(0, params_of(), [5, 5, 5, 5], [])], removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])
    )
    logits = logits_of(1, 5).repeat(2, 1)
    out = requests.apply(logits.clone())
    assert int(out[0].argmax()) == expected[1]
    assert torch.equal(out[1], logits[1])
    requests.update(None)
    assert torch.equal(requests.apply(logits.clone())[0], out[0])
    for off in (False, 0):  # 0 is what HTTP requests say
        requests.update(update([(0, params_of(extra_args={"assay_watermark": off}), first, [])]))
        assert torch.equal(requests.apply(logits.clone()), logits)  # the newcomer opted out


def test_vllm_seeds() -> None:
    short = [1]  # no context yet: the first tokens are drawn from noise alone
    text = serve(GumbelConfig(), short, 3, params_of(seed=4))
    assert text == serve(GumbelConfig(), short, 3, params_of(seed=4))
    assert text == serve(GumbelConfig(), short, 3, params_of(seed=None, extra_args={"assay_seed": 4}))
    others = {tuple(serve(GumbelConfig(), short, 3, params_of(seed=None))) for _ in range(4)}
    assert len(others) > 1


def test_vllm_placeholders_are_refused() -> None:
    requests = RequestRows(key_of(GumbelConfig()))
    output = [5, -1]
    requests.update(update([(0, params_of(), [1, 2], output)]))
    with pytest.raises(GenerationError, match="async_scheduling=False"):
        requests.apply(logits_of(1, 0))
    output[1] = 6
    requests.apply(logits_of(1, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty must be 1 with a watermark"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": 1}, "top_k must be above 1 for a watermark, got 1: .* Or opt out"),
        ({"min_p": 1.0}, "min_p must be below 1 for a watermark, got 1"),
        ({"temperature": 0.0, "extra_args": {"assay_temperature": 1.0, "assay_top_k": 1}}, "top_k must be above 1"),
        ({"extra_args": {"assay_watermark": "no"}}, "assay_watermark must be true or false"),
        ({"extra_args": {"assay_watermark": 2}}, "assay_watermark must be true or false, got 2"),
        ({"extra_args": {"assay_seed": "7"}}, "assay_seed must be an integer"),
        ({"extra_args": {"assay_temperature": "hot"}}, "temperature must be above 0"),
    ],
)
def test_vllm_requests_that_cannot_be_marked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.decoding_of(params_of(**settings))


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("vllm.v1.sample.logits_processor")
    module.LogitsProcessor = LogitsProcessor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(
        vars(adapter), "WatermarkLogitsProcessor", raising=False
    )  # built on the real one, if that is here
    yield
    vars(adapter).pop("WatermarkLogitsProcessor", None)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keyring.json"
    keyring = Keyring.create(path, passphrase="open sesame", scrypt_n=2**10)
    keyring.add(key_of(GumbelConfig()))
    for name, value in (("ASSAY_KEYRING", str(path)), ("ASSAY_KEY_ID", "k"), ("ASSAY_PASSPHRASE", "open sesame")):
        monkeypatch.setenv(name, value)
    return path


def test_vllm_class_is_loaded_by_name(fake_vllm: None, environment: Path, tmp_path: Path, monkeypatch: Any) -> None:
    processor_class = adapter.WatermarkLogitsProcessor
    assert adapter.WatermarkLogitsProcessor is processor_class
    assert f"{processor_class.__module__}:{processor_class.__qualname__}" == (
        "assay.watermark.adapters.vllm:WatermarkLogitsProcessor"
    )
    processor = processor_class(types.SimpleNamespace(), torch.device("cpu"), False)
    assert isinstance(processor, LogitsProcessor)
    assert processor.is_argmax_invariant() is False
    processor.update_state(update([(0, params_of(), [1, 2, 3, 4], [])]))
    expected = RequestRows(key_of(GumbelConfig()))
    expected.update(update([(0, params_of(), [1, 2, 3, 4], [])]))
    assert torch.equal(processor.apply(logits_of(1, 2)), expected.apply(logits_of(1, 2)))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        processor_class.validate_params(params_of(temperature=0.0))
    file = tmp_path / "passphrase"
    file.write_text("open sesame\nanything else")
    monkeypatch.delenv("ASSAY_PASSPHRASE")
    monkeypatch.setenv("ASSAY_PASSPHRASE_FILE", str(file))
    processor_class(types.SimpleNamespace(), torch.device("cpu"), False)


def test_vllm_keys_come_from_the_environment(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter.key_from_environment().id == "k"
    monkeypatch.setenv("ASSAY_KEY_ID", "other")
    with pytest.raises(UnknownKeyError):
        adapter.key_from_environment()
    monkeypatch.delenv("ASSAY_KEY_ID")
    with pytest.raises(KeyringError, match="ASSAY_KEY_ID must be set"):
        adapter.key_from_environment()
    monkeypatch.setenv("ASSAY_KEY_ID", "k")
    monkeypatch.delenv("ASSAY_PASSPHRASE")
    with pytest.raises(KeyringError, match="set ASSAY_PASSPHRASE_FILE or ASSAY_PASSPHRASE"):
        adapter.key_from_environment()
    monkeypatch.setenv("ASSAY_PASSPHRASE_FILE", str(environment.parent / "none"))
    with pytest.raises(KeyringError, match="cannot be read"):
        adapter.key_from_environment()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_missing_is_said() -> None:
    with pytest.raises(MissingDependencyError, match="needs vllm"):
        _ = adapter.WatermarkLogitsProcessor
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = adapter.Other


@pytest.mark.parametrize("make", [RequestRows, for_llama_cpp])
def test_keys_that_may_not_embed(make: Callable[[Any], object]) -> None:
    retired = key_of(GumbelConfig()).with_state("retired", datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(RevokedKeyError, match="'k' is retired: it may not embed"):
        make(retired)
    with pytest.raises(ValueError, match="got 'ed25519/1'"):
        make(key_of(Ed25519Config()))
    with pytest.raises(TypeError, match="key must be a SecretKey, got str"):
        make("k")


# ---------------------------------------------------------------- llama.cpp


def complete(mark: Any, prompt: list[int], n: int) -> list[int]:
    """As llama-cpp-python calls it: all tokens so far (intc), logits of one position (single, every third word)."""
    tokens = list(prompt)
    for step in range(n):
        candidates = np.zeros(V, dtype=np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)], align=True))
        scores = candidates["logit"]
        scores[:] = before = logits_of(1, step)[0].numpy()
        ids = np.array(tokens, dtype=np.intc)
        out = mark(ids, scores)
        assert mark.check(ids, scores) is False
        assert (out.dtype, out.shape) == (np.float32, scores.shape)
        np.testing.assert_array_equal(scores, before)
        assert (out == 0).sum() == 1
        assert np.isneginf(out).sum() == V - 1
        tokens.append(int(out.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.scheme)
def test_llama_texts_are_the_schemes_own(config: Any) -> None:
    prompt = [3, 1, 4, 1, 5]
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    mark = for_llama_cpp(key_of(config), seed=3, prompt_length=5, **settings)  # type: ignore[arg-type]
    text = complete(mark, prompt, 15)
    assert text == complete(mark, prompt, 15)  # no state is left from the first time
    draw = sampler_of(config, use_key(key_of(config)), unmarked_key(b"llama.cpp 3"))
    rule = Decoding(top_k=20, top_p=0.9, min_p=0.01)
    history = [] if getattr(config, "completion_only", False) else list(prompt)
    for step, token in enumerate(text):
        scores = warp(logits_of(1, step), rule).numpy() / np.float32(0.7)
        assert token == draw(np.array([history], dtype=np.int64), scores, None)[0]
        history.append(token)


def test_llama_text_carries_the_mark() -> None:
    text = complete(for_llama_cpp(key_of(GumbelConfig()), top_k=0, top_p=1.0, min_p=0.0), [1, 2, 3, 4], 60)
    right = -np.log1p(-(pivots([1, 2, 3, 4, *text], key_of(GumbelConfig())).words + 0.5) / 2**32).mean()
    assert right < 0.5  # 1 without the mark, 4 standard errors away


def test_llama_truncation_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        scores = np.round(rng.normal(0, 2, 12), 1).astype(np.float32)  # ties occur
        if number % 3 == 0:
            scores[rng.integers(0, 12, 4)] = -np.inf
        top_k, top_p, min_p = int(rng.integers(0, 13)), float(rng.uniform(0.05, 1)), float(rng.uniform(0, 0.5))
        order = sorted((v for v in range(12) if scores[v] > -np.inf), key=lambda v: (-scores[v], v))
        order = order[: top_k or 12]
        weights = np.exp([float(scores[v]) for v in order])
        kept, mass = [], 0.0
        for v, weight in zip(order, weights, strict=True):
            if mass >= top_p * weights.sum() - 1e-12:
                break
            mass += weight
            if weight >= min_p * weights[0] - 1e-12:
                kept.append(v)
        got = truncated(scores, top_k=top_k, top_p=top_p, min_p=min_p)
        assert np.flatnonzero(got > -np.inf).tolist() == sorted(kept)
        np.testing.assert_array_equal(got[kept], scores[kept])


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (GumbelConfig(), {"temperature": 0.0}, "temperature must be a positive number"),
        (GumbelConfig(), {"top_k": 1.5}, "top_k must be an integer"),
        (GumbelConfig(), {"top_k": 1}, "top_k must be above 1 for a watermark, got 1"),
        (GumbelConfig(), {"min_p": 1}, "min_p must be below 1 for a watermark, got 1"),
        (GumbelConfig(), {"top_p": 0.0}, "top_p must be in"),
        (GumbelConfig(), {"min_p": 2.0}, "min_p must be in"),
        (VllmGumbelConfig(), {}, "prompt_length must be given for scheme 'vllm-gumbel'"),
        (VllmGumbelConfig(), {"prompt_length": -1}, "prompt_length must be given"),
    ],
)
def test_llama_settings_are_checked(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        for_llama_cpp(key_of(config), **settings)


def test_llama_cpp_check() -> None:
    """What llama.cpp loses, since it calls the mark from C, the check raises from Python."""
    ids, scores = np.array([1, 2, 3], dtype=np.intc), np.zeros(V, dtype=np.float32)
    with pytest.raises(GenerationError, match=r"without the watermark.*logit_bias"):
        for_llama_cpp(key_of(GumbelConfig())).check(ids, scores)
    mark = for_llama_cpp(key_of(GumbelConfig()))
    mark(ids, scores)
    assert mark.check() is False
    ids[0] = 9  # the engine's own array, which it writes into
    with pytest.raises(GenerationError, match="without the watermark"):
        mark.check(ids, scores)
    with pytest.raises(ValueError, match="no id is left") as lost:
        mark(ids, np.full_like(scores, -np.inf))
    for _ in range(2):
        with pytest.raises(ValueError, match="no id is left") as found:
            mark.check(ids, scores)
        assert found.value is lost.value


@pytest.mark.parametrize("refused", ["grammar", "draft_model"])
def test_llama_cpp_calls_that_would_undo_the_mark(refused: str) -> None:
    class Llama:
        """As llama-cpp-python's class: `sample` calls the sampler, which calls the mark from inside."""

        draft_model: object = None

        def sample(self, grammar: object = None) -> object:
            return self._call()

        def _call(self) -> object:
            return mark(np.array([1, 2, 3], dtype=np.intc), np.zeros(V, dtype=np.float32))

    mark, llama = for_llama_cpp(key_of(GumbelConfig())), Llama()
    llama.sample()
    assert mark.check() is False
    if refused == "draft_model":
        llama.draft_model = object()
    with pytest.raises(GenerationError, match=f"{refused} must be None for a watermark"):
        llama.sample(grammar=object() if refused == "grammar" else None)
    with pytest.raises(GenerationError, match=f"{refused} must be None for a watermark"):
        mark.check()
