"""Detection: exact tests of watermarks and of unmarked model text, on documents and corpora.

Every module begins with its null law and the source. Where it is proved, and which test holds it to that:

=====================================  =========================  ==================================================
module                                 docs/explanation/          tests/detection/
=====================================  =========================  ==================================================
gumbel, tails                          tests-and-null-laws.md     test_gumbel_tests.py, test_tails.py
convolution, pivot_score               tests-and-null-laws.md     test_convolution.py, test_pivot_score.py
goodness_of_fit                        tests-and-null-laws.md     test_goodness_of_fit.py
streaming, localisation                tests-and-null-laws.md     test_streaming.py, test_localisation.py
inverse_transform                      schemes.md                 test_inverse_transform_tests.py
dual_gumbel                            schemes.md                 test_dual_gumbel_tests.py
payload_gumbel                         schemes.md                 test_payload_decoding.py
bits: lists, tournament, dipmark       schemes.md                 test_bits.py, test_bit_schemes.py
sequence                               sequence-watermark.md      test_sequence_tests.py
hf_*, synthid_text, *_gumbel           deployed-marks.md          test_deployed_tests.py
zero_shot                              zero-shot.md               zero_shot/
multiplicity, combine                  tests-and-null-laws.md     test_multiplicity.py
=====================================  =========================  ==================================================

All of them on human text, under keys by the thousand: test_null_calibration.py, and ../conformance for every scheme.
"""

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
