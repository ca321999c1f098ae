"""Conformal prediction: calibrated p-values, intervals for sequences, exact sets of hidden states, alarms."""

from __future__ import annotations

from importlib import import_module

# Loaded on first use: the room is light until something is taken from it.
_HOME = {
    "ACI": "aci",
    "Calibration": "calibration",
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

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        value: object = getattr(import_module(f"assay.conformal.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'assay.conformal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
