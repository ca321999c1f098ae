"""A corpus run from paths to results: pinned, sharded, resumable.

Guarantee: one row per document in the order of the corpus, none lost and none doubled, whenever the run is killed and
however often it is resumed; the same results for every number of workers.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from assay import __version__
from assay._errors import RunError
from assay.detection.corpus import pool, ray_engine
from assay.detection.corpus.ledger import Ledger, ShardRecord, open_ledger, write_atomically
from assay.detection.corpus.progress import shown
from assay.detection.corpus.reading import Columns, Reject, read
from assay.detection.corpus.results import RESULTS_SCHEMA, Combined, RunSummary, combine
from assay.detection.corpus.shards import Shard, cut
from assay.detection.corpus.sources import InputFile, find_inputs
from assay.detection.corpus.stores import check_destination, copy_up, is_uri
from assay.detection.corpus.worker import COLUMNS, DetectionKey, Setup, write_shard
from assay.detection.testers import tester
from assay.detection.text import LoadedTokenizer, load_tokenizer
from assay.watermark.keys import SecretKey, use_key

if TYPE_CHECKING:
    from assay.detection.detect import DetectionKeys

_FDR_ASSUMPTION = (
    "Flags control the false discovery rate of the whole corpus by Benjamini-Hochberg, for documents that are "
    "independent or positively dependent; copies of one text are positively dependent."
)


@dataclass(frozen=True)
class _Plan:
    """What a run tests and how: all that decides its results."""

    inputs: Sequence[InputFile]
    keys: Sequence[SecretKey]
    tokenizer: LoadedTokenizer
    columns: Columns
    fdr: float
    shard_rows: int
    shard_characters: int

    def options(self) -> dict[str, Any]:
        return {
            "columns": self.columns.to_dict(),
            "fdr": self.fdr,
            "shard_rows": self.shard_rows,
            "shard_characters": self.shard_characters,
        }

    def pins(self) -> dict[str, Any]:
        """What a resumed run must share, apart from the inputs. A key's state and dates do not change results."""
        return {
            "version": __version__,
            "options": self.options(),
            "tokenizer": {"sha256": self.tokenizer.sha256},
            "keys": {
                key.id: f"{key.config.tag} {key.config.canonical().decode()} {key.info.fingerprint}"
                for key in self.keys
            },
        }

    def setup(self, shards: Path) -> Setup:
        """What the workers need; the one place where secrets are used."""
        keys = tuple(DetectionKey(key.id, key.config, use_key(key)) for key in self.keys)
        return Setup(self.tokenizer, keys, shards)


