"""Corpora against keys: which documents carry the mark of one. Model-free, so a worker needs no more than a tokenizer.

Law under H0: that of each scheme's model-free test; over several keys Holm's method, for any dependence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from assay.detection.corpus.engine import run_subject
from assay.detection.corpus.reading import Columns
from assay.detection.corpus.results import RESULTS_SCHEMA, RunSummary
from assay.detection.testers import tester
from assay.detection.text import LoadedTokenizer, load_tokenizer
from assay.kernels.chacha import Words
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import SchemeConfig

if TYPE_CHECKING:
    from assay.detection.corpus.reading import Document
    from assay.detection.corpus.subject import Device, Test
    from assay.detection.detect import DetectionKeys

_COLUMNS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "n_tokens": int,
        "n_scored": int,
        "n_repeats_dropped": int,
        "statistic": float,
        "log_pvalue": float,
        "pvalue": float,
        "log_evalue": float,
        "key_id": str,
        "scheme": str,
    }
)

_FDR_ASSUMPTION: Final = (
    "Flags control the false discovery rate of the whole corpus by Benjamini-Hochberg, for documents that are "
    "independent or positively dependent; copies of one text are positively dependent."
)


@dataclass(frozen=True)
class DetectionKey:
    """What a worker knows of a key: its public name and the PRF key derived from it.

    Attributes
    ----------
    id, config
        Key id and the scheme's settings.
    words
        uint32, from `assay.watermark.keys.use_key`. Secret.
    """

    id: str
    config: SchemeConfig
    words: Words

    def __repr__(self) -> str:
        return f"DetectionKey(id={self.id!r}, config={self.config!r}, words=<hidden>)"


@dataclass(frozen=True)
class KeyTests:
    """The model-free test of every key; a `subject.DocumentTests`."""

    tokenizer: LoadedTokenizer
    keys: tuple[DetectionKey, ...]

    @property
    def columns(self) -> Mapping[str, type]:
        """See `subject.DocumentTests`."""
        return _COLUMNS

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

    @property
    def schema(self) -> str:
        """See `subject.Subject`."""
        return RESULTS_SCHEMA

    def pins(self) -> dict[str, Any]:
        """See `subject.Subject`. A key's state and dates do not change results."""
        return {
            "tokenizer": {"sha256": self.tokenizer.sha256},
            "keys": {
                key.id: f"{key.config.tag} {key.config.canonical().decode()} {key.info.fingerprint}"
                for key in self.keys
            },
        }

    def metadata(self) -> dict[str, str]:
        """See `subject.Subject`."""
        return {
            "assay.keys": ",".join(key.id for key in self.keys),
            "assay.tokenizer_sha256": self.tokenizer.sha256,
        }

    def description(self) -> dict[str, Any]:
        """See `subject.Subject`."""
        return {
            "keys": tuple(key.info.to_dict() for key in self.keys),
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "null": "; ".join(dict.fromkeys(tester(key.config).NULL for key in self.keys)),
            "tests": tuple(dict.fromkeys(f"{key.config.scheme}-{tester(key.config).TESTS[0]}" for key in self.keys)),
            "assumptions": tuple(self._assumptions()),
        }

    def tests(self) -> KeyTests:
        """See `subject.Subject`."""
        keys = tuple(DetectionKey(key.id, key.config, use_key(key)) for key in self.keys)
        return KeyTests(self.tokenizer, keys)

    def _assumptions(self) -> Iterator[str]:
        yield from dict.fromkeys(line for key in self.keys for line in tester(key.config).ASSUMPTIONS)
        tokenizer = f"{self.tokenizer.name!r} (sha256 {self.tokenizer.sha256[:16]})"
        yield f"Token ids come from tokenizer {tokenizer}, the generator's own."
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
    RunSummary; `exit_code` is 3 where rows were rejected. A finished run is not repeated: its summary is returned, with
    `already_finished`.

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
    return run_subject(
        paths,
        KeySubject(_chosen(keys), load_tokenizer(tokenizer)),
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
