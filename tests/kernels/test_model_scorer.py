"""ModelScorer against the plain use of the model; windows, batches, prompts, and models that do unusual things."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402 - after the skip
from hypothesis import strategies as st  # noqa: E402
from transformers import (  # noqa: E402
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from assay.kernels.scoring.model import ModelScorer  # noqa: E402
from assay.kernels.scoring.windows import batch_end, cut, longest_first  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose time to a second thread, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


V = 211
# Float32 rounding of a two-layer model whose matrix products run in another order for another batch shape.
TOLERANCE = 2e-5


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    settings_ = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings_, **changes})).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def documents(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n) for n in lengths]


@torch.no_grad()
def plain_log_probs(model, context, ids):
    """Log-probabilities of `ids` after `context`, one sequence at a time, the obvious way; NaN without context."""
    if not len(ids):
        return np.empty(0)
    sequence = torch.tensor([*context, *ids])[None]
    log_p = torch.log_softmax(model(sequence, use_cache=False).logits[0].double(), dim=1)
    first = len(context)
    found = [log_p[i - 1, sequence[0, i]].item() if i else np.nan for i in range(first, sequence.shape[1])]
    return np.array(found)


def test_matches_the_plain_use_of_the_model(model):
    docs = documents(1, [0, 1, 2, 3, 20, 63, 7, 7, 30])
    for found, ids in zip(ModelScorer(model).score(docs), docs, strict=True):
        assert len(found) == len(ids)
        assert found.scored.all()
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [1], ids), atol=TOLERANCE)


def test_the_model_is_called_without_mask_and_cache(model):
    # A mask of ones or a cache would switch off packed and fast attention without a word; padding is on the right.
    scorer, calls = ModelScorer(model), []
    hook = model.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        scorer.score([[2, 3, 4], [5, 6, 7, 8, 9, 10]])
    finally:
        hook.remove()
    (kwargs,) = calls
    assert kwargs["use_cache"] is False
    assert kwargs.get("attention_mask") is None
    assert kwargs.get("position_ids") is None
    assert kwargs["input_ids"].tolist() == [[1, 5, 6, 7, 8, 9], [1, 2, 3, 0, 0, 0]]


def test_packing_would_be_right_only_without_mask_and_cache(model):
    # Why windows are not packed into one row, and why no call passes a mask or a cache: the same packed row is right
    # with neither and wrong with either, and no error says so.
    first, second = (torch.tensor([ids]) for ids in ([1, 5, 9, 30], [1, 7, 8, 3, 2]))
    packed = {"input_ids": torch.cat([first, second], 1), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    with torch.no_grad():
        alone = model(second, use_cache=False).logits
        right = model(**packed, use_cache=False).logits[:, 4:]
        cached = model(**packed, use_cache=True).logits[:, 4:]
        masked = model(**packed, use_cache=False, attention_mask=torch.ones(1, 9)).logits[:, 4:]
    assert torch.allclose(right, alone, atol=TOLERANCE)
    assert (cached - alone).abs().max() > 0.1
    assert (masked - alone).abs().max() > 0.1


def test_without_beginning_of_sequence_the_first_token_is_not_scored(model):
    docs = documents(2, [0, 1, 5])
    for found, ids in zip(ModelScorer(model, add_bos=False).score(docs), docs, strict=True):
        np.testing.assert_array_equal(found.scored, np.arange(len(ids)) > 0)
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [], ids), atol=TOLERANCE)
        assert np.isnan(found.tilted_log_sums[:1]).all()
        assert (found.rank[:1] == 0).all()


def test_prompts_are_read_and_not_scored(model):
    docs, scorer = documents(3, [4, 9, 6]), ModelScorer(model)
    for found, ids in zip(scorer.score(docs, prompt=[5, 6, 7]), docs, strict=True):
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [5, 6, 7], ids), atol=TOLERANCE)
    prompts = [np.array([9]), None, np.array([2, 3])]
    for found, ids, prompt in zip(scorer.score(docs, prompt=prompts), docs, prompts, strict=True):
        context = [1] if prompt is None else prompt
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, context, ids), atol=TOLERANCE)


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.9}])
@pytest.mark.parametrize("bos", [True, False])
def test_whole_laws_agree_with_the_statistics(model, monkeypatch, decoding, bos):
    monkeypatch.setattr("assay.kernels.scoring.model._LAWS", 7 * V)  # pieces of seven rows
    (ids,) = documents(8, [75])
    scorer = ModelScorer(model, window=32, stride=16, add_bos=bos)
    for prompt in (None, [5, 6, 7]):
        (expected,) = scorer.score([ids], prompt=prompt, **decoding)
        found = np.full(len(ids), np.nan)
        for place, laws in scorer.log_probabilities(ids, prompt=prompt, **decoding):
            assert laws.dtype == np.float32
            assert laws.shape[1] == V
            assert len(laws) <= 7
            np.testing.assert_allclose(np.exp(laws.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
            assert np.isnan(found[place : place + len(laws)]).all()
            found[place : place + len(laws)] = laws[np.arange(len(laws)), ids[place : place + len(laws)]]
        np.testing.assert_allclose(found, expected.log_prob, atol=TOLERANCE)


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_a_document_does_not_depend_on_its_batch(model, budget):
    docs = documents(4, [30, 1, 12, 63, 12, 200, 5, 2, 33, 90])
    scorer = ModelScorer(model, window=32, stride=16, token_budget=budget)
    together = scorer.score(docs)
    for ids, found in zip(docs, together, strict=True):
        (alone,) = scorer.score([ids])
        np.testing.assert_array_equal(found.scored, alone.scored)
        np.testing.assert_allclose(found.log_prob, alone.log_prob, atol=TOLERANCE)
        np.testing.assert_allclose(found.third_moment, alone.third_moment, atol=50 * TOLERANCE)
    for found, shuffled in zip(together, scorer.score(docs[::-1])[::-1], strict=True):
        np.testing.assert_allclose(found.log_prob, shuffled.log_prob, atol=TOLERANCE)


def test_long_documents_are_predicted_from_the_stated_context(model):
    (ids,) = documents(5, [150])
    window, stride = 20, 8
    (found,) = ModelScorer(model, window=window, stride=stride).score([ids])
    assert found.scored.all()
    sequence = np.concatenate([[1], ids])
    for t in range(1, len(sequence)):
        # The first window that reaches the prediction of token t, which is made at input position t - 1.
        start = 0 if t - 1 < window else stride * -(-(t - window) // stride)
        expected = plain_log_probs(model, sequence[start:t], [sequence[t]])
        np.testing.assert_allclose(found.log_prob[t - 1], expected[0], atol=TOLERANCE)


@given(
    context=st.integers(0, 30),
    length=st.integers(0, 70),
    window=st.integers(2, 25),
    stride=st.integers(1, 25),
)
@settings(max_examples=300, deadline=None)
def test_windows_predict_every_token_once(context, length, window, stride):
    stride = min(stride, window)
    before, ids = np.arange(1000, 1000 + context), np.arange(length)
    sequence = np.concatenate([before, ids])
    times = np.zeros(length, dtype=int)
    for piece in cut(0, before, ids, window, stride):
        assert 1 <= len(piece.inputs) <= window
        assert len(piece.targets) == len(piece.inputs) - piece.first >= 1
        places = np.arange(piece.place, piece.place + len(piece.targets))
        np.testing.assert_array_equal(ids[places], piece.targets)
        times[places] += 1
        # The inputs are the text right before each target, and enough of it.
        np.testing.assert_array_equal(sequence[context + places - 1], piece.inputs[piece.first :])
        enough = np.minimum(context + places, window - stride)
        assert (np.arange(piece.first, len(piece.inputs)) + 1 >= enough).all()
    expected = np.ones(length, dtype=int)
    if context == 0 and length:
        expected[0] = 0
    np.testing.assert_array_equal(times, expected)


def test_batches_by_length_carry_little_padding():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(300), 1, 2000)), 8, 1000).astype(int)
    pieces = longest_first(w for d, n in enumerate(lengths) for w in cut(d, np.array([1]), np.zeros(n), 1024, 512))
    read = padded = start = 0
    while start < len(pieces):
        end = batch_end(pieces, start, 16384)
        padded += len(pieces[start].inputs) * (end - start)
        read += sum(len(w.inputs) for w in pieces[start:end])
        assert len(pieces[start].inputs) * (end - start) <= 16384
        start = end
    assert padded < 1.03 * read


def test_out_of_memory_halves_the_batch_and_goes_on(model, monkeypatch):
    docs = documents(6, [10] * 13)
    expected = ModelScorer(model).score(docs)
    scorer = ModelScorer(model)
    sizes, whole = [], type(scorer._parts).hidden

    def limited(self, inputs):
        sizes.append(len(inputs))
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, inputs)

    monkeypatch.setattr(type(scorer._parts), "hidden", limited)
    found = scorer.score(docs)
    assert sizes == [13, 6, 3, 3, 3, 3, 1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_prob, other.log_prob, atol=TOLERANCE)

    def never(self, inputs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(type(scorer._parts), "hidden", never)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        scorer.score(docs)


def test_other_errors_are_not_taken_for_lack_of_memory(model, monkeypatch):
    scorer = ModelScorer(model)
    calls = []

    def broken(self, inputs):
        calls.append(1)
        raise RuntimeError("a real fault")

    monkeypatch.setattr(type(scorer._parts), "hidden", broken)
    with pytest.raises(RuntimeError, match="a real fault"):
        scorer.score(documents(6, [10] * 13))
    assert len(calls) == 1


def small(**changes):
    settings_ = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"vocab_size": V, "initializer_range": 0.3, "bos_token_id": 1, "pad_token_id": 0, **settings_, **changes}


ARCHITECTURES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, bos_token_id=1)),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, bos_token_id=1)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=V, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**small(num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0, sliding_window=8))
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**small(logit_scale=0.0625))),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**small(logits_scaling=3.0))),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    if name == "gptj":
        torch.nn.init.normal_(model.lm_head.bias)
    scorer = ModelScorer(model)
    assert scorer.full_logits_reason == ""
    docs = documents(7, [12, 30, 3])
    for found, ids in zip(scorer.score(docs), docs, strict=True):
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [1], ids), atol=TOLERANCE)


class Shifted(LlamaForCausalLM):
    """Does to its logits what no field of its configuration tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 0.01 * torch.arange(V)
        return out


