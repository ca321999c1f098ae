"""Scoring models that several processes load: what one's scores depend on, and the same one loaded again elsewhere.

Scores compare only where weights, precision, way of reading and tokenizer are equal, so these are recorded and checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.detection.text import DEFAULT_MODEL, load_tokenizer
from assay.kernels.scoring.devices import dtype_of

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer


@dataclass(frozen=True, kw_only=True)
class ScorerRecord:
    """What a score depends on, apart from the text; see `ModelScorer.identity`.

    Attributes
    ----------
    name
        For people; the only entry that may differ.
    weights_sha256, tokenizer_sha256
        Hashes of the weights and of the tokenizer's canonical JSON.
    dtype, logits_dtype, window, stride, bos
        Precision and way of reading.
    """

    name: str
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    logits_dtype: str
    window: int
    stride: int
    bos: int | None

    @classmethod
    def of(cls, scorer: ModelScorer) -> ScorerRecord:
        """The record of a scorer that has a tokenizer."""
        found = scorer.identity()
        # The bundled model lies elsewhere on every machine.
        name = "default" if Path(found["name"]) == DEFAULT_MODEL else found["name"]
        return cls(**found | {"name": name}, tokenizer_sha256=load_tokenizer(scorer.tokenizer).sha256)

    def differences(self, other: ScorerRecord) -> list[str]:
        """Names of the entries, `name` apart, in which two records differ."""
        return [name for name, value in self.pins().items() if value != getattr(other, name)]

    def pins(self) -> dict[str, Any]:
        """All of it but the name, JSON-ready."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


def load_scorer(model: str, record: ScorerRecord, device: str, tokenizer: Any = None) -> ModelScorer:
    """A model that reads as the recorded one did: in the same precision and the same windows.

    Parameters
    ----------
    model
        "default", a folder or a hub id.
    record
        Of the scorer that is to be loaded again. Whether the weights are its own is not checked here.
    device
        "cpu" or "cuda".
    tokenizer
        What `ModelScorer` takes; None for that of the model.
    """
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model, load_tokenizer_for_generation

    return ModelScorer(
        load_model(model, device=device, dtype=record.dtype),
        load_tokenizer_for_generation(model) if tokenizer is None else tokenizer,
        window=record.window,
        stride=record.stride,
        add_bos=record.bos is not None,
        logits_dtype=dtype_of(record.logits_dtype),
    )


def anywhere(model: str) -> str:
    """A model's name for processes that may work in another directory."""
    return str(Path(model).resolve()) if model != "default" and Path(model).is_dir() else model
