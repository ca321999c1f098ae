"""The end of a corpus run: Benjamini-Hochberg over all documents, combined files, the summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from assay._errors import RunError
from assay.detection.corpus.ledger import (
    Ledger,
    ShardRecord,
    file_sha256,
    shard_paths,
    write_atomically,
    writing_atomically,
)
from assay.detection.corpus.sources import InputFile
from assay.detection.multiplicity import benjamini_hochberg

SCHEMA = "assay.corpus-summary/1"
RESULTS_SCHEMA = "assay.corpus-results/1"
_ROWS_PER_GROUP = 1 << 16
_TUPLES = ("keys", "tests", "assumptions")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a corpus run found; `summary.json` holds the same.

    Attributes
    ----------
    documents
        Documents tested, one row each in `results.parquet`.
    flagged
        Documents with q-value at most `fdr`.
    fdr
        False discovery rate of the flags: the expected share of unmarked documents among them is at most this.
    rejects
        Rows and files that could not be tested, one line each in `rejects.jsonl`.
    rejects_by_reason
        Their number by reason.
    n_tokens, n_scored
        Sums over the documents.
    inputs
        Input files; `inputs.jsonl` names them with size and SHA-256.
    files_skipped
        Files in the folders named whose names end in no format that is read; hidden ones are not counted.
    keys
        Public description of each key tested; see `KeyInfo.to_dict`. Empty where no key was.
    calibration, calibration_info
        Id of the calibration, where that is what documents were tested against, and its public description; see
        `Calibration.info`.
    tokenizer, model
        Name and sha256 of the tokenizer; of a run of keys with a model, what that is and how it was sampled.
    options
        Columns and shard sizes.
    null, tests, assumptions
        What was tested, by which tests, and what the error rates rest on.
    version
        Version of Assay.
    started
        UTC time of the first start, ISO 8601.
    resumed
        Whether shards were left from an earlier start.
    seconds
        Wall-clock time since the last start.
    documents_per_second, tokens_per_second
        Of the shards tested since the last start, over `seconds`.
    out
        The output folder; not in `summary.json`, which may be moved.
    already_finished
        Whether the call that returned this found the run finished and tested nothing; not in `summary.json`.
    """

    documents: int
    flagged: int
    fdr: float
    rejects: int
    rejects_by_reason: dict[str, int] = field(default_factory=dict)
    n_tokens: int
    n_scored: int
    inputs: int
    files_skipped: int = 0
    keys: tuple[dict[str, Any], ...]
    calibration: str | None = None
    calibration_info: dict[str, Any] | None = None
    tokenizer: dict[str, str]
    model: dict[str, Any] | None = None
    options: dict[str, Any]
    null: str
    tests: tuple[str, ...] = ()
    assumptions: tuple[str, ...]
    version: str
    started: str
    resumed: bool
    seconds: float
    documents_per_second: float
    tokens_per_second: float
    out: Path
    already_finished: bool = field(default=False, compare=False)

    @property
    def exit_code(self) -> int:
        """0 where every row was tested, 3 where some went to the rejects."""
        return 3 if self.rejects else 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, without the folder."""
        here = ("out", "already_finished")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in here}
        return {"schema": SCHEMA, **values, **{name: list(values[name]) for name in _TUPLES}}

    @classmethod
    def read(cls, out: Path | str) -> RunSummary:
        """The summary of a finished run from its output folder.

        Raises
        ------
        RunError
            If the folder holds no summary that this version reads.
        """
        path = Path(out) / "summary.json"
        try:
            values = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise RunError(f"out: there is no summary of a finished run at {str(path)!r}.") from error
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise RunError(f"out: its summary has schema {schema!r}, not {SCHEMA!r}. Use the version that wrote it.")
        tuples = {name: tuple(values.get(name, ())) for name in _TUPLES}
        return cls(**values | tuples, out=Path(out))


@dataclass(frozen=True)
class Combined:
    """What combining the shards counted."""

    flagged: int
    n_scored: int
    rejects_by_reason: dict[str, int]
    sha256: dict[str, str]


def combine(
    ledger: Ledger,
    out: Path,
    inputs: Sequence[InputFile],
    *,
    columns: Mapping[str, type],
    fdr: float,
    metadata: dict[str, str],
) -> Combined:
    """Write `results.parquet`, `rejects.jsonl` and `inputs.jsonl` from the finished shards.

    Rows come in the order of the corpus, whatever order the shards were finished in.

    Parameters
    ----------
    ledger
        With every shard finished.
    columns
        Of the shards, from `worker.all_columns`.
    fdr
        Level of the flags, in (0, 1).
    metadata
        Put into the Parquet file's schema.

    Raises
    ------
    RunError
        If a shard's file is not what the manifest says.
    """
    records = [ledger.shards[index] for index in range(len(ledger.shards))]
    log_qvalues = benjamini_hochberg(_log_pvalues(ledger, records))
    flags = log_qvalues <= math.log(fdr)
    n_scored = _write_results(ledger, records, out / "results.parquet", columns, log_qvalues, flags, metadata)
    reasons = _write_rejects(ledger, records, out / "rejects.jsonl")
    _write_inputs(ledger, inputs, out / "inputs.jsonl")
    names = ("results.parquet", "rejects.jsonl", "inputs.jsonl")
    return Combined(int(np.sum(flags)), n_scored, reasons, {name: file_sha256(out / name) for name in names})


def _log_pvalues(ledger: Ledger, records: Sequence[ShardRecord]) -> npt.NDArray[np.float64]:
    from pyarrow import parquet

    values = np.empty(sum(record.documents for record in records), dtype=np.float64)
    start = 0
    for record in records:
        path = shard_paths(ledger.folder / "shards", record.shard)[0]
        try:
            if file_sha256(path) != record.sha256:
                raise FileNotFoundError
        except FileNotFoundError:
            raise RunError(f"shard {path} was changed by something else. The same command tests it again.") from None
        column = parquet.read_table(path, columns=["log_pvalue"])["log_pvalue"]
        values[start : start + record.documents] = column.to_numpy()
        start += record.documents
    return values


def _write_results(
    ledger: Ledger,
    records: Sequence[ShardRecord],
    path: Path,
    columns: Mapping[str, type],
    log_qvalues: npt.NDArray[np.float64],
    flags: npt.NDArray[np.bool_],
    metadata: dict[str, str],
) -> int:
    """Write the shards' rows with their q-values, in row groups that do not depend on the shards; returns n_scored."""
    import pyarrow as pa
    from pyarrow import parquet

    from assay.detection.corpus.worker import arrow_schema

    added = [("log_qvalue", pa.float64()), ("qvalue", pa.float64()), ("flagged", pa.bool_())]
    schema = pa.schema([*arrow_schema(columns), *(pa.field(*column) for column in added)], metadata=metadata)
    n_scored = start = 0
    with (
        writing_atomically(path) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for group in _groups(ledger, records):
            n_scored += int(np.sum(group["n_scored"].to_numpy()))
            rows = slice(start, start + group.num_rows)
            start += group.num_rows
            log_q = log_qvalues[rows]
            all_of_them = [*group.columns, pa.array(log_q), pa.array(np.exp(log_q)), pa.array(flags[rows])]
            writer.write_table(pa.table(all_of_them, schema=schema), row_group_size=_ROWS_PER_GROUP)
    return n_scored


def _groups(ledger: Ledger, records: Sequence[ShardRecord]) -> Iterator[Any]:
    """The shards' tables, put together to row groups of a fixed size."""
    import pyarrow as pa
    from pyarrow import parquet

    pending: list[Any] = []
    for record in records:
        pending.append(parquet.read_table(shard_paths(ledger.folder / "shards", record.shard)[0]))
        while sum(table.num_rows for table in pending) >= _ROWS_PER_GROUP:
            whole = pa.concat_tables(pending)
            yield whole.slice(0, _ROWS_PER_GROUP).combine_chunks()
            pending = [whole.slice(_ROWS_PER_GROUP)]
    rest = pa.concat_tables(pending).combine_chunks() if pending else None
    if rest is not None and rest.num_rows:
        yield rest


def _write_rejects(ledger: Ledger, records: Sequence[ShardRecord], path: Path) -> dict[str, int]:
    reasons: Counter[str] = Counter()
    with writing_atomically(path) as temporary, open(temporary, "wb") as target:
        for record in records:
            if record.rejects_sha256 is None:
                continue
            with open(shard_paths(ledger.folder / "shards", record.shard)[1], "rb") as lines:
                for line in lines:
                    target.write(line)
                    reasons[orjson.loads(line)["reason"]] += 1
    return dict(reasons.most_common())


def _write_inputs(ledger: Ledger, inputs: Sequence[InputFile], path: Path) -> None:
    rows = (
        {"path": file.name, "size": file.size, "sha256": ledger.inputs.get(index)} for index, file in enumerate(inputs)
    )
    write_atomically(path, b"".join(orjson.dumps(row) + b"\n" for row in rows))
