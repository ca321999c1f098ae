"""Corpora against keys: which documents carry the mark of one.

Without a model a worker needs no more than a tokenizer; with one, `model_key_tests` has the tests.
Law under H0: that of each scheme's tests; over several keys Holm's method, for any dependence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from assay.detection.corpus.engine import run_subject
from assay.detection.corpus.keys import COLUMNS, DetectionKey
from assay.detection.corpus.model_key_tests import ModelKeyTests, Reader, reader_of
from assay.detection.corpus.reading import Columns
from assay.detection.corpus.results import RESULTS_SCHEMA, RunSummary
from assay.detection.testers import tester
from assay.detection.text import LoadedTokenizer, load_tokenizer
from assay.watermark.keys import SecretKey, use_key

if TYPE_CHECKING:
    from assay.detection.corpus.reading import Document
    from assay.detection.corpus.subject import Device, Test
    from assay.detection.detect import DetectionKeys

_FDR_ASSUMPTION: Final = (
    "Flags control the false discovery rate of the whole corpus by Benjamini-Hochberg, for documents that are "
    "independent or positively dependent; copies of one text are positively dependent."
)


@dataclass(frozen=True)
class KeyTests:
    """The model-free test of every key; a `subject.DocumentTests`."""

    tokenizer: LoadedTokenizer
    keys: tuple[DetectionKey, ...]

    @property
    def columns(self) -> Mapping[str, type]:
        """See `subject.DocumentTests`."""
        return COLUMNS

    @property
    def device(self) -> None:
        """None: there is no model."""
        return

    def on(self, device: Device) -> KeyTests:
        """The same: nothing here runs on a device."""
        return self

    def open(self) -> Test:
        """See `subject.DocumentTests`."""
        self.results(["A broken installation shows here, before it can spoil a shard."])
        return self.test

    def test(self, documents: Sequence[Document]) -> dict[str, Any]:
        """See `results`."""
        return self.results([document.text for document in documents])

    def results(self, texts: Sequence[str]) -> dict[str, Any]:
        """The model-free test of every key on every text; the most significant key of each text, Holm-corrected.

        Returns
        -------
        The columns of `columns`; a row equals `assay.detect(text, keys)`.
        """
        ids, offsets = self.tokenizer.encode_batch(texts)
        tests = [tester(key.config).documents_test(ids, offsets, key.words, key.config) for key in self.keys]
        log_pvalues = np.stack([test.log_pvalue for test in tests])
        best = np.argmin(log_pvalues, axis=0)

        def of_best(name: str) -> npt.NDArray[Any]:
            rows = np.stack([getattr(test, name) for test in tests])
            chosen: npt.NDArray[Any] = np.take_along_axis(rows, best[None], axis=0)[0]
            return chosen

        # Holm's adjusted p-value of the smallest of m is m times it; the e-value takes the same 1 / m as its weight.
        penalty = np.log(len(tests))
        log_pvalue = np.minimum(of_best("log_pvalue") + penalty, 0.0)
        return {
            "n_tokens": tests[0].n_tokens,
            "n_scored": of_best("n_scored"),
            "n_repeats_dropped": of_best("n_repeats_dropped"),
            "statistic": of_best("statistic"),
            "log_pvalue": log_pvalue,
            "pvalue": np.exp(log_pvalue),
            "log_evalue": of_best("log_evalue") - penalty,
            "key_id": [self.keys[index].id for index in best],
            "scheme": [self.keys[index].config.tag for index in best],
        }


@dataclass(frozen=True)
class KeySubject:
    """Marks of keys; a `subject.Subject`."""

    keys: Sequence[SecretKey]
    tokenizer: LoadedTokenizer
    reader: Reader | None = None

    @property
    def schema(self) -> str:
        """See `subject.Subject`."""
        return RESULTS_SCHEMA

    def pins(self) -> dict[str, Any]:
        """See `subject.Subject`. A key's state and dates do not change results."""
        model = {} if self.reader is None else {"model": self.reader.pins()}
        return {
            "tokenizer": {"sha256": self.tokenizer.sha256},
            "keys": {
                key.id: f"{key.config.tag} {key.config.canonical().decode()} {key.info.fingerprint}"
                for key in self.keys
            },
            **model,
        }

    def metadata(self) -> dict[str, str]:
        """See `subject.Subject`."""
        model = {} if self.reader is None else {"assay.model_sha256": self.reader.record.weights_sha256}
        return {
            "assay.keys": ",".join(key.id for key in self.keys),
            "assay.tokenizer_sha256": self.tokenizer.sha256,
            **model,
        }

    def description(self) -> dict[str, Any]:
        """See `subject.Subject`."""
        return {
            "keys": tuple(key.info.to_dict() for key in self.keys),
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "model": None if self.reader is None else self.reader.description(),
            "null": "; ".join(dict.fromkeys(tester(key.config).NULL for key in self.keys)),
            "tests": tuple(dict.fromkeys(f"{key.config.scheme}-{self._test(key)}" for key in self.keys)),
            "assumptions": tuple(self._assumptions()),
        }

    def tests(self) -> KeyTests | ModelKeyTests:
        """See `subject.Subject`."""
        keys = tuple(DetectionKey(key.id, key.config, use_key(key)) for key in self.keys)
        if self.reader is None:
            return KeyTests(self.tokenizer, keys)
        return ModelKeyTests(self.tokenizer, keys, self.reader)

    def _test(self, key: SecretKey) -> str:
        """The test of a key: the model-free one, or what "auto" is with a model, where the scheme has tests for one."""
        known = tester(key.config)
        return "best-of-three" if self.reader is not None and known.NEEDS_MODEL else known.TESTS[0]

    def _assumptions(self) -> Iterator[str]:
        yield from dict.fromkeys(line for key in self.keys for line in tester(key.config).ASSUMPTIONS)
        tokenizer = f"{self.tokenizer.name!r} (sha256 {self.tokenizer.sha256[:16]})"
        yield f"Token ids come from tokenizer {tokenizer}, the generator's own."
        if self.reader is not None:
            yield self.reader.sentence()
        if len(self.keys) > 1:
            yield f"Each document's p-value is corrected for {len(self.keys)} keys by Holm's method."
        yield _FDR_ASSUMPTION
        for key in self.keys:
            if key.state == "revoked":
                yield f"Key {key.id!r} was revoked ({key.info.revoked}); whoever learned it could have made the mark."


