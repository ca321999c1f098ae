"""`detect`: one document, one key or many, with or without a model, to one `TestResult`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from assay.detection import combine
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.detection.testers import Tester, tester
from assay.detection.text import LoadedTokenizer, decode_text, load_tokenizer
from assay.kernels.chacha import Words
from assay.watermark.gumbel import token_ids
from assay.watermark.keys import SecretKey, use_key

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer


@runtime_checkable
class DetectionKeys(Protocol):
    """A collection that names the keys to test, such as a `Keyring`."""

    def for_detection(self) -> Sequence[SecretKey]:
        """Active and retired watermark keys."""


def detect(
    text: str | bytes | npt.ArrayLike,
    key: SecretKey | DetectionKeys | Iterable[SecretKey],
    *,
    tokenizer: Any = None,
    model: Any = None,
    prompt: str | bytes | npt.ArrayLike | None = None,
    test: str = "auto",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> TestResult:
    """Test whether a text carries the mark of a key.

    Guarantee: for a text written without knowledge of the keys, P(pvalue <= a) <= a for every a in [0, 1] and the
    e-value has mean at most 1. This holds for every text, every model and every prompt; several keys are corrected by
    Holm's method. The power depends on them.

    Parameters
    ----------
    text
        A string, UTF-8 bytes, or token ids (integers in [0, 4294967294], shape (n,)). Any length.
    key
        One key, several, or a keyring (its active and retired watermark keys).
    tokenizer
        For strings: a folder, tokenizer.json, hub id, `tokenizers.Tokenizer` or fast transformers tokenizer; it must be
        the generator's. Default: the tokenizer of `model`, else the bundled model's.
    model
        Optional, and the most powerful: the model that may have written the text, as a local folder, hub id, "default"
        for the bundled one, a loaded causal model, or a `ModelScorer`.
    prompt
        The prompt where it is known: lets the first tokens count and sharpens the model's probabilities.
    test
        "auto": without a model the model-free test; with one, the best of the scheme's tests, corrected for the choice.
        Or one by name; a scheme's are "sum", "model-aware" and "robust" unless its page names others.
    temperature, top_k, top_p, min_p
        How the model was sampled, if known; used for the model's probabilities only.

    Returns
    -------
    TestResult. With no scorable token (empty or too short a text) its p-value and e-value are 1.

    Raises
    ------
    TextError
        If the text is not valid Unicode or the bytes are not UTF-8.
    ValueError
        On ids out of range, no key to test, a key that is not for a watermark, an unknown test, or a test that needs a
        model.
    """
    keys = keys_to_test(key, "key")
    testers = [_tester(one, test, has_model=model is not None) for one in keys]
    wanted = model is not None and any(test == "auto" or test in known.NEEDS_MODEL for known in testers)
    scorer = _scorer(model) if wanted else None
    ids, source = _token_ids(text, "text", tokenizer, model, scorer)
    prompt_ids = None if prompt is None else _token_ids(prompt, "prompt", tokenizer, model, scorer)[0]
    whole = ids if prompt_ids is None else np.concatenate([prompt_ids, ids])
    view = None
    if scorer is not None and len(ids):
        decoding = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        view = _model_view(scorer, ids, prompt_ids, decoding)
    before = len(whole) - len(ids)
    results = [_test_key(whole, before, one, known, test, view) for one, known in zip(keys, testers, strict=True)]
    combined = combine.over_keys(results)
    if source is not None:
        note = f"Token ids come from tokenizer {source.name!r} (sha256 {source.sha256[:16]}), the generator's own."
        combined = replace(combined, assumptions=(*combined.assumptions, note))
    return combined


def _test_key(
    whole: Words, prompt_length: int, key: SecretKey, known: Tester, test: str, model: ModelView | None
) -> TestResult:
    result = known.test_ids(whole, prompt_length, use_key(key), key.config, test=test, model=model)
    note: tuple[str, ...] = ()
    if key.state == "revoked":
        note = (f"Key {key.id!r} was revoked ({key.info.revoked}); whoever learned it could have made the mark.",)
    return replace(result, key_id=key.id, scheme=key.config.tag, assumptions=(*result.assumptions, *note))


def _tester(key: SecretKey, test: str, *, has_model: bool) -> Tester:
    """The tests of the key's scheme, which must have the one asked for."""
    known = tester(key.config)
    if test not in ("auto", *known.TESTS):
        names = ", ".join(repr(name) for name in ("auto", *known.TESTS))
        raise ValueError(f"test must be one of {names} for scheme {key.config.scheme!r}, got {test!r}.")
    if test in known.NEEDS_MODEL and not has_model:
        raise ValueError(
            f"test {test!r} needs model=. Pass the model that may have written the text, or test={known.TESTS[0]!r}."
        )
    return known


