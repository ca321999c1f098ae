"""The watermark inside transformers' generate: order, one text on every decoding path, refusals, no secret on disk."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from assay._errors import GenerationError, RevokedKeyError
from assay.kernels import race
from assay.watermark.adapters._chance import Watched
from assay.watermark.adapters.transformers import _KeyedProcessor, for_transformers
from assay.watermark.gumbel import GumbelConfig, pivots, token_ids, unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import SchemeConfig, sampler_of
from assay.watermark.signing import Ed25519Config

MakeKey = Callable[..., SecretKey]
PAD = 0


def prompts(rows: int, length: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, key: SecretKey, *, n: int = 24, seed: int | None = 7, **kwargs: Any) -> Any:
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": n, "attention_mask": (ids != PAD).long()} | kwargs
    return model.generate(ids, watermarking_config=for_transformers(key, seed=seed), **arguments)


def test_the_draw_comes_after_temperature_and_truncation(tiny_model: Any, make_key: MakeKey) -> None:
    # Oracle: each token again, in numpy, from the model's raw scores, its context and the key.
    key = make_key()
    out = generate(
        tiny_model, prompts(2), key, temperature=0.7, top_k=20, output_logits=True, return_dict_in_generate=True
    )
    for row, text in enumerate(out.sequences.numpy()):
        for t, logits in enumerate(out.logits):
            scores = logits[row].numpy() / np.float32(0.7)
            scores[scores < np.sort(scores)[-20]] = -np.inf
            context = text[2 + t : 6 + t].astype(np.uint32)[None]
            assert text[6 + t] == race.winners_reference(use_key(key), context, scores[None])[0]


def test_the_text_is_marked_with_its_key_only(tiny_model: Any, make_key: MakeKey) -> None:
    text = generate(tiny_model, prompts(1), make_key(), n=60)[0].numpy()
    # Mean race time of 60 tokens: Exp(1) without the mark, and both bounds are 6 standard errors away from 1.
    right = -np.log1p(-(pivots(text[2:], make_key()).words + 0.5) / 2**32).mean()
    wrong = -np.log1p(-(pivots(text[2:], make_key(1)).words + 0.5) / 2**32).mean()
    assert right < 0.23
    assert 0.23 < wrong < 1.8


def test_sampled_scores_are_one_hot_and_raw_scores_untouched(tiny_model: Any, make_key: MakeKey) -> None:
    kwargs = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True, "n": 8}
    out = generate(tiny_model, prompts(3), make_key(), **kwargs)
    for t, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert ((scores == 0).sum(1) == 1).all()
        assert ((scores == 0) | (scores == -torch.inf)).all()
        torch.testing.assert_close(scores.argmax(1), out.sequences[:, 6 + t])
        assert logits.isfinite().all()
    assert len({scores.data_ptr() for scores in out.scores}) == 8


@pytest.mark.parametrize(
    "ids",
    [prompts(1), prompts(1, 1), prompts(1, 3), torch.tensor([[9, 8, 7, 6, 5, 9, 8, 7, 6]])],
    ids=["plain", "one token", "shorter than the window", "ends in a repeated context"],
)
def test_one_text_on_every_decoding_path(
    tiny_model: Any, make_tiny_model: Callable[..., Any], make_key: MakeKey, ids: torch.Tensor
) -> None:
    expected = generate(tiny_model, ids, make_key(), temperature=0.5)
    for kwargs in (
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"assistant_model": make_tiny_model(0, noise=0.02)},
        {"assistant_model": make_tiny_model(1)},
        {"prompt_lookup_num_tokens": 3},
    ):
        torch.manual_seed(len(kwargs))  # the torch generator must not matter
        assert torch.equal(generate(tiny_model, ids, make_key(), temperature=0.5, **kwargs), expected), kwargs


def test_a_good_assistant_has_its_drafts_accepted(
    tiny_model: Any, make_tiny_model: Callable[..., Any], make_key: MakeKey
) -> None:
    # The equal text above would prove nothing if every draft were thrown away.
    calls = []
    hook = tiny_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        generate(tiny_model, prompts(1), make_key(), n=40, assistant_model=make_tiny_model())
    finally:
        hook.remove()
    assert len(calls) < 20


def test_left_padding_gives_each_row_the_text_it_gets_alone(tiny_model: Any, make_key: MakeKey) -> None:
    lengths = [6, 1, 3, 4, 5, 2]
    rows = [prompts(1, length, seed=length) for length in lengths]
    batch = torch.cat([torch.nn.functional.pad(row, (6 - row.shape[1], 0), value=PAD) for row in rows])
    together = generate(tiny_model, batch, make_key(), pad_token_id=PAD)
    for i, row in enumerate(rows):
        alone = generate(tiny_model, row, make_key(), pad_token_id=PAD)
        assert torch.equal(together[i, 6 - lengths[i] :], alone[0])


def test_padding_that_is_not_taken_off_changes_the_text(tiny_model: Any, make_key: MakeKey) -> None:
    # Near-miss of the test above: a wrong pad id leaves pads in the contexts of a short prompt.
    row = prompts(1, 2)
    padded = torch.nn.functional.pad(row, (4, 0), value=PAD)
    mark = for_transformers(make_key(), seed=7, pad_token_id=511)
    kwargs = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "attention_mask": (padded != PAD).long()}
    right = generate(tiny_model, row, make_key(), n=8)
    assert not torch.equal(tiny_model.generate(padded, watermarking_config=mark, **kwargs)[:, 4:], right)


def test_rows_that_end_early_do_not_disturb_the_others(tiny_model: Any, make_key: MakeKey) -> None:
    batch = prompts(4, seed=5)
    free = generate(tiny_model, batch, make_key())
    end = int(free[2, 10])
    together = generate(tiny_model, batch, make_key(), eos_token_id=end, pad_token_id=PAD)
    for i in range(4):
        alone = generate(tiny_model, batch[i : i + 1], make_key(), eos_token_id=end, pad_token_id=PAD)[0]
        assert torch.equal(together[i, : len(alone)], alone)
        assert (together[i, len(alone) :] == PAD).all()
    assert (together[2, 11:] == PAD).all()


def test_the_pad_id_falls_back_to_the_end_of_sequence(tiny_model: Any, make_key: MakeKey) -> None:
    model = copy.deepcopy(tiny_model)
    model.generation_config.pad_token_id = None
    row = prompts(1, 2)
    padded = torch.nn.functional.pad(row, (4, 0), value=5)
    kwargs = {"eos_token_id": 5, "n": 8}
    alone = generate(model, row, make_key(), **kwargs)
    got = generate(model, padded, make_key(), attention_mask=(padded != 5).long(), **kwargs)
    assert torch.equal(got[:, 4:], alone)


def test_equal_rows_get_equal_texts(tiny_model: Any, make_key: MakeKey) -> None:
    copies = generate(tiny_model, prompts(1), make_key(), num_return_sequences=3)
    assert (copies == copies[0]).all()
    assert not torch.equal(copies[:1], generate(tiny_model, prompts(1, seed=1), make_key()))


def test_unmarked_tokens_follow_the_seed_or_torch(tiny_model: Any, make_key: MakeKey) -> None:
    short = prompts(1, 1)

    def text(torch_seed: int, seed: int | None) -> list[int]:
        torch.manual_seed(torch_seed)
        return generate(tiny_model, short, make_key(), n=12, seed=seed)[0].tolist()

    assert text(1, None) == text(1, None)
    assert text(1, None) != text(2, None)
    assert text(1, 5) == text(2, 5)
    assert text(1, 5) != text(1, 6)


def test_a_repeated_context_is_drawn_without_the_mark(tiny_model: Any, make_key: MakeKey) -> None:
    new = torch.tensor([[3, 9, 8, 7, 6, 5, 4, 8, 7, 6]])
    repeated = torch.tensor([[3, 9, 8, 7, 6, 5, 9, 8, 7, 6]])
    by_key = [[generate(tiny_model, ids, make_key(k), n=1)[0, -1].item() for k in range(6)] for ids in (new, repeated)]
    assert len(set(by_key[0])) > 2  # follows the key
    assert len(set(by_key[1])) == 1  # follows the seed alone
    by_seed = {generate(tiny_model, repeated, make_key(), n=1, seed=seed)[0, -1].item() for seed in range(6)}
    assert len(by_seed) > 2


def test_prompts_as_embeddings_only(tiny_model: Any, make_key: MakeKey) -> None:
    ids = prompts(2)
    embeddings = tiny_model.get_input_embeddings()(ids)
    kwargs = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    mark = for_transformers(make_key(), seed=7)
    out = tiny_model.generate(inputs_embeds=embeddings, watermarking_config=mark, **kwargs)
    assert out.shape == (2, 12)
    assert torch.equal(out, tiny_model.generate(inputs_embeds=embeddings, watermarking_config=mark, **kwargs))
    # The first `window` tokens have no context; from then on the text follows the key.
    other = tiny_model.generate(
        inputs_embeds=embeddings, watermarking_config=for_transformers(make_key(1), seed=7), **kwargs
    )
    assert torch.equal(out[:, :4], other[:, :4])
    assert not torch.equal(out[:, 4:], other[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_every_type_and_layout(make_key: MakeKey, dtype: torch.dtype) -> None:
    processor = _KeyedProcessor(Watched(sampler_of(GumbelConfig(), use_key(make_key()), unmarked_key(b""))), None)
    ids = prompts(5)
    scores = (3 * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))).to(dtype)
    before = scores.clone()
    got = processor(ids, scores)
    assert (got.dtype, got.shape, got.device) == (dtype, scores.shape, scores.device)
    assert torch.equal(scores, before)
    expected = race.winners_reference(
        use_key(make_key()), ids[:, -4:].numpy().astype(np.uint32), scores.float().numpy()
    )
    np.testing.assert_array_equal(got.argmax(1), expected)
    assert torch.equal(processor(ids, scores.T.contiguous().T), got)
    assert torch.equal(processor(ids, scores.clone().requires_grad_()), got)


def test_scores_that_cannot_be_drawn_from(make_key: MakeKey) -> None:
    processor = _KeyedProcessor(Watched(sampler_of(GumbelConfig(), use_key(make_key()), unmarked_key(b""))), None)
    with pytest.raises(ValueError, match="row 1 has nan"):
        processor(prompts(2), torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))
    with pytest.raises(ValueError, match="only -inf"):
        processor(prompts(1), torch.full((1, 5), -torch.inf))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1"),
        ({"num_beams": 2, "do_sample": False}, "num_beams must be 1"),
        ({"do_sample": False}, "do_sample must be True.*got False"),
        ({"do_sample": None}, "do_sample must be True.*got None"),
        ({"do_sample": False, "prompt_lookup_num_tokens": 3}, "do_sample must be True"),
        ({"top_k": 1}, "top_k must be above 1 for a watermark, got 1"),
        ({"top_p": 0.0}, "top_p must be above 0 for a watermark, got 0"),
        ({"min_p": 1.0}, "min_p must be below 1 for a watermark, got 1"),
    ],
)
def test_decoding_that_would_lose_the_mark_is_refused(
    tiny_model: Any, make_key: MakeKey, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(tiny_model, prompts(1), make_key(), **kwargs)


@pytest.mark.parametrize("window", [1, 4])
def test_continuous_batching_is_refused(make_tiny_model: Callable[..., Any], make_key: MakeKey, window: int) -> None:
    mark = for_transformers(make_key(window=window))
    model = make_tiny_model()
    settings = GenerationConfig(do_sample=True, max_new_tokens=3, watermarking_config=mark)
    with pytest.raises(GenerationError, match="continuous batching"):
        model.generate_batch([[3, 4, 5]], generation_config=settings)
    with pytest.raises(ValueError, match=r"continuous batching|Invalid `cache_implementation`"):  # 5.x; 4.57
        generate(model, prompts(1), make_key(window=window), cache_implementation="paged")
    processor = _KeyedProcessor(
        Watched(sampler_of(GumbelConfig(window=window), use_key(make_key()), unmarked_key(b""))), None
    )
    with pytest.raises(GenerationError, match="continuous batching"):
        processor(torch.tensor([3, 4, 5]), torch.zeros(3, 9))


def test_settings_that_cannot_be_seen_are_refused(make_key: MakeKey) -> None:
    mark = for_transformers(make_key())
    with pytest.raises(GenerationError, match="cannot see the settings"):
        mark.construct_processor(512, "cpu")

    def _get_logits_processor(generation_config: Any, input_ids_seq_length: int | None = 5) -> Any:
        return mark.construct_processor(512, "cpu")

    good = GenerationConfig(do_sample=True, num_beams=1, watermarking_config=mark)
    assert isinstance(_get_logits_processor(good), _KeyedProcessor)

    renamed = copy.copy(good)
    del renamed.num_beams
    of_another = GenerationConfig(do_sample=True, num_beams=1, watermarking_config=for_transformers(make_key()))
    for settings in (None, renamed, of_another):
        with pytest.raises(GenerationError, match="cannot see the settings"):
            _get_logits_processor(settings)


def test_keys_that_may_not_embed_are_refused(make_key: MakeKey) -> None:
    for state in ("retired", "revoked"):
        with pytest.raises(RevokedKeyError, match=f"'test-0' is {state}: it may not embed.*active"):
            for_transformers(make_key().with_state(state, datetime(2026, 1, 1, tzinfo=UTC)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key must be a SecretKey, got bytes"):
        for_transformers(bytes(32))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class OtherConfig(SchemeConfig):
    scheme: ClassVar[str] = "other"
    version: ClassVar[int] = 1


def test_keys_of_schemes_that_cannot_mark_are_refused() -> None:
    with pytest.raises(ValueError, match="'other/1' does not draw token by token"):
        for_transformers(SecretKey(bytes(32), id="other", config=OtherConfig()))
    with pytest.raises(ValueError, match="must be for a watermark scheme, got 'ed25519/1'"):
        for_transformers(SecretKey(bytes(32), id="signer", config=Ed25519Config()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pad_token_id": -1}, "pad_token_id must be at least 0, got -1"),
        ({"pad_token_id": "0"}, "pad_token_id must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
    ],
)
def test_arguments_are_checked(make_key: MakeKey, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        for_transformers(make_key(), **kwargs)


def secret_forms(key: SecretKey) -> list[str]:
    """How the secret or the PRF key would look in a text file."""
    forms = []
    for data in (key._secret, use_key(key).astype("<u4").tobytes()):
        forms += [data.hex(), base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode(), repr(data)]
        forms += [str(int.from_bytes(data, order)) for order in ("little", "big")]
        forms += [str(word) for word in np.frombuffer(data, "<u4")]
        forms += [", ".join(map(str, data))]
    return forms


def test_saved_settings_hold_no_secret_and_do_not_load(make_key: MakeKey, tmp_path: Path) -> None:
    key = make_key()
    mark = for_transformers(key, seed=3)
    settings = GenerationConfig(do_sample=True, watermarking_config=mark)
    settings.save_pretrained(tmp_path)
    mark.to_json_file(tmp_path / "mark.json")
    exports = [path.read_text() for path in tmp_path.iterdir()]
    exports += [repr(mark), str(mark), mark.to_json_string(), json.dumps(dict(mark)), str(vars(mark)), repr(settings)]
    exports += [str(settings.to_dict()), settings.to_json_string(use_diff=False), str(settings.to_diff_dict())]
    for text in exports:
        assert not [form for form in secret_forms(key) if form in text]
    assert json.loads((tmp_path / "mark.json").read_text()) == {
        "assay_watermark": {"key_id": "test-0", "scheme": "gumbel/1"}
    }
    with pytest.raises(TypeError, match="assay_watermark"):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="refuses to be pickled"):
        pickle.dumps(mark)


def test_the_search_for_secrets_finds_one() -> None:
    # Near-miss of the test above: an export that leaks is found in each of its forms.
    key = SecretKey(bytes(range(32)), id="leak", config=GumbelConfig())
    for text in (
        key._secret.hex(),
        base64.b64encode(key._secret).decode(),
        str(list(use_key(key))),
        str(list(key._secret)),
    ):
        assert [form for form in secret_forms(key) if form in text]


def test_marks_are_shared_by_copies_and_equal_only_to_themselves(make_key: MakeKey) -> None:
    mark = for_transformers(make_key())
    assert copy.deepcopy(mark) is mark
    assert mark == mark
    assert mark != for_transformers(make_key())
    assert len({mark, for_transformers(make_key())}) == 2


def test_settings_of_the_model_may_carry_the_mark(make_tiny_model: Callable[..., Any], make_key: MakeKey) -> None:
    model = make_tiny_model()
    expected = generate(model, prompts(1), make_key())
    model.generation_config.watermarking_config = for_transformers(make_key(), seed=7)
    assert torch.equal(model.generate(prompts(1), do_sample=True, top_k=0, max_new_tokens=24), expected)


def test_other_processors_keep_their_place(tiny_model: Any, make_key: MakeKey) -> None:
    out = generate(tiny_model, prompts(1), make_key(), repetition_penalty=1.3, renormalize_logits=True, min_p=0.05)
    assert out.shape == (1, 30)
    assert np.isin(token_ids(out[0].numpy()), np.arange(512)).all()