def run(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    keys: SecretKey | DetectionKeys | Iterable[SecretKey],
    *,
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    model: str | os.PathLike[str] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    device: Device = "auto",
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
        Other files in folders are left out and counted.
        Objects and folders in object stores by URI, such as "s3://bucket/folder"; only this process reads them.
    keys
        One key, several, or a keyring. Several are corrected by Holm's method and each row names its best key.
    out
        Folder for `results.parquet`, `rejects.jsonl`, `inputs.jsonl`, `summary.json` and `ledger/`.
    tokenizer
        The generator's: see `assay.detect`. Default: that of `model`, else the bundled model's.
    model
        Optional, and the most powerful: the model that may have written the documents, as a local folder, hub id or
        "default" for the bundled one; every worker loads it. The best of each scheme's tests is then taken, corrected
        for the choice, as `assay.detect` does.
    temperature, top_k, top_p, min_p
        How the model was sampled, if known; used for the model's probabilities only.
    device
        Of the model. "auto": GPUs where there are some, else CPUs; "cuda" or "cpu": these.
    text_column, id_column, source_column
        Names of JSON fields or Parquet columns; id and source default to the file and row.
    workers
        Processes; default: one per core that this process may use, or the cluster has; with a model per GPU, where
        there are some. It does not change the results.
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
    RunSummary; `exit_code` is 3 where rows were rejected. A finished run is not repeated: its summary is returned, with
    `already_finished`.

    Raises
    ------
    RunError
        If nothing is found to test, the folder cannot be written or is in use, it was begun with something else, or an
        input changes meanwhile; if the cluster or an object store fails, or there is no usable GPU.
    MissingDependencyError
        With engine="ray" and without Ray, with a model and without torch.
    ValueError
        On an option out of range, a key whose scheme has no test, two keys with one id, or an unusable tokenizer or
        model.

    Notes
    -----
    Memory: 24 bytes per document at the end, and some shards per worker. Needs a POSIX system.

    With a model the results are the same for every engine and number of workers on machines of one kind. They agree
    with `assay.detect`, and a CPU with a GPU, up to the rounding of the model's arithmetic: see `ModelScorer`.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"model must be 'default', a folder or a hub id, from which every worker loads it, got "
            f"{type(model).__name__}. Save it with save_pretrained and name the folder."
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", got {device!r}.')
    if device != "auto" and model is None:
        raise ValueError(f"device must go with a model, got {device!r} without. The test of token ids runs on CPUs.")
    chosen = _chosen(keys)
    loaded = load_tokenizer(model if tokenizer is None else tokenizer)
    decoding = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return run_subject(
        paths,
        KeySubject(chosen, loaded, None if model is None else reader_of(model, loaded, decoding, device)),
        out=out,
        columns=Columns(text=text_column, id=id_column, source=source_column),
        workers=workers,
        engine=engine,
        ray_address=ray_address,
        copy_to=copy_to,
        fdr=fdr,
        shard_rows=shard_rows,
        shard_characters=shard_characters,
        progress=progress,
    )


def _chosen(keys: Any) -> tuple[SecretKey, ...]:
    """The keys, sorted by id, so that their order cannot change a result."""
    from assay.detection.detect import keys_to_test

    listed = keys_to_test(keys, "keys")
    ids = [key.id for key in listed]
    if len(set(ids)) != len(ids):
        raise ValueError(f"keys must have different ids, got {sorted(ids)}.")
    return tuple(sorted(listed, key=lambda key: key.id))
