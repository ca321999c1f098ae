"""A small random language model, in double precision so that no two scores tie by rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Any]:
    """A Llama of 512 tokens with fixed random weights: make(seed, noise) differs from make(seed) by `noise`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, noise: float = 0.0) -> Any:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * weight.std() * torch.randn_like(weight) if noise else 0.0
        return model

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., Any]) -> Any:
    """The tests' model; tests must not change it."""
    return make_tiny_model()
