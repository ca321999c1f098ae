"""A causal language model taken apart: the base model that gives hidden states, and its vocabulary projection.

Architectures differ in what they do to the logits, so the parts are tried against the whole before they are trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from assay.kernels.scoring.head import Head, Projection


@dataclass(frozen=True, eq=False)
class CausalModel:
    """A model as the scorer calls it.

    Attributes
    ----------
    model
        The whole model.
    base
        Gives the last hidden states.
    head
        The projection to logits; None where the parts do not make the whole, and the whole is called for its logits.
    reason
        Why `head` is None; empty otherwise.
    """

    model: Any
    base: Any
    head: Head | None
    reason: str

    @property
    def vocabulary(self) -> int:
        """Number of token ids the model reads."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """Last hidden states, shape (batch, length, D)."""
        # use_cache=False: a cache would cost memory and, for packed inputs, silently change the attention.
        out: torch.Tensor = self.base(input_ids=inputs.to(self.device), use_cache=False)[0]
        return out

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, length, V)."""
        out: torch.Tensor = self.model(input_ids=inputs.to(self.device), use_cache=False).logits
        return out


def take_apart(model: Any) -> CausalModel:
    """Find base model and projection, and try them on a few tokens.

    Raises
    ------
    ValueError
        If the model is an encoder-decoder, which has no law for a document alone.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("model must be a causal language model, got an encoder-decoder. Use a decoder-only model.")
    base = model.base_model
    layer = model.get_output_embeddings()
    whole = CausalModel(model, base, None, "")
    if base is model:
        return CausalModel(model, base, None, "the model does not name its base model")
    if layer is None or getattr(layer, "weight", None) is None or layer.weight.ndim != 2:
        return CausalModel(model, base, None, "the model has no linear output layer")
    head = Head(
        weight=layer.weight.detach(),
        bias=None if getattr(layer, "bias", None) is None else layer.bias.detach(),
        scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )
    if not _agrees(whole, head):
        return CausalModel(model, base, None, "its logits are not those of its last hidden states and output layer")
    return CausalModel(model, base, head, "")


@torch.inference_mode()
def _agrees(whole: CausalModel, head: Head) -> bool:
    ids = torch.arange(min(whole.vocabulary, 16))[None]
    expected = whole.logits(ids)[0]
    hidden = whole.hidden(ids)[0]
    if hidden.shape[-1] != head.weight.shape[1] or expected.shape[-1] != head.weight.shape[0]:
        return False
    found = Projection(hidden, head, torch.float32).whole()
    # The model rounds its logits to its own type, and sums in another order; what an architecture adds is larger.
    tolerance = max(2 * torch.finfo(expected.dtype).eps, 1e-4) * float(expected.abs().max())
    return bool((found - expected.float()).abs().max() <= tolerance + 1e-5)
