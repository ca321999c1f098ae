"""A calibration as a file: scores of human texts, what they were scored with, and what they were.

A verdict is refused if its scorer is not the one that was calibrated: other weights, another precision or another
tokenizer shift every score. The texts are not kept, only their scores and a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from assay import __version__
from assay._errors import CalibrationError
from assay.conformal.p_values import ConformalPValues
from assay.detection.corpus.ledger import write_atomically
from assay.detection.scorers import ScorerRecord

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer

SCHEMA = "assay.calibration/1"
Labels = npt.NDArray[np.str_]

_SETTINGS = ("alternative", "ties", "guarantee", "confidence", "level", "simulations", "random_state")


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A calibrated score: made by `human.calibrate`, used by `human.human_tests`.

    Attributes
    ----------
    score
        Name of the zero-shot score.
    scorer, other
        What it was computed with; `other` for two-model scores.
    p_values
        The fitted conformal p-values.
    grouped
        Whether the user named groups.
    length_edges
        Numbers of tokens at which length bins begin anew.
    min_tokens
        Shortest text that is tested.
    scores, groups
        Shape (n,): the calibration texts' scores and groups.
    texts_sha256
        Hash of the calibration texts.
    """

    score: str
    scorer: ScorerRecord
    other: ScorerRecord | None
    p_values: ConformalPValues
    grouped: bool
    length_edges: tuple[int, ...]
    min_tokens: int
    scores: npt.NDArray[np.float64]
    groups: Labels
    texts_sha256: str

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the hash of the saved form: the calibration's name in results."""
        return hashlib.sha256(self._canonical()).hexdigest()[:16]

    @staticmethod
    def hash_of(texts: Sequence[str]) -> str:
        """SHA-256 of texts in order, each after its length in bytes."""
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def group_names(self) -> list[str]:
        """The calibrated groups, sorted."""
        names: list[str] = self.p_values.groups_.tolist()
        return names

    def info(self) -> dict[str, Any]:
        """Public description for summaries and reports, JSON-ready: no text, and no score of any."""
        found = self.p_values
        groups = zip(found.groups_.tolist(), found.counts_.tolist(), found.floors_.tolist(), strict=True)
        models = [self.scorer, *([] if self.other is None else [self.other])]
        return {
            "id": self.id,
            "score": self.score,
            "guarantee": self._guarantee(),
            "min_tokens": self.min_tokens,
            "texts_sha256": self.texts_sha256,
            "groups": [{"name": name, "texts": texts, "smallest_pvalue": floor} for name, texts, floor in groups],
            "models": [{"name": one.name, "weights_sha256": one.weights_sha256} for one in models],
        }

    def sentences(self) -> tuple[str, ...]:
        """What the guarantee rests on, for results."""
        groups = len(self.p_values.groups_)
        return (
            f"Calibration {self.id}: {len(self.scores)} human texts in {groups} group{'s' if groups != 1 else ''}.",
            f"Scores come from {self.scorer.name!r} (weights {self.scorer.weights_sha256[:16]}).",
            self._guarantee(),
        )

    def _guarantee(self) -> str:
        if self.p_values.guarantee == "marginal":
            return "Marginal guarantee: it holds on average over calibration sets."
        return f"Calibration-conditional guarantee: it holds for {self.p_values.confidence:.0%} of calibration sets."

    def check_scorers(self, scorer: ModelScorer, other: ModelScorer | None) -> None:
        """Refuse scorers that are not the calibrated ones.

        Raises
        ------
        CalibrationError
            If one differs; the message names in what.
        """
        if (other is None) != (self.other is None):
            raise CalibrationError(
                f"score {self.score!r} of this calibration was computed with {1 if self.other is None else 2} models, "
                f"got {1 if other is None else 2}."
            )
        pairs = [("scorer", self.scorer, scorer)]
        if self.other is not None and other is not None:
            pairs.append(("other", self.other, other))
        for name, record, given in pairs:
            wrong = record.differences(ScorerRecord.of(given))
            if wrong:
                raise CalibrationError(
                    f"{name} is not the one that was calibrated ({record.name!r}): {', '.join(wrong)} differ. Use the "
                    "calibrated scorer, or calibrate this one."
                )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            "score": self.score,
            "scorer": self.scorer.to_dict(),
            "other": None if self.other is None else self.other.to_dict(),
            "settings": {name: getattr(self.p_values, name) for name in _SETTINGS},
            "grouped": self.grouped,
            "length_edges": list(self.length_edges),
            "min_tokens": self.min_tokens,
            "texts_sha256": self.texts_sha256,
            "scores": self.scores.tolist(),
            "groups": self.groups.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """The calibration that `to_dict` described.

        Raises
        ------
        CalibrationError
            If an entry is missing or out of range.
        """
        try:
            if data["schema"] != SCHEMA:
                raise CalibrationError(f"schema must be {SCHEMA!r}, got {data['schema']!r}. A newer Assay may read it.")
            scores, groups = np.array(data["scores"], dtype=np.float64), np.array(data["groups"], dtype=np.str_)
            return cls(
                score=str(data["score"]),
                scorer=ScorerRecord(**data["scorer"]),
                other=None if data["other"] is None else ScorerRecord(**data["other"]),
                p_values=ConformalPValues(**data["settings"]).fit(scores, groups),
                grouped=bool(data["grouped"]),
                length_edges=tuple(int(edge) for edge in data["length_edges"]),
                min_tokens=int(data["min_tokens"]),
                scores=scores,
                groups=groups,
                texts_sha256=str(data["texts_sha256"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"this is no calibration, or it is damaged: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all; it holds no text."""
        checksum = hashlib.sha256(self._canonical()).hexdigest()
        content = self.to_dict() | {"sha256": checksum}
        write_atomically(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        CalibrationError
            If the file is no calibration, or was changed after it was written.
        OSError
            If it cannot be read.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise CalibrationError(f"{path} is no calibration: it is not JSON.") from error
        if not isinstance(data, dict):
            raise CalibrationError(f"{path} is no calibration: it holds a {type(data).__name__}.")
        stated = data.pop("sha256", None)
        found = cls.from_dict(data)
        if hashlib.sha256(_canonical(data)).hexdigest() != stated:
            raise CalibrationError(f"{path} was changed or damaged after it was written: its hash does not match.")
        return found

    def _canonical(self) -> bytes:
        return _canonical(self.to_dict())


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def length_groups(groups: Labels | None, lengths: npt.NDArray[np.int64], edges: tuple[int, ...]) -> Labels:
    """The calibration group of each text: its own group, its length bin, or both.

    Raises
    ------
    ValueError
        If the edges do not ascend, or there is not one group per text.
    """
    if any(low >= high for low, high in zip((0, *edges), edges, strict=False)):
        raise ValueError(f"length_edges must be positive and ascending, got {list(edges)}.")
    if groups is not None and groups.shape != lengths.shape:
        raise ValueError(f"groups must hold one group per text ({len(lengths)}), got {len(groups)}.")
    if not edges:
        return np.full(len(lengths), "all texts") if groups is None else groups
    names = [f"{low} to {high - 1} tokens" for low, high in zip((0, *edges), edges, strict=False)]
    names.append(f"{edges[-1]} tokens and more")
    bins = np.array(names)[np.searchsorted(edges, lengths, side="right")]
    return bins if groups is None else np.char.add(np.char.add(groups, ", "), bins)
