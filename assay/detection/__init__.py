"""Detection: exact tests of watermarks on documents and corpora."""

from assay.detection.detect import detect
from assay.detection.gumbel import model_aware_test, robust_test, sum_test
from assay.detection.result import TestResult

__all__ = ["TestResult", "detect", "model_aware_test", "robust_test", "sum_test"]
