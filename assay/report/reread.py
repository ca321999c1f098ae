"""Excerpts of a corpus run: texts read again from its inputs and tested again.

A text is shown only if testing it again gives the statistic that the run recorded, so an excerpt cannot come from
another version of the document, another key or another tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from assay._errors import RunError
from assay.report.columns import Identity, ResultColumns
from assay.report.excerpts import excerpt_of
from assay.report.records import Excerpt

if TYPE_CHECKING:
    from assay.detection.corpus.results import RunSummary
    from assay.detection.result import TestResult
    from assay.detection.text import LoadedTokenizer
    from assay.watermark.keys import SecretKey

_ROUNDING = 1e-3  # of a model's float32, seen through a statistic of a document's tokens


def excerpts_of_run(
    columns: ResultColumns, rows: Sequence[int], summary: RunSummary, keys: Any, tokenizer: Any
) -> dict[int, Excerpt]:
    """Excerpts of some rows of a run's results, by row.

    Parameters
    ----------
    columns, summary
        Of the run.
    rows
        Which documents.
    keys, tokenizer
        As in `Report.from_run`.

    Raises
    ------
    RunError
        If a document is not found, or is no longer the one that was tested.
    ValueError
        If a key is missing, or the tokenizer or the model is not the run's.
    """
    if not rows:
        return {}
    known = _by_id(keys)
    loaded = _run_tokenizer(summary, tokenizer)
    test_again = _test_again(summary, loaded)
    fingerprints = {description["id"]: description["fingerprint"] for description in summary.keys}
    identities = dict(zip(rows, columns.identify(rows), strict=True))
    texts = _texts(identities, summary)
    found = {}
    for row, identity in identities.items():
        key_id = columns.key_ids[int(columns.key_codes[row])]
        key = known.get(key_id)
        if key is None or key.info.fingerprint != fingerprints.get(key_id):
            raise ValueError(f"keys must hold the run's key {key_id!r} to score excerpts. Pass it, or excerpts=0.")
        again = test_again(texts[row], key)
        if again.n_tokens != columns.n_tokens[row] or not _is_among(float(columns.statistic[row]), again):
            raise RunError(f"{_place(identity)} is no longer what the run tested. Run again, or use excerpts=0.")
        found[row] = excerpt_of(identity.doc_id, texts[row], loaded, key)
    return found


def _by_id(keys: Any) -> dict[str, SecretKey]:
    from assay.detection.detect import DetectionKeys
    from assay.watermark.keys import SecretKey

    if isinstance(keys, SecretKey):
        keys = [keys]
    listed: Iterable[Any] = keys.for_detection() if isinstance(keys, DetectionKeys) else keys
    return {key.id: key for key in listed}


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
