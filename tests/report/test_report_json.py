"""report.json: exact round trip, canonical bytes, strict reading, the published schema."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay.report
from assay.detection.result import TestResult
from assay.report import Excerpt, Report, canonical
from assay.report.schema import json_schema

TEXT = st.text(max_size=12)
LOG = st.floats(max_value=0.0, allow_nan=False)


def row(doc_id: str, source: str, log_pvalue: float, log_evalue: float, n_tokens: int) -> tuple[str, str, TestResult]:
    found = TestResult(
        test="gumbel-sum",
        statistic=abs(log_pvalue) / 3,
        log_pvalue=log_pvalue,
        log_evalue=log_evalue,
        n_tokens=n_tokens,
        n_scored=max(0, n_tokens - 4),
        null="no key",
        alternative="greater",
        key_id="k",
        scheme="gumbel/1",
    )
    return doc_id, source, found


ROWS = st.builds(row, TEXT, TEXT, LOG, st.floats(allow_nan=False), st.one_of(st.integers(0, 5000), st.just(2**40)))


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, max_size=6), st.floats(1e-6, 0.5), TEXT, st.lists(st.one_of(st.none(), LOG), max_size=4))
def test_round_trip_is_exact(rows: list, fdr: float, title: str, tails: list) -> None:
    rows = [(f"{i}{doc_id}", source, found) for i, (doc_id, source, found) in enumerate(rows)]
    pieces = tuple(f"{title}{i}" for i in range(len(tails)))
    excerpts = [Excerpt(doc_id=rows[0][0], pieces=pieces, log_tail=tuple(tails))] if rows else []
    report = Report.from_results(rows, fdr=fdr, title=title, excerpts=excerpts)
    data = report.to_json()
    again = Report.from_json(data)
    assert again == report
    assert again.to_json() == data
    assert Report.from_json(data.decode()) == report
    assert Report.from_json(json.dumps(json.loads(data), indent=2)) == report


def test_full_report_round_trips_with_all_fields(full_report: Report) -> None:
    assert Report.from_json(full_report.to_json()) == full_report
    empty = [f.name for f in dataclasses.fields(full_report) if not getattr(full_report, f.name)]
    assert empty == ["sources_left_out", "inputs_left_out", "outputs", "tokenizer", "calibrations"]


def test_human_report_round_trips_with_all_fields(human_report: Report) -> None:
    assert Report.from_json(human_report.to_json()) == human_report
    empty = {f.name for f in dataclasses.fields(human_report) if not getattr(human_report, f.name)}
    assert empty == {
        *("sources_left_out", "inputs_left_out", "outputs", "tokenizer"),
        *("keys", "monitoring", "labelling"),
    }


def test_canonical_bytes_follow_the_documented_rule(any_report: Report) -> None:
    data = any_report.to_json()
    plain = json.loads(data)
    assert data == json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    for token in (b"NaN", b"Infinity", b"\n", b'": ', b', "'):
        assert token not in data
    assert plain["schema"] == "assay.report/1"


def test_infinite_evidence_is_written_as_a_string() -> None:
    report = Report.from_results([row("a", "s", -math.inf, math.inf, 50)])
    assert b'"log_pvalue":"-inf"' in report.to_json()
    assert b'"log_evalue":"inf"' in report.to_json()


def test_known_canonical_bytes() -> None:
    value = {"b": [1, 0.1, 1e-7, True, None], "a": 'é"\\\n\u2028\x7f', "A": -0.0}
    expected = '{"A":-0.0,"a":"é\\"\\\\\\n\u2028\x7f","b":[1,0.1,1e-07,true,null]}'.encode()
    assert canonical.encode(value) == expected
    assert canonical.decode(expected) == value
    for bad in (math.nan, math.inf, "\ud800"):
        with pytest.raises(ValueError, match=r"JSON compliant|surrogate"):
            canonical.encode([bad])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item, (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def test_every_field_is_checked_for_its_type(any_report: Report) -> None:
    plain = json.loads(any_report.to_json())
    tried = 0
    for path in places(plain):
        for new in ({"odd": 1}, [{"odd": [1]}], 1.5, True, {"odd": 1} if path else 3):
            broken = changed(plain, path, new)
            if type(new) is bool and isinstance(_at(plain, path), bool):
                continue
            if new == 1.5 and _takes_float(path):
                continue
            with pytest.raises(ValueError, match=r"must|schema"):
                Report.from_json(json.dumps(broken))
            tried += 1
    assert tried > 300


def _at(value: Any, path: tuple) -> Any:
    for step in path:
        value = value[step]
    return value


SERIES = {"scores", "point", "lower", "upper", "log_evalue"}
FLOATS = {"fdr", "low", "high", "band_level", "statistic", "log_tail", *SERIES}


def _takes_float(path: tuple) -> bool:
    names = [step for step in path if isinstance(step, str)]
    # A series as a whole is an array; its entries are numbers.
    if not names or path[-1] == "log_tail" or (path[0] == "monitoring" and path[-1] in SERIES):
        return False
    if names[-1] == "fdr":
        return False  # 1.5 is no rate
    return names[-1] in FLOATS or names[-1].startswith("log_")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"schema":"assay.report/2"}',
        '{"schema":"assay.report/1"}',
        "[" * 100_000,
        "\ufeff{}",
        '{"schema":"assay.report/1","schema":"assay.report/1"}',
    ],
)
def test_strangers_json_is_refused_with_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Report.from_json(text)
    with pytest.raises(ValueError, match=r"."):
        Report.from_json(text.encode())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"fdr":0.01', b'"fdr":NaN', "finite numbers, got NaN"),
        (b'"fdr":0.01', b'"fdr":1e999', "finite float"),
        (b'"fdr":0.01', b'"fdr":' + b"9" * 400, "finite float"),
        (b'"fdr":0.01', b'"fdr":0', r"fdr must be in \(0, 1\)"),
        (b'"fdr":0.01', b'"fdr":0.01,"fdr":0.01', "repeat a key"),
        (b'"fdr":0.01', b'"fdr":0.01,"extra":1', "unknown: \\['extra'\\]"),
        (b'"documents":300', b'"documents":true', "report.counts.documents must be of type int, got bool"),
        (b'"made":"2026-11-21T09:00:00Z"', b'"made":"yesterday"', "yesterday"),
    ],
)
def test_altered_json_is_refused(full_report: Report, old: bytes, new: bytes, message: str) -> None:
    data = full_report.to_json()
    assert old in data
    with pytest.raises(ValueError, match=message):
        Report.from_json(data.replace(old, new))


def valid(value: Any, schema: dict, root: dict) -> bool:
    """A validator of the part of JSON Schema that the published schema uses; unknown words fail."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema:
        return any(valid(value, one, root) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return bool(value == schema["const"])
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        assert schema["additionalProperties"] is False
        required = set(schema["required"])
        assert properties.keys() - required <= {"monitoring", "labelling", "calibrations"}
        return (
            isinstance(value, dict)
            and required <= value.keys() <= properties.keys()
            and all(valid(item, properties[name], root) for name, item in value.items())
        )
    if kind == "array":
        return isinstance(value, list) and all(valid(item, schema["items"], root) for item in value)
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    return isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))


def test_reports_follow_the_published_schema_and_broken_ones_do_not(any_report: Report, small_report: Report) -> None:
    published = json.loads(Path(assay.report.__file__).with_name("report.schema.json").read_text())
    assert published == json_schema(), "the records changed: raise the schema's version, write the file again"
    for report in (any_report, small_report, Report.from_results([])):
        assert valid(json.loads(report.to_json()), published, published)
    plain = json.loads(any_report.to_json())
    for path in places(plain):
        assert not valid(changed(plain, path, [["odd"]]), published, published)
    assert not valid({**plain, "extra": 1}, published, published)
