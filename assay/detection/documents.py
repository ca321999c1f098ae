"""The model-free test on many documents at once: what every scheme's `documents_test` gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class DocumentStatistics:
    """A model-free test on many documents; every array has shape (documents,).

    Attributes
    ----------
    statistic, log_pvalue, log_evalue
        float64; see `TestResult`.
    n_tokens, n_scored, n_repeats_dropped
        int64.
    """

    statistic: npt.NDArray[np.float64]
    log_pvalue: npt.NDArray[np.float64]
    log_evalue: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.int64]
    n_scored: npt.NDArray[np.int64]
    n_repeats_dropped: npt.NDArray[np.int64]
