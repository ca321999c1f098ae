"""Every scheme that draws token by token: written by `generate` with the bundled model, found by `detect`."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from scheme_cases import SETTINGS, watermark_schemes

import assay
from assay.models import load_model
from assay.watermark import for_transformers
from assay.watermark.keys import SecretKey
from assay.watermark.schemes import newest

NEW_TOKENS = 96


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model()


def key_of(scheme: str, number: int) -> SecretKey:
    secret = hashlib.sha256(f"generation {number}".encode()).digest()
    return SecretKey(secret, id=f"generation-{number}", config=newest(scheme)(**SETTINGS.get(scheme, {})))


@pytest.mark.parametrize("scheme", [name for name in watermark_schemes() if name != "sequence"])
def test_what_generate_writes_detect_finds(scheme: str, model: Any) -> None:
    prompt = torch.tensor([[5, 300, 41, 7, 99, 612]])
    mark = for_transformers(key_of(scheme, 0), seed=1)
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=NEW_TOKENS, top_k=0,
        pad_token_id=0, eos_token_id=None, watermarking_config=mark,
    )  # fmt: skip
    text = ids[0, prompt.shape[1] :].numpy()
    found = assay.detect(text, key_of(scheme, 0), prompt=prompt[0].numpy())
    assert found.pvalue < 1e-4
    assert found.scheme == key_of(scheme, 0).config.tag
    # The first tokens count too, where the scheme reads the prompt or the completion alone.
    assert found.n_tokens == NEW_TOKENS
    # Another key sees nothing: a false alarm has probability 1e-3, and the keys are fixed.
    assert assay.detect(text, key_of(scheme, 1), prompt=prompt[0].numpy()).pvalue > 1e-3


def test_a_payload_is_written_and_read(model: Any) -> None:
    from assay.detection.payload import decode

    key, prompt = key_of("payload-gumbel", 0), torch.tensor([[5, 300, 41, 7, 99, 612]])
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=NEW_TOKENS, top_k=0,
        pad_token_id=0, eos_token_id=None, watermarking_config=for_transformers(key, seed=1, payload=11),
    )  # fmt: skip
    found = decode(np.asarray(ids[0]), key)
    assert found.payload == 11
    with pytest.raises(ValueError, match="which carries none"):
        for_transformers(key_of("gumbel", 0), payload=11)
    with pytest.raises(ValueError, match="payload"):
        for_transformers(key, payload=16)
