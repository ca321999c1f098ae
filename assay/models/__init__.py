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


def _path(spec: str | os.PathLike[str] | None, name: str) -> str:
    if spec is None or spec == "default":
        return str(DEFAULT)
    path = Path(spec)
    if not path.is_dir() and (str(spec).startswith((".", os.sep)) or len(Path(spec).parts) > 2):
        raise ValueError(f"{name} must be 'default', a folder or a hub id; there is no folder at {str(spec)!r}.")
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
        If there is no usable model at that path or under that id, or dtype is not one of the three.
    """
    if spec is not None and not isinstance(spec, (str, os.PathLike)):
        return spec
    try:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError("Models need torch and transformers: pip install 'assay[models]'.") from error
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {sorted(dtypes)}, got {dtype!r}.")
    path = _path(spec, "model")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # Only safetensors: a pickled checkpoint could run code.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtypes[dtype], use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(_unusable("model", spec, "config.json and model.safetensors", error)) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if device is not None:
        model.to(device)
    model.eval()
    return model


def load_tokenizer_for_generation(spec: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerFast:
    """The transformers tokenizer that belongs to `load_model(spec)`, for prompts and decoding.

    Raises
    ------
    MissingDependencyError
        If transformers is not installed.
    ValueError
        If there is no usable tokenizer at that path or under that id.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError("Models need torch and transformers: pip install 'assay[models]'.") from error
    path = _path(spec, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged tokenizer.json raises KeyError or bare Exception
        raise ValueError(_unusable("tokenizer", spec, "tokenizer.json", error)) from error


def _unusable(name: str, spec: Any, holds: str, error: Exception) -> str:
    """What was wrong with a spec: transformers' own message runs over many lines and names no argument."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{name} must be 'default', a folder that holds {holds}, or a hub id that can be fetched, got {str(spec)!r}: "
        f"{first}"
    )


__all__ = ["DEFAULT", "load_model", "load_tokenizer_for_generation"]
