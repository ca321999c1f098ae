"""Canonical JSON: one byte string for one value, so that a signature over it means the value.

Rule: UTF-8; object keys sorted by code point; no whitespace between tokens; strings escape only what JSON requires;
integers in decimal; floats as the shortest decimal that reads back exactly (Python's repr); no NaN or Infinity.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


def encode(value: Any) -> bytes:
    """The canonical JSON bytes of a JSON-ready value.

    Raises
    ------
    ValueError
        On NaN, an infinite float, or a string with a lone surrogate, which has no UTF-8 form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def decode(data: bytes | str) -> Any:
    """The value that `encode` wrote; any other JSON layout of it is read too.

    Raises
    ------
    ValueError
        If this is not UTF-8 JSON, nests too deeply, repeats a key in one object, or holds NaN or Infinity.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("JSON nests too deeply to be a report.") from error


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"JSON must hold finite numbers, got {token}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("JSON must not repeat a key within one object.")
    return found
