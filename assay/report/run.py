"""From the folder of a corpus run to its report: columns that fit for millions of documents, texts only of excerpts.

A text is shown only if testing it again gives the statistic that the run recorded, so an excerpt cannot come from
another version of the document, another key or another tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from assay.report.excerpts import clean, excerpt_of
from assay.report.monitoring import watched
from assay.report.records import (
    CalibrationRecord,
    Excerpt,
    InputFile,
    KeyRecord,
    RejectReason,
    TokenizerRecord,
)
from assay.report.report import Report

if TYPE_CHECKING:
    from assay.detection.result import TestResult
    from assay.detection.text import LoadedTokenizer
    from assay.watermark.keys import SecretKey

_OUTPUTS = ("results.parquet", "inputs.jsonl", "rejects.jsonl", "summary.json")
_NUMBERS = ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped")
_ROUNDING = 1e-3  # of a model's float32, seen through a statistic of a document's tokens
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
        shown = _excerpts(columns, rows, summary, _by_id(keys), tokenizer)
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


def _by_id(keys: Any) -> dict[str, SecretKey]:
    from assay.detection.detect import DetectionKeys
    from assay.watermark.keys import SecretKey

    if isinstance(keys, SecretKey):
        keys = [keys]
    listed: Iterable[Any] = keys.for_detection() if isinstance(keys, DetectionKeys) else keys
    return {key.id: key for key in listed}


def _excerpts(
    columns: ResultColumns, rows: Sequence[int], summary: RunSummary, keys: Mapping[str, SecretKey], tokenizer: Any
) -> dict[int, Excerpt]:
    if not rows:
        return {}
    loaded = _run_tokenizer(summary, tokenizer)
    test_again = _test_again(summary, loaded)
    fingerprints = {description["id"]: description["fingerprint"] for description in summary.keys}
    identities = dict(zip(rows, columns.identify(rows), strict=True))
    texts = _texts(identities, summary)
    found = {}
    for row, identity in identities.items():
        key_id = columns.key_ids[int(columns.key_codes[row])]
        key = keys.get(key_id)
        if key is None or key.info.fingerprint != fingerprints.get(key_id):
            raise ValueError(f"keys must hold the run's key {key_id!r} to score excerpts. Pass it, or excerpts=0.")
        again = test_again(texts[row], key)
        if again.n_tokens != columns.n_tokens[row] or not _is_among(float(columns.statistic[row]), again):
            raise RunError(f"{_place(identity)} is no longer what the run tested. Run again, or use excerpts=0.")
        found[row] = excerpt_of(identity.doc_id, texts[row], loaded, key)
    return found


def _test_again(summary: RunSummary, tokenizer: LoadedTokenizer) -> Callable[[str, SecretKey], TestResult]:
    """The run's test of one text under one key."""
    from assay.detection.detect import detect
    from assay.detection.inputs import scorer_of

    if summary.model is None:
        return lambda text, key: detect(text, key, tokenizer=tokenizer)
    scorer = scorer_of(summary.model["name"])
    if scorer.identity()["weights_sha256"] != summary.model["weights_sha256"]:
        raise ValueError(
            f"the run's model {summary.model['name']!r} has other weights by now, so its excerpts cannot be checked. "
            "Put the model back, or use excerpts=0."
        )
    decoding = {name: summary.model[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    return lambda text, key: detect(text, key, tokenizer=tokenizer, model=scorer, **decoding)


def _is_among(statistic: float, again: TestResult) -> bool:
    """Whether a recorded statistic is the test's or, of a test that takes the best of several, one of theirs.

    Only those depend on a model's arithmetic, and on its rounding, which may change which of them is the best.
    """
    if not again.components:
        return again.statistic == statistic
    return any(math.isclose(part.statistic, statistic, rel_tol=_ROUNDING) for part in again.components)


def _run_tokenizer(summary: RunSummary, tokenizer: Any) -> LoadedTokenizer:
    from assay.detection.text import load_tokenizer

    loaded = load_tokenizer(summary.tokenizer["name"] if tokenizer is None else tokenizer)
    if loaded.sha256 != summary.tokenizer["sha256"]:
        raise ValueError(
            f"tokenizer must be the run's, with sha256 {summary.tokenizer['sha256']}; {loaded.name!r} has "
            f"{loaded.sha256}. Pass the run's tokenizer, or excerpts=0."
        )
    return loaded


def _texts(identities: Mapping[int, Identity], summary: RunSummary) -> dict[int, str]:
    """The documents' texts by row of the results, read again from the inputs."""
    from assay.detection.corpus.reading import Columns, Document, read
    from assay.detection.corpus.sources import find_inputs

    by_file: dict[str, dict[int, int]] = {}
    for row, identity in identities.items():
        by_file.setdefault(str(identity.file), {})[int(identity.row or 0)] = row
    columns = Columns(**summary.options["columns"])
    texts = {}
    for name, wanted in by_file.items():
        try:
            inputs = find_inputs([name])
        except RunError as error:
            raise RunError(
                f"excerpts need the run's input {name!r}, which is not found from here. Call from the folder in which "
                "the run was started, or use excerpts=0."
            ) from error
        for found in read(inputs, columns, after=(0, min(wanted) - 1)):
            if isinstance(found, Document) and found.row in wanted:
                texts[wanted[found.row]] = found.text
            if found.row >= max(wanted):
                break
    for row, identity in identities.items():
        if row not in texts:
            raise RunError(f"{_place(identity)} is no longer a document. Run again, or use excerpts=0.")
    return texts


def _place(identity: Identity) -> str:
    return f"{identity.file!r}, row {identity.row},"
