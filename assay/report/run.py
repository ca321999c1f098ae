"""From the folder of a corpus run to its report: columns that fit for millions of documents, texts only of excerpts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay._errors import RunError
from assay.conformal import human_corpus
from assay.detection.corpus.ledger import file_sha256
from assay.detection.corpus.results import RESULTS_SCHEMA, RunSummary
from assay.detection.multiplicity import benjamini_hochberg
from assay.report import canonical
from assay.report.build import NO_SOURCE, Circumstances, assemble, calibration_record, check_fdr
from assay.report.columns import Identity, ResultColumns, most_certain
from assay.report.excerpts import clean
from assay.report.monitoring import watched
from assay.report.records import (
    CalibrationRecord,
    InputFile,
    KeyRecord,
    RejectReason,
    TokenizerRecord,
)
from assay.report.report import Report
from assay.report.reread import excerpts_of_run

if TYPE_CHECKING:
    pass

_OUTPUTS = ("results.parquet", "inputs.jsonl", "rejects.jsonl", "summary.json")
_NUMBERS = ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped")
_IDENTITY = ("doc_id", "file", "row", "scheme")
# Columns that a table lacks because its null hypothesis knows of no keys, by the table's schema.
_LACKING: Mapping[str, frozenset[str]] = {
    RESULTS_SCHEMA: frozenset(),
    human_corpus.SCHEMA: frozenset(("n_repeats_dropped", "key_id", "scheme")),
}


def from_run(
    out_dir: Path,
    *,
    fdr: float | None,
    keys: Any,
    tokenizer: Any,
    excerpts: int,
    title: str | None,
    listed: int,
    made: datetime | None,
    monitoring: Iterable[Any],
) -> Report:
    """See `Report.from_run`."""
    if isinstance(excerpts, bool) or not isinstance(excerpts, int) or excerpts < 0:
        raise ValueError(f"excerpts must be an integer of at least 0, got {excerpts!r}. 0 shows no text.")
    summary = RunSummary.read(out_dir)
    columns = _columns(out_dir / "results.parquet")
    fdr = summary.fdr if fdr is None else fdr
    check_fdr(fdr)
    shown = {}
    if excerpts and keys is not None and summary.keys:
        flagged = benjamini_hochberg(columns.log_pvalue) <= math.log(fdr)
        rows = [row for row in most_certain(columns.log_pvalue, columns.log_evalue, excerpts) if flagged[row]]
        shown = excerpts_of_run(columns, rows, summary, keys, tokenizer)
    circumstances = Circumstances(
        title=title,
        made=made,
        listed=listed,
        keys=[_key_record(description) for description in summary.keys],
        calibrations=_calibrations(summary),
        tests=summary.tests,
        nulls=(summary.null,),
        assumptions=summary.assumptions,
        inputs=_inputs(out_dir / "inputs.jsonl"),
        outputs=[_output(out_dir / name) for name in _OUTPUTS],
        tokenizer=TokenizerRecord(name=clean(summary.tokenizer["name"]), sha256=summary.tokenizer["sha256"]),
        rejects=[RejectReason(reason=reason, rows=rows) for reason, rows in summary.rejects_by_reason.items()],
        watched=watched(monitoring),
    )
    return assemble(columns, fdr, shown, circumstances)


def _calibrations(summary: RunSummary) -> list[CalibrationRecord]:
    if summary.calibration is None:
        return []
    return [calibration_record(summary.calibration_info or {"id": summary.calibration})]


def _columns(path: Path) -> ResultColumns:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        schema = (file.schema_arrow.metadata or {}).get(b"assay.schema", b"").decode()
        if schema not in _LACKING:
            known = " or ".join(map(repr, _LACKING))
            raise RunError(f"{path} has schema {schema!r}, not {known}. Use the version that wrote it.")
        lacking = _LACKING[schema]
        names = [name for name in (*_NUMBERS, "source", "key_id") if name not in lacking]
        table = parquet.read_table(path, columns=names, read_dictionary=["source", "key_id"])
        if "key_id" in lacking:
            table = table.append_column("key_id", pa.nulls(len(table), pa.dictionary(pa.int32(), pa.string())))
            table = table.append_column("n_repeats_dropped", pa.array(np.zeros(len(table), dtype=np.int64)))
        numbers = {name: table[name].to_numpy() for name in _NUMBERS}
        sources, source_codes = _encoded(table["source"], NO_SOURCE)
        key_ids, key_codes = _encoded(table["key_id"], None)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunError(f"{path} is not the table of a corpus run: {error}. Run `assay detect` again.") from error
    return ResultColumns(
        **numbers,
        sources=sources,
        source_codes=source_codes,
        key_ids=key_ids,
        key_codes=key_codes,
        identify=lambda rows: _identities(file, [name for name in _IDENTITY if name not in lacking], rows),
    )


def _encoded(column: Any, missing: str | None) -> tuple[list[str], Any]:
    """Distinct strings and the place of each value among them; null becomes `missing`, or place -1."""
    encoded = column.unify_dictionaries().combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    names = encoded.dictionary.to_pylist()
    if missing is not None and np.any(codes < 0):
        codes[codes < 0] = len(names)
        names = [*names, missing]
    return names, codes


def _identities(file: Any, columns: Sequence[str], rows: Sequence[int]) -> list[Identity]:
    """Identities of some rows, reading only the row groups that hold them."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    groups = np.searchsorted(ends, rows, side="right")
    found: dict[int, Identity] = {}
    for group in sorted(set(groups.tolist())):
        inside = [row for row, place in zip(rows, groups, strict=True) if place == group]
        table = file.read_row_group(group, columns=columns)
        start = int(ends[group]) - sizes[group]
        for row, values in zip(inside, table.take([row - start for row in inside]).to_pylist(), strict=True):
            found[row] = Identity(**values)
    return [found[row] for row in rows]


def _inputs(path: Path) -> list[InputFile]:
    import orjson

    try:
        rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        return [
            InputFile(name=row["path"], sha256=row["sha256"], size=row["size"] if row["size"] >= 0 else None)
            for row in rows
        ]
    except (OSError, KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise RunError(f"{path} is not the list of inputs of a corpus run. Run `assay detect` again.") from error


def _output(path: Path) -> InputFile:
    try:
        return InputFile(name=path.name, sha256=file_sha256(path), size=path.stat().st_size)
    except OSError as error:
        raise RunError(f"{path} of the run cannot be read: {error.strerror}. Run `assay detect` again.") from error


def _key_record(description: Mapping[str, Any]) -> KeyRecord:
    return KeyRecord(
        id=description["id"],
        scheme=f"{description['scheme']}/{description['version']}",
        parameters=canonical.encode(description["parameters"]).decode(),
        fingerprint=description["fingerprint"],
        state=description["state"],
        flagged=0,
    )
