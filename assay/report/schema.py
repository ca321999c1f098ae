"""The JSON Schema of report.json, derived from the records, so that it cannot drift from what is written.

report.schema.json beside this file is its output. Reference: JSON Schema draft 2020-12.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from assay.report.records import field_types, optional_fields
from assay.report.report import Report

_FLOAT = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf"]}]}
_PRIMITIVES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    float: _FLOAT,
}


def json_schema() -> dict[str, Any]:
    """The schema as JSON-ready values: every field but the optional ones is required, and no other is allowed."""
    definitions: dict[str, Any] = {}
    root = _record(Report, definitions)
    root["properties"] = {"schema": {"const": Report.SCHEMA}, **root["properties"]}
    root["required"] = ["schema", *root["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": Report.SCHEMA,
        **root,
        "$defs": definitions,
    }


def _record(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    properties = {name: _value(hint, definitions) for name, hint in field_types(kind).items()}
    required = [name for name in properties if name not in optional_fields(kind)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint in _PRIMITIVES:
        return _PRIMITIVES[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        present = next(kind for kind in arguments if kind is not types.NoneType)
        return {"anyOf": [_value(present, definitions), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _value(arguments[0], definitions)}
    if not dataclasses.is_dataclass(hint):
        raise TypeError(f"a record must hold strings, numbers, tuples and records, got {hint!r}.")
    name = typing.cast(type, hint).__name__
    if name not in definitions:
        definitions[name] = {}  # before its fields, so that a record may hold itself
        definitions[name].update(_record(typing.cast(type, hint), definitions))
    return {"$ref": f"#/$defs/{name}"}
