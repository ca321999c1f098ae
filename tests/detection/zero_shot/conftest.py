"""Texts that the bundled model really wrote under several decoding rules, generated once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.kernels.scoring.decoding import Decoding

LENGTH, BATCH = 60, 50
SECOND_SEED = Path(__file__).resolve().parents[3] / "data" / "models" / "second-seed"


def generate(model: Any, count: int, rule: Decoding, *, seed: int, length: int = LENGTH) -> np.ndarray:
    """Token ids of texts that transformers generates from the beginning-of-sequence token, shape (count, length)."""
    import torch
    from transformers import GenerationConfig

    # No end token: stopping at one, or forbidding it, would change the law.
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=length,
        temperature=rule.temperature,
        top_k=rule.top_k or 0,
        top_p=rule.top_p or 1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    # The model's own defaults would bring the end token back.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    out = []
    try:
        for batch in range(-(-count // BATCH)):  # whole batches, so that a longer list begins with the shorter one
            torch.manual_seed(seed + batch)
            inputs = torch.full((BATCH, 1), model.config.bos_token_id)
            mask = torch.ones_like(inputs)
            out.append(model.generate(inputs, attention_mask=mask, generation_config=config)[:, 1:].numpy())
    finally:
        model.generation_config = kept
    ids = np.concatenate(out)[:count]
    assert ids.shape == (count, length)
    return ids


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bundled() -> Any:
    """A scorer of the bundled model."""
    pytest.importorskip("transformers")
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model, load_tokenizer_for_generation

    return ModelScorer(load_model(), load_tokenizer_for_generation())


@pytest.fixture(scope="session")
def second_seed(bundled: Any) -> Any:
    """A scorer of the bundled model's hard pair: the same architecture, books and tokenizer, another seed."""
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model

    return ModelScorer(load_model(SECOND_SEED), bundled.tokenizer)


@pytest.fixture(scope="session")
def own_texts(bundled: Any) -> Callable[..., np.ndarray]:
    """The bundled model's texts under a rule; the first ones of a longer list if that was made before."""
    made: dict[tuple[Decoding, int], np.ndarray] = {}

    def texts(count: int, rule: Decoding, length: int = LENGTH) -> np.ndarray:
        key = rule, length
        if key not in made or len(made[key]) < count:
            made[key] = generate(bundled.model, count, rule, seed=20261121, length=length)
        return made[key][:count]

    return texts