def test_a_model_whose_parts_do_not_make_the_whole_is_called_for_its_logits():
    model = Shifted(llama().config).eval()
    scorer = ModelScorer(model)
    assert "not those of its last hidden states" in scorer.full_logits_reason
    docs = documents(8, [12, 30, 3])
    for found, ids in zip(scorer.score(docs), docs, strict=True):
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [1], ids), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype):
    docs = documents(9, [40, 17])
    model = llama().to(dtype)
    scorer = ModelScorer(model)
    assert scorer.full_logits_reason == ""
    for found, ids in zip(scorer.score(docs), docs, strict=True):
        # The reference rounds its logits to the narrow type: half a unit at |logit| <= 8.
        np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [1], ids), atol=8 * torch.finfo(dtype).eps)
    again = ModelScorer(llama(), dtype=dtype, device="cpu")
    assert again.model.dtype == dtype


@pytest.mark.parametrize("full", [False, True])
def test_cross_entropy_of_two_models(model, full):
    other = llama(seed=1) if not full else Shifted(llama(seed=1).config).eval()
    docs = documents(10, [25, 3])
    found = ModelScorer(model).score(docs, other=ModelScorer(other), temperature=0.7)
    for one, ids in zip(found, docs, strict=True):
        with torch.no_grad():
            sequence = torch.tensor([1, *ids])[None, :-1]
            p = torch.softmax(model(sequence).logits[0].double() / 0.7, dim=1)
            log_q = torch.log_softmax(other(sequence).logits[0].double(), dim=1)
        np.testing.assert_allclose(one.cross_entropy, -(p * log_q).sum(1).numpy(), atol=5 * TOLERANCE)
    assert ModelScorer(model).score(docs)[0].cross_entropy is None


