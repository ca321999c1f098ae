"""Files of released kernel sums: settings as JSON and noisy integers, in .npz, never pickled."""

from __future__ import annotations

import dataclasses
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from assay.privacy.kde.blocks import Arrays

SCHEMA = "assay.private-kde/1"


def write(path: str | os.PathLike[str], kind: str, settings: dict[str, Any], plan: Any, arrays: Arrays) -> None:
    """Write a new file; one that exists is not touched."""
    head = {
        "schema": SCHEMA,
        "class": kind,
        "settings": {name: _to_json(value) for name, value in settings.items()},
        "design": {"name": plan.design.name} | dataclasses.asdict(plan.design),
        "law": plan.terms.law,
        "amount": _to_json(plan.terms.amount),
        "noise_error": plan.noise_error,
        "approximation": plan.approximation,
    }
    raw = np.frombuffer(json.dumps(head, sort_keys=True).encode("ascii"), dtype=np.uint8)
    named: dict[str, Any] = {"head": raw, **arrays}
    with open(path, "xb") as file:
        np.savez(file, **named)


def read(path: Path, kind: str) -> tuple[dict[str, Any], Arrays]:
    """The head, its values restored, and the arrays.

    Raises
    ------
    ValueError
        If the file holds another kind; a damaged file raises other errors too.
    """
    # Opened here, because numpy leaves a damaged file open.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    head = json.loads(arrays.pop("head").tobytes())
    if head["schema"] != SCHEMA or head["class"] != kind:
        raise ValueError(f"it holds {head['class']} ({head['schema']})")
    head["settings"] = {name: _from_json(value) for name, value in head["settings"].items()}
    head["design"] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in head["design"].items()
    }
    head["amount"] = _from_json(head["amount"])
    return head, arrays


def check_arrays(arrays: Arrays, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError unless there are exactly these arrays, of int64."""
    if {name: one.shape for name, one in arrays.items()} != shapes:
        raise ValueError("arrays are missing or have the wrong shape")
    if any(one.dtype != np.int64 for one in arrays.values()):
        raise ValueError("arrays must be int64")


def _to_json(value: Any) -> Any:
    if isinstance(value, Fraction):
        return {"fraction": str(value)}
    if isinstance(value, np.ndarray | list | tuple):
        return {"array": np.asarray(value, dtype=np.float64).tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return Fraction(value["fraction"]) if "fraction" in value else np.array(value["array"])
    return value
