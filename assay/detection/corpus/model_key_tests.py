"""Corpora against keys with the model that may have written them: a scheme's best test, corrected for the choice.

Law under H0: that of `assay.detect` with a model, for any model; a row equals its result on the document.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.detection import combine
from assay.detection.corpus.keys import COLUMNS, DetectionKey
from assay.detection.corpus.models import blaming_the_device, usable
from assay.detection.model_view import ModelView
from assay.detection.scorers import ScorerRecord, anywhere, load_scorer
from assay.detection.testers import tester

if TYPE_CHECKING:
    from assay.detection.corpus.subject import Device, Test
    from assay.detection.result import TestResult
    from assay.detection.text import LoadedTokenizer
    from assay.kernels.chacha import Words
    from assay.kernels.scoring.model import ModelScorer


@dataclass(frozen=True)
class Reader:
    """The model that reads the documents, as the driver of a run describes it to the workers.

    Attributes
    ----------
    model
        Where a worker finds it: "default", a folder or a hub id.
    record
        What it must be.
    decoding
        How it was sampled: temperature, top_k, top_p, min_p.
    device
        "cpu", "cuda", or "auto", which the engine decides.
    """

    model: str
    record: ScorerRecord
    decoding: Mapping[str, Any]
    device: Device

    def pins(self) -> dict[str, Any]:
        """All of it that decides results, JSON-ready."""
        return {**self.record.pins(), **self.decoding}

    def description(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.record.to_dict(), **self.decoding}

    def sentence(self) -> str:
        """What the guarantee does not rest on, and the power does."""
        return (
            f"Token probabilities come from model {self.record.name!r} (weights {self.record.weights_sha256[:16]}), "
            "the text alone and not from the key. A wrong model or a missing prompt costs power, never validity."
        )


def reader_of(
    model: str | os.PathLike[str], tokenizer: LoadedTokenizer, decoding: Mapping[str, Any], device: Device
) -> Reader:
    """The description of a model, which is loaded here once to be recorded.

    Raises
    ------
    ValueError
        If there is no usable model of that name, or the decoding rule is out of range.
    MissingDependencyError
        Without torch or transformers.
    """
    from assay.models import load_model

    loaded = load_model(os.fspath(model))  # says what is missing before anything else does

    from assay.kernels.scoring.decoding import Decoding
    from assay.kernels.scoring.model import ModelScorer

    Decoding(**decoding)  # now, and not in the workers
    return Reader(anywhere(os.fspath(model)), ScorerRecord.of(ModelScorer(loaded, tokenizer)), dict(decoding), device)


@dataclass(frozen=True)
class ModelKeyTests:
    """The best test of every key with a model; a `subject.DocumentTests`."""

    tokenizer: LoadedTokenizer
    keys: tuple[DetectionKey, ...]
    reader: Reader

    @property
    def columns(self) -> Mapping[str, type]:
        """See `subject.DocumentTests`."""
        return COLUMNS

    @property
    def device(self) -> Device:
        """See `subject.DocumentTests`."""
        return self.reader.device

    def on(self, device: Device) -> ModelKeyTests:
        """See `subject.DocumentTests`."""
        return replace(self, reader=replace(self.reader, device=device))

    def open(self) -> Test:
        """See `subject.DocumentTests`; refuses a model that is not the driver's."""
        record, device = self.reader.record, self.reader.device
        with usable(device):
            scorer = load_scorer(self.reader.model, record, device, self.tokenizer)
            wrong = record.differences(ScorerRecord.of(scorer))
            if wrong:
                raise ValueError(
                    f"model: a worker found another one than the driver at {self.reader.model!r}: {', '.join(wrong)} "
                    "differ. Give every machine the same model."
                )
            self.results(["A broken installation or device shows here, before it can spoil a shard."], scorer)
        return blaming_the_device(lambda documents: self.results([one.text for one in documents], scorer), device)

    def results(self, texts: Sequence[str], scorer: ModelScorer) -> dict[str, Any]:
        """The best test of every key on every text; the most significant key of each text, Holm-corrected.

        Returns
        -------
        The columns of `columns`; a row equals `assay.detect(text, keys, model=...)` up to the rounding of the model's
        arithmetic: see `ModelScorer`.
        """
        ids, offsets = self.tokenizer.encode_batch(texts)
        documents = [ids[start:end] for start, end in pairwise(offsets)]
        found = [
            self._test(document, view) for document, view in zip(documents, self._views(documents, scorer), strict=True)
        ]
        columns: dict[str, Any] = {name: [getattr(test, name) for test in found] for name in COLUMNS}
        return columns

    def _views(self, documents: Sequence[Words], scorer: ModelScorer) -> list[ModelView | None]:
        """What the model says of each document; None of an empty one."""
        decoding = self.reader.decoding

        # One batched pass over all documents, for the tests that ask for no more than the tokens' own probabilities.
        @cache
        def scored() -> list[Any]:
            return scorer.score(documents, **decoding)

        def view(place: int) -> ModelView:
            rows = partial(scorer.log_probabilities, documents[place], **decoding)
            return ModelView(lambda: np.asarray(scored()[place].log_prob), rows)

        return [view(place) if len(document) else None for place, document in enumerate(documents)]

    def _test(self, ids: Words, view: ModelView | None) -> TestResult:
        results = []
        for key in self.keys:
            result = tester(key.config).test_ids(ids, 0, key.words, key.config, test="auto", model=view)
            results.append(replace(result, key_id=key.id, scheme=key.config.tag))
        return combine.over_keys(results)