def keys_to_test(key: Any, name: str) -> list[SecretKey]:
    """The keys that one key, several or a keyring name, each once, checked; `name` is the argument's in messages.

    Raises
    ------
    ValueError
        If there is none, or something else is among them.
    """
    if isinstance(key, SecretKey):
        return [key]
    if isinstance(key, (str, bytes)):
        raise ValueError(
            f"{name} must be a SecretKey, a Keyring or several SecretKeys, got a string. "
            "Look the key up first: Keyring.open(path, passphrase=...)[key_id]."
        )
    if isinstance(key, DetectionKeys):
        keys = list(key.for_detection())
    elif isinstance(key, Iterable):
        # One key named twice is one hypothesis, not two to correct for.
        keys = list(dict.fromkeys(key))
    else:
        raise ValueError(f"{name} must be a SecretKey, a Keyring or several SecretKeys, got {type(key).__name__}.")
    if not keys:
        raise ValueError(
            f"{name} must be a SecretKey, several, or a keyring with an active or retired watermark key; this "
            "names no key to test. Add one first."
        )
    for one in keys:
        if not isinstance(one, SecretKey):
            raise ValueError(f"{name} must hold SecretKey objects, got {type(one).__name__}.")
    return keys


def _scorer(model: Any) -> ModelScorer:
    from assay.kernels.scoring.model import ModelScorer

    if isinstance(model, ModelScorer):
        return model
    from assay.models import load_model

    return ModelScorer(load_model(model))


def _model_view(scorer: ModelScorer, ids: Words, prompt_ids: Words | None, decoding: dict[str, Any]) -> ModelView:
    prompt = None if prompt_ids is None else [prompt_ids]
    (statistics,) = scorer.score([ids], prompt=prompt, **decoding)
    return ModelView(statistics.log_prob, partial(scorer.log_probabilities, ids, prompt=prompt_ids, **decoding))


def _token_ids(
    text: Any, name: str, tokenizer: Any, model: Any, scorer: ModelScorer | None
) -> tuple[Words, LoadedTokenizer | None]:
    if isinstance(text, (bytes, bytearray)):
        text = decode_text(bytes(text))
    if not isinstance(text, str):
        if not isinstance(text, Iterable) or isinstance(text, (dict, set)):
            raise ValueError(f"{name} must be a string, UTF-8 bytes or token ids, got {type(text).__name__}.")
        try:
            return token_ids(np.asarray(text)), None
        except ValueError as error:
            raise ValueError(str(error).replace("tokens must be", f"{name} must be", 1)) from None
    if tokenizer is None:
        tokenizer = getattr(scorer, "tokenizer", None)
    if tokenizer is None and isinstance(model, (str, os.PathLike)):
        tokenizer = model
    if tokenizer is None and model is not None:
        # A model loaded by transformers remembers the folder or hub id, where its tokenizer is too.
        tokenizer = getattr(getattr(scorer, "model", model), "name_or_path", None) or None
    if tokenizer is None and model is not None:
        raise ValueError(f"tokenizer must be given with a loaded model to test {name} as a string. Or pass token ids.")
    loaded = load_tokenizer(tokenizer)
    return loaded.encode(text), loaded