def run(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    keys: SecretKey | DetectionKeys | Iterable[SecretKey],
    *,
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    text_column: str = "text",
    id_column: str | None = None,
    source_column: str | None = None,
    workers: int | None = None,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    copy_to: str | None = None,
    fdr: float = 0.01,
    shard_rows: int = 2000,
    shard_characters: int = 4_000_000,
    progress: bool = True,
) -> RunSummary:
    """Test every document of a corpus for the mark of a key; resume where an earlier call was stopped.

    Guarantee: each p-value is valid as `assay.detect` states it; the flags' false discovery rate over the corpus is at
    most `fdr` for independent or positively dependent documents. One row per document, whenever the run is killed.

    Parameters
    ----------
    paths
        Files, folders or glob patterns: .txt (a document each), .jsonl or .ndjson (also .gz, .zst, .zstd), .parquet.
        Objects and folders in object stores by URI, such as "s3://bucket/folder"; only this process reads them.
    keys
        One key, several, or a keyring. Several are corrected by Holm's method and each row names its best key.
    out
        Folder for `results.parquet`, `rejects.jsonl`, `inputs.jsonl`, `summary.json` and `ledger/`.
    tokenizer
        The generator's: see `assay.detect`. Default: the bundled model's.
    text_column, id_column, source_column
        Names of JSON fields or Parquet columns; id and source default to the file and row.
    workers
        Processes; default: the cores this process may use, or the cluster has. It does not change the results.
    engine
        "local": processes here. "ray": on a Ray cluster whose machines share `out`. It does not change the results, and
        a run may be resumed with the other one.
    ray_address
        Of the cluster, as `ray.init` takes it. Default: the connection there is, RAY_ADDRESS, or a cluster on this
        machine for the time of the run.
    copy_to
        URI of a folder in an object store, to which the four files are copied at the end: each whole or not at all,
        read back, `summary.json` last. `out` stays what resumes.
    fdr
        False discovery rate of the flags, in (0, 1).
    shard_rows, shard_characters
        Largest number of rows and of characters in a shard, the unit of work that a kill can cost.
    progress
        Show a bar on stderr where that is a terminal.

    Returns
    -------
    RunSummary; `exit_code` is 3 where rows were rejected. A finished run is not repeated, its summary is returned.

    Raises
    ------
    RunError
        If nothing is found to test, the folder cannot be written or is in use, it was begun with something else, or an
        input changes meanwhile; if the cluster or an object store fails.
    MissingDependencyError
        With engine="ray" and without Ray.
    ValueError
        On an option out of range, a key whose scheme has no test, two keys with one id, or an unusable tokenizer.

    Notes
    -----
    Memory: 24 bytes per document at the end, and some shards per worker. Needs a POSIX system.
    """
    _check_options(fdr, shard_rows, shard_characters)
    tested = _tester(engine, ray_address, workers)
    if copy_to is not None:
        check_destination(copy_to)
    if is_uri(os.fspath(out)):
        raise RunError("out must be a folder: a ledger needs rename and append. For an object store add copy_to=URI.")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"out must be a folder, {str(out)!r} is a file. Name another place for the results.")
    plan = _Plan(
        keys=_chosen(keys),
        tokenizer=load_tokenizer(tokenizer),
        inputs=find_inputs([paths] if isinstance(paths, (str, os.PathLike)) else paths, exclude=folder),
        columns=Columns(text=text_column, id=id_column, source=source_column),
        fdr=float(fdr),
        shard_rows=shard_rows,
        shard_characters=shard_characters,
    )
    with open_ledger(folder, plan.pins(), plan.inputs) as ledger:
        try:
            if ledger.finished is None:
                _finish(plan, ledger, folder, _test(plan, ledger, tested, bar=progress))
            ledger.discard_shards()
        except OSError as error:
            raise RunError(
                f"out: {str(out)!r} cannot be written: {error.strerror or type(error).__name__}. "
                "Once the cause is gone, the same command resumes the run."
            ) from error
        if copy_to is not None:
            copy_up(folder, ("results.parquet", "rejects.jsonl", "inputs.jsonl", "summary.json"), copy_to)
    return RunSummary.read(folder)


