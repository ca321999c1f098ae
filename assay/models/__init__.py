"""Loading causal language models: the bundled one, a local folder, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay._errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DEFAULT = Path(__file__).resolve().parent / "default"
"""Folder of the bundled model: config, safetensors weights, tokenizer.json and model card."""


def _path(spec: str | os.PathLike[str] | None) -> str:
    if spec is None or spec == "default":
        return str(DEFAULT)
    path = Path(spec)
    if not path.is_dir() and (str(spec).startswith((".", os.sep)) or len(Path(spec).parts) > 2):
        raise ValueError(f"model must be 'default', a folder or a hub id; there is no folder at {str(spec)!r}.")
    return str(spec)


def load_model(spec: Any = None, *, device: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Parameters
    ----------
    spec
        None or "default" for the bundled model; a folder with config.json and safetensors weights; a hub id; or a
        model object, which is returned as it is.
    device
        torch device name; default "cpu".
    dtype
        "float32", "bfloat16" or "float16".

    Raises
    ------
    MissingDependencyError
        If torch or transformers is not installed.
    ValueError
        If there is no model at that path, or dtype is not one of the three.
    """
    if spec is not None and not isinstance(spec, (str, os.PathLike)):
        return spec
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError("Models need torch and transformers: pip install 'assay[models]'.") from error
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {sorted(dtypes)}, got {dtype!r}.")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # Only safetensors: a pickled checkpoint could run code.
        model = AutoModelForCausalLM.from_pretrained(_path(spec), dtype=dtypes[dtype], use_safetensors=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    if device is not None:
        model.to(device)
    model.eval()
    return model


def load_tokenizer_for_generation(spec: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerFast:
    """The transformers tokenizer that belongs to `load_model(spec)`, for prompts and decoding."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError("Models need torch and transformers: pip install 'assay[models]'.") from error
    return AutoTokenizer.from_pretrained(_path(spec))


__all__ = ["DEFAULT", "load_model", "load_tokenizer_for_generation"]