def test_the_model_s_own_text_fits_its_law_only_under_its_decoding_rule(model):
    # 400 tokens drawn at top-k 20: under that rule sum(log p) is centred at -sum(entropy); at temperature 1 it is not.
    torch.manual_seed(0)
    text = model.generate(torch.tensor([[1]] * 8), do_sample=True, top_k=20, max_new_tokens=50, eos_token_id=None)
    docs = [row[1:].numpy() for row in text]
    scorer = ModelScorer(model)

    def z(**rule):
        found = scorer.score(docs, **rule)
        total = sum((one.log_prob + one.entropy).sum() for one in found)
        return total / np.sqrt(sum(one.varentropy.sum() for one in found))

    assert abs(z(top_k=20)) < 3.3  # 1e-3 under the null, and the seed is fixed
    assert z() > 10
    assert z(top_k=10) == -np.inf


def test_texts_need_a_tokenizer(model):
    class Words:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [int(word) for word in text.split()]}

    (found,) = ModelScorer(model, Words()).score(["3 5 8"])
    np.testing.assert_allclose(found.log_prob, plain_log_probs(model, [1], [3, 5, 8]), atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"documents\[0\] is a text, and the scorer has no tokenizer"):
        ModelScorer(model).score(["3 5 8"])


def test_progress_goes_to_standard_error(model, capsys):
    ModelScorer(model).score(documents(1, [5]), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Scoring tokens" in err
    assert "5/5" in err


def test_bad_arguments_are_refused(model):
    for change, message in [
        ({"window": 1}, r"window must be an integer in \[2, 64\], got 1"),
        ({"window": 65}, r"window must be an integer in \[2, 64\], got 65"),
        ({"window": 8, "stride": 9}, r"stride must be an integer in \[1, 8\], got 9"),
        ({"stride": 0}, "stride must be"),
        ({"token_budget": 0}, "token_budget must be an integer at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelScorer(model, **change)
    scorer = ModelScorer(model)
    for docs, prompt, message in [
        ([[0, V]], None, r"documents\[0\] must hold ids in \[0, 211\), got 0 to 211"),
        ([[0], [-1]], None, r"documents\[1\] must hold ids"),
        ([[0.5]], None, "must be integers of shape"),
        ([[[1]]], None, "must be integers of shape"),
        ([[1]], [[1], [2]], r"prompt must have one entry per document \(1\), got 2"),
        ([[1]], [V], "prompt must hold ids"),
        ([[1]], [[V]], r"prompt\[0\] must hold ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            scorer.score(docs, prompt=prompt)
    with pytest.raises(ValueError, match="temperature must be"):
        scorer.score([[1]], temperature=0)
    config = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got an encoder-decoder"):
        ModelScorer(T5ForConditionalGeneration(config))


def test_broken_weights_are_named():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match=r"holds NaN or \+inf"):
        ModelScorer(model).score(documents(1, [5]))