def _check_options(fdr: float, shard_rows: int, shard_characters: int) -> None:
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must be in (0, 1), got {fdr!r}.")
    for name, value in (("shard_rows", shard_rows), ("shard_characters", shard_characters)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


_Answers = Generator[ShardRecord | pool.Lost, None, None]
_Tester = Callable[[Iterator[Shard], Setup], _Answers]


def _tester(engine: str, ray_address: str | None, workers: int | None) -> _Tester:
    """What tests shards, with its options checked."""
    if engine not in ("local", "ray"):
        raise ValueError(f'engine must be "local" or "ray", got {engine!r}.')
    if ray_address is not None and engine != "ray":
        raise ValueError(f'ray_address needs engine="ray", got engine={engine!r}.')
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise ValueError(f"workers must be an integer of at least 1, got {workers!r}.")
    if engine == "ray":
        return lambda shards, setup: ray_engine.work(shards, setup, workers, ray_address)
    # Not os.cpu_count(): a container or taskset may allow fewer.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return lambda shards, setup: pool.work(shards, setup, workers or cores)


def _chosen(keys: Any) -> tuple[SecretKey, ...]:
    """The keys, sorted by id, so that their order cannot change a result."""
    from assay.detection.detect import keys_to_test

    listed = keys_to_test(keys, "keys")
    ids = [key.id for key in listed]
    if len(set(ids)) != len(ids):
        raise ValueError(f"keys must have different ids, got {sorted(ids)}.")
    return tuple(sorted(listed, key=lambda key: key.id))


@dataclass
class _Session:
    """What was tested since the last start."""

    begun: float
    resumed: bool
    documents: int = 0
    n_tokens: int = 0
    rejects: int = 0


def _test(plan: _Plan, ledger: Ledger, tested: _Tester, *, bar: bool) -> _Session:
    session = _Session(time.monotonic(), resumed=bool(ledger.shards))
    first, after = ledger.first_missing()
    rows = read(plan.inputs, plan.columns, after=after, finished=ledger.record_input)
    shards = cut(rows, first=first, max_rows=plan.shard_rows, max_characters=plan.shard_characters)
    missing = (shard for shard in shards if shard.index not in ledger.shards)
    before = [0, *itertools.accumulate(max(0, file.size) for file in plan.inputs)]
    setup = plan.setup(ledger.folder / "shards")
    done = first
    with shown(bar, before[-1]) as update, closing(_records(tested(missing, setup), setup.folder)) as records:
        for record in records:
            ledger.record_shard(record)
            session.documents += record.documents
            session.n_tokens += record.n_tokens
            session.rejects += record.rejects
            # Shards finish in any order; the bar shows how far everything is done.
            while done in ledger.shards:
                done += 1
            last = ledger.shards.get(done - 1)
            update(0 if last is None else before[last.end[0]] + last.consumed, session.documents, session.rejects)
    if not ledger.shards:
        raise RunError(f"paths: the {len(plan.inputs)} input files hold no document; they are empty.")
    return session


def _records(answers: _Answers, folder: Path) -> Generator[ShardRecord, None, None]:
    with closing(answers):
        for answer in answers:
            yield answer if isinstance(answer, ShardRecord) else _write_lost(answer, folder)


def _write_lost(lost: pool.Lost, folder: Path) -> ShardRecord:
    """All documents of a shard that killed its workers go to the rejects."""
    times = "twice" if lost.times == 2 else f"{lost.times} times"
    rejects = [
        Reject(d.file, d.row, d.consumed, d.name, d.row, "worker died", f"{times}, {lost.ending}")
        for d in lost.shard.documents
    ]
    in_order = sorted([*lost.shard.rejects, *rejects], key=lambda reject: (reject.file, reject.row))
    return write_shard(lost.shard, {name: [] for name in COLUMNS}, in_order, folder)


def _finish(plan: _Plan, ledger: Ledger, out: Path, session: _Session) -> None:
    metadata = {
        "assay.schema": RESULTS_SCHEMA,
        "assay.version": __version__,
        "assay.fdr": repr(plan.fdr),
        "assay.keys": ",".join(key.id for key in plan.keys),
        "assay.tokenizer_sha256": plan.tokenizer.sha256,
    }
    combined = combine(ledger, out, plan.inputs, fdr=plan.fdr, metadata=metadata)
    summary = _summary(plan, ledger, out, session, combined)
    summary_json = orjson.dumps(summary.to_dict(), option=orjson.OPT_INDENT_2) + b"\n"
    write_atomically(out / "summary.json", summary_json)
    ledger.record_finished(combined.sha256 | {"summary.json": sha256(summary_json).hexdigest()})


def _summary(plan: _Plan, ledger: Ledger, out: Path, session: _Session, combined: Combined) -> RunSummary:
    seconds = time.monotonic() - session.begun
    records = ledger.shards.values()
    return RunSummary(
        documents=sum(record.documents for record in records),
        flagged=combined.flagged,
        fdr=plan.fdr,
        rejects=sum(record.rejects for record in records),
        rejects_by_reason=combined.rejects_by_reason,
        n_tokens=sum(record.n_tokens for record in records),
        n_scored=combined.n_scored,
        inputs=len(plan.inputs),
        keys=tuple(key.info.to_dict() for key in plan.keys),
        tokenizer={"name": plan.tokenizer.name, "sha256": plan.tokenizer.sha256},
        options=plan.options(),
        null="; ".join(dict.fromkeys(tester(key.config).NULL for key in plan.keys)),
        assumptions=tuple(_assumptions(plan)),
        version=__version__,
        started=ledger.started,
        resumed=session.resumed,
        seconds=seconds,
        documents_per_second=session.documents / seconds,
        tokens_per_second=session.n_tokens / seconds,
        out=out,
    )


def _assumptions(plan: _Plan) -> Iterator[str]:
    yield from dict.fromkeys(line for key in plan.keys for line in tester(key.config).ASSUMPTIONS)
    tokenizer = f"{plan.tokenizer.name!r} (sha256 {plan.tokenizer.sha256[:16]})"
    yield f"Token ids come from tokenizer {tokenizer}, the generator's own."
    if len(plan.keys) > 1:
        yield f"Each document's p-value is corrected for {len(plan.keys)} keys by Holm's method."
    yield _FDR_ASSUMPTION
    for key in plan.keys:
        if key.state == "revoked":
            yield f"Key {key.id!r} was revoked ({key.info.revoked}); whoever learned it could have made the mark."
