"""Conformal prediction: calibrated p-values, intervals for sequences, exact sets of hidden states, alarms."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Loaded on first use: the room is light until something is taken from it.
_HOME = {
    "ACI": "aci",
    "Calibration": "calibration",
    "Checkpoint": "checkpoint",
    "ConformalPID": "pid",
    "ConformalPValues": "p_values",
    "DriftGuard": "drift",
    "DtACI": "aci",
    "ELond": "online_fdr",
    "EnbPI": "enbpi",
    "HMMSets": "hmm",
    "Lord": "online_fdr",
    "MarkovSets": "markov",
    "MissMartingale": "monitor",
    "MonitorResult": "monitor",
    "SPCI": "spci",
    "Saffron": "online_fdr",
    "ScoreMonitor": "monitor",
    "SentenceLabeller": "mixed_documents",
    "SentenceLabels": "mixed_documents",
    "ShortCalibrationWarning": "_sequence",
    "SplitConformal": "split",
    "StateSets": "markov",
    "calibrate": "human",
    "e_bh": "fdr",
    "false_positive_bound": "conditional",
    "human_tests": "human",
    "label_sentences": "mixed_documents",
    "monitor_scores": "monitor",
    "score_bins": "mixed_documents",
    "share_interval": "fdr",
    "storey": "fdr",
}

if TYPE_CHECKING:  # for type checkers and the reference, which do not run __getattr__
    from assay.conformal._sequence import ShortCalibrationWarning as ShortCalibrationWarning
    from assay.conformal.aci import ACI as ACI
    from assay.conformal.aci import DtACI as DtACI
    from assay.conformal.calibration import Calibration as Calibration
    from assay.conformal.checkpoint import Checkpoint as Checkpoint
    from assay.conformal.conditional import false_positive_bound as false_positive_bound
    from assay.conformal.drift import DriftGuard as DriftGuard
    from assay.conformal.enbpi import EnbPI as EnbPI
    from assay.conformal.fdr import e_bh as e_bh
    from assay.conformal.fdr import share_interval as share_interval
    from assay.conformal.fdr import storey as storey
    from assay.conformal.hmm import HMMSets as HMMSets
    from assay.conformal.human import calibrate as calibrate
    from assay.conformal.human import human_tests as human_tests
    from assay.conformal.markov import MarkovSets as MarkovSets
    from assay.conformal.markov import StateSets as StateSets
    from assay.conformal.mixed_documents import SentenceLabeller as SentenceLabeller
    from assay.conformal.mixed_documents import SentenceLabels as SentenceLabels
    from assay.conformal.mixed_documents import label_sentences as label_sentences
    from assay.conformal.mixed_documents import score_bins as score_bins
    from assay.conformal.monitor import MissMartingale as MissMartingale
    from assay.conformal.monitor import MonitorResult as MonitorResult
    from assay.conformal.monitor import ScoreMonitor as ScoreMonitor
    from assay.conformal.monitor import monitor_scores as monitor_scores
    from assay.conformal.online_fdr import ELond as ELond
    from assay.conformal.online_fdr import Lord as Lord
    from assay.conformal.online_fdr import Saffron as Saffron
    from assay.conformal.p_values import ConformalPValues as ConformalPValues
    from assay.conformal.pid import ConformalPID as ConformalPID
    from assay.conformal.spci import SPCI as SPCI
    from assay.conformal.split import SplitConformal as SplitConformal

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        value: object = getattr(import_module(f"assay.conformal.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'assay.conformal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
