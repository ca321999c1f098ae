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
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import orjson

from assay import __version__
from assay._errors import RunError
from assay.detection.corpus import pool, ray_engine
from assay.detection.corpus.dispatch import Answer, Lost
from assay.detection.corpus.ledger import Ledger, ShardRecord, open_ledger, write_atomically
from assay.detection.corpus.progress import shown
from assay.detection.corpus.reading import Columns, Reject, read
from assay.detection.corpus.results import Combined, RunSummary, combine
from assay.detection.corpus.shards import Shard, cut
from assay.detection.corpus.sources import InputFile, find_inputs
from assay.detection.corpus.stores import check_destination, copy_up, is_uri
from assay.detection.corpus.subject import Setup, Subject
from assay.detection.corpus.worker import all_columns, write_shard
from assay.kernels.scoring.devices import visible_gpus


@dataclass(frozen=True)
class _Plan:
    """What a run tests and how: all that decides its results, and the files that were left out."""

    subject: Subject
    inputs: Sequence[InputFile]
    files_skipped: int
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
        """What a resumed run must share, apart from the inputs."""
        return {"version": __version__, "options": self.options(), **self.subject.pins()}


def run_subject(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    subject: Subject,
    *,
    out: str | os.PathLike[str],
    columns: Columns,
    workers: int | None,
    engine: Literal["local", "ray"],
    ray_address: str | None,
    copy_to: str | None,
    fdr: float,
    shard_rows: int,
    shard_characters: int,
    progress: bool,
) -> RunSummary:
    """Test every document of a corpus for a subject; see `key_tests.run` for the arguments and what is raised."""
    _check_options(fdr, shard_rows, shard_characters)
    tested = _tester(engine, ray_address, workers)
    if copy_to is not None:
        check_destination(copy_to)
    if is_uri(os.fspath(out)):
        raise RunError("out must be a folder: a ledger needs rename and append. For an object store add copy_to=URI.")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"out must be a folder, {str(out)!r} is a file. Name another place for the results.")
    skipped: list[None] = []
    inputs = find_inputs(
        [paths] if isinstance(paths, (str, os.PathLike)) else paths,
        exclude=folder,
        skipped=lambda path: skipped.append(None),
    )
    plan = _Plan(
        subject=subject,
        inputs=inputs,
        files_skipped=len(skipped),
        columns=columns,
        fdr=float(fdr),
        shard_rows=shard_rows,
        shard_characters=shard_characters,
    )
    with open_ledger(folder, plan.pins(), plan.inputs) as ledger:
        already_finished = ledger.finished is not None
        try:
            if not already_finished:
                _finish(plan, ledger, folder, _test(plan, ledger, tested, bar=progress))
            ledger.discard_shards()
        except OSError as error:
            raise RunError(
                f"out: {str(out)!r} cannot be written: {error.strerror or type(error).__name__}. "
                "Once the cause is gone, the same command resumes the run."
            ) from error
        if copy_to is not None:
            copy_up(folder, ("results.parquet", "rejects.jsonl", "inputs.jsonl", "summary.json"), copy_to)
    return replace(RunSummary.read(folder), already_finished=already_finished)


def _check_options(fdr: float, shard_rows: int, shard_characters: int) -> None:
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must be in (0, 1), got {fdr!r}.")
    for name, value in (("shard_rows", shard_rows), ("shard_characters", shard_characters)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


_Answers = Generator[Answer, None, None]
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
    return lambda shards, setup: _work_here(shards, setup, workers)


def _work_here(shards: Iterator[Shard], setup: Setup, workers: int | None) -> _Answers:
    """By processes of this machine: a model runs on its GPUs, where it has some, with one process for each."""
    device = setup.tests.device
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if device == "cuda" and not gpus:
        raise RunError("device: there is no GPU here that torch can use. Choose device='cpu' or 'auto'.")
    if gpus:
        return pool.work(shards, setup.on("cuda"), workers or len(gpus), gpus)
    # Not os.cpu_count(): a container or taskset may allow fewer.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return pool.work(shards, setup if device is None else setup.on("cpu"), workers or cores)


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
    setup = Setup(plan.subject.tests(), ledger.folder / "shards")
    done = first
    with shown(bar, before[-1]) as update, closing(_records(tested(missing, setup), setup)) as records:
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


def _records(answers: _Answers, setup: Setup) -> Generator[ShardRecord, None, None]:
    with closing(answers):
        for answer in answers:
            yield answer if isinstance(answer, ShardRecord) else _write_lost(answer, setup)


def _write_lost(lost: Lost, setup: Setup) -> ShardRecord:
    """All documents of a shard that killed its workers go to the rejects."""
    times = "twice" if lost.times == 2 else f"{lost.times} times"
    rejects = [
        Reject(d.file, d.row, d.consumed, d.name, d.row, "worker died", f"{times}, {lost.ending}")
        for d in lost.shard.documents
    ]
    in_order = sorted([*lost.shard.rejects, *rejects], key=lambda reject: (reject.file, reject.row))
    return write_shard(lost.shard, {name: [] for name in all_columns(setup.tests)}, in_order, setup)


def _finish(plan: _Plan, ledger: Ledger, out: Path, session: _Session) -> None:
    metadata = {
        "assay.schema": plan.subject.schema,
        "assay.version": __version__,
        "assay.fdr": repr(plan.fdr),
        **plan.subject.metadata(),
    }
    columns = all_columns(plan.subject.tests())
    combined = combine(ledger, out, plan.inputs, columns=columns, fdr=plan.fdr, metadata=metadata)
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
        files_skipped=plan.files_skipped,
        **plan.subject.description(),
        options=plan.options(),
        version=__version__,
        started=ledger.started,
        resumed=session.resumed,
        seconds=seconds,
        documents_per_second=session.documents / seconds,
        tokens_per_second=session.n_tokens / seconds,
        out=out,
    )
