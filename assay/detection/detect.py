"""`detect`: one document, one key or many, with or without a model, to one `TestResult`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from assay.detection import combine
from assay.detection.inputs import model_view_of, scorer_of, token_ids_of
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.detection.testers import Tester, tester
from assay.kernels.chacha import Words
from assay.watermark.keys import SecretKey, use_key


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
        The prompt where it is known: lets the first tokens count and sharpens the model's probabilities. A string is
        read as a generator reads it, with the beginning-of-sequence token of tokenizers that put one.
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

    Notes
    -----
    Linear in the length of the text; about as long as tokenising it, without a model. The null laws, their proofs and
    sources are on the page "Tests and null laws".

    Examples
    --------
    >>> import assay
    >>> result = assay.detect("Nobody marked this letter, and nobody could have.", assay.SecretKey.generate("press"))
    >>> result.key_id, result.n_scored > 0, 0.0 < result.pvalue <= 1.0
    ('press', True, True)
    """
    keys = keys_to_test(key, "key")
    testers = [_tester(one, test, has_model=model is not None) for one in keys]
    wanted = model is not None and any(test == "auto" or test in known.NEEDS_MODEL for known in testers)
    scorer = scorer_of(model) if wanted else None
    ids, source = token_ids_of(text, "text", tokenizer, model, scorer)
    prompt_ids = None if prompt is None else token_ids_of(prompt, "prompt", tokenizer, model, scorer)[0]
    whole = ids if prompt_ids is None else np.concatenate([prompt_ids, ids])
    view = None
    if scorer is not None and len(ids):
        decoding = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        view = model_view_of(scorer, ids, prompt_ids, decoding)
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
