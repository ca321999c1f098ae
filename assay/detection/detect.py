"""`detect`: one document, one key or many, with or without a model, to one `TestResult`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from assay.detection import combine, gumbel
from assay.detection.result import TestResult
from assay.detection.text import LoadedTokenizer, decode_text, load_tokenizer
from assay.kernels.chacha import Words
from assay.watermark import gumbel as watermark
from assay.watermark.keys import SecretKey

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer

Test = Literal["auto", "sum", "model-aware", "robust"]


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
    test: Test = "auto",
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
        "auto": without a model the sum test; with one, the best of sum, model-aware and robust tests, corrected for
        the choice. Or one of these by name.
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
        On ids out of range, no key to test, a key of another scheme, an unknown test, or a test that needs a model.
    """
    if test not in ("auto", "sum", "model-aware", "robust"):
        raise ValueError(f"test must be 'auto', 'sum', 'model-aware' or 'robust', got {test!r}.")
    if test in ("model-aware", "robust") and model is None:
        raise ValueError(f"test {test!r} needs model=. Pass the model that may have written the text, or test='sum'.")
    keys = keys_to_test(key, "key")
    scorer = _scorer(model) if model is not None and test != "sum" else None
    ids, source = _token_ids(text, "text", tokenizer, model, scorer)
    prompt_ids = None if prompt is None else _token_ids(prompt, "prompt", tokenizer, model, scorer)[0]
    whole = ids if prompt_ids is None else np.concatenate([prompt_ids, ids])
    log_probabilities = None
    if scorer is not None and len(ids):
        (statistics,) = scorer.score(
            [ids],
            prompt=None if prompt_ids is None else [prompt_ids],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        log_probabilities = statistics.log_prob
    results = [_test_key(whole, len(whole) - len(ids), one, test, log_probabilities) for one in keys]
    combined = combine.over_keys(results)
    if source is not None:
        note = f"Token ids come from tokenizer {source.name!r} (sha256 {source.sha256[:16]}), the generator's own."
        combined = replace(combined, assumptions=(*combined.assumptions, note))
    return combined


def _test_key(
    whole: Words,
    prompt_length: int,
    key: SecretKey,
    test: Test,
    log_probabilities: npt.NDArray[np.float64] | None,
) -> TestResult:
    found = watermark.pivots(whole, key)
    if prompt_length:
        # The prompt gives context and is not itself tested; what it already showed is not counted again.
        counted = found.positions >= prompt_length
        n_text = len(whole) - prompt_length
        full = min(n_text, max(0, len(whole) - watermark.config_of(key).window))
        found = watermark.Pivots(
            found.positions[counted] - prompt_length, found.words[counted], n_text, full - int(np.sum(counted))
        )
    result = _run(found, test, log_probabilities)
    note: tuple[str, ...] = ()
    if key.state == "revoked":
        note = (f"Key {key.id!r} was revoked ({key.info.revoked}); whoever learned it could have made the mark.",)
    return replace(result, key_id=key.id, scheme=key.config.tag, assumptions=(*result.assumptions, *note))


def _run(found: watermark.Pivots, test: Test, log_probabilities: npt.NDArray[np.float64] | None) -> TestResult:
    if log_probabilities is None:
        return gumbel.sum_test(found)
    log_p = log_probabilities[found.positions]
    # A token that the model could not score (no context at all) gets probability 1: it has no weight.
    log_p = np.where(np.isnan(log_p), 0.0, log_p)
    if test == "model-aware":
        return gumbel.model_aware_test(found, log_p)
    if test == "robust":
        return gumbel.robust_test(found, log_p)
    if len(found.words) == 0:
        return gumbel.sum_test(found)
    parts = (gumbel.sum_test(found), gumbel.model_aware_test(found, log_p), gumbel.robust_test(found, log_p))
    return combine.best_of(parts, test="gumbel-best-of-three")


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


def _token_ids(
    text: Any, name: str, tokenizer: Any, model: Any, scorer: ModelScorer | None
) -> tuple[Words, LoadedTokenizer | None]:
    if isinstance(text, (bytes, bytearray)):
        text = decode_text(bytes(text))
    if not isinstance(text, str):
        if not isinstance(text, Iterable) or isinstance(text, (dict, set)):
            raise ValueError(f"{name} must be a string, UTF-8 bytes or token ids, got {type(text).__name__}.")
        try:
            return watermark.token_ids(np.asarray(text)), None
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
