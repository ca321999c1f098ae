"""Detection: exact tests of watermarks on documents and corpora."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from assay.detection.detect import detect
from assay.detection.gumbel import model_aware_test, robust_test, sum_test
from assay.detection.result import TestResult

if TYPE_CHECKING:
    from assay.detection.convolution import SumTail, log_sum_sf, log_weighted_count_sf, sum_tail, word_score_law
    from assay.detection.goodness_of_fit import berk_jones_test, divergence_test, log_crossing_probability
    from assay.detection.localisation import Localisation, Segment, localise
    from assay.detection.pivot_score import least_favourable_test
    from assay.detection.streaming import StreamingTest

__all__ = [
    "Localisation",
    "Segment",
    "StreamingTest",
    "SumTail",
    "TestResult",
    "berk_jones_test",
    "detect",
    "divergence_test",
    "least_favourable_test",
    "localise",
    "log_crossing_probability",
    "log_sum_sf",
    "log_weighted_count_sf",
    "model_aware_test",
    "robust_test",
    "sum_tail",
    "sum_test",
    "word_score_law",
]

# Loaded when first asked for: `detect` needs none of them.
_HOMES = {
    "Localisation": "localisation",
    "Segment": "localisation",
    "StreamingTest": "streaming",
    "SumTail": "convolution",
    "berk_jones_test": "goodness_of_fit",
    "divergence_test": "goodness_of_fit",
    "least_favourable_test": "pivot_score",
    "localise": "localisation",
    "log_crossing_probability": "goodness_of_fit",
    "log_sum_sf": "convolution",
    "log_weighted_count_sf": "convolution",
    "sum_tail": "convolution",
    "word_score_law": "convolution",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"assay.detection.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'assay.detection' has no attribute {name!r}")
