"""Compiled prediction of many small regression trees, laid end to end in flat arrays."""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled


@compiled()
def predict_trees(rows, roots, left, right, feature, threshold, value, weights):
    """Weighted sum of the trees' predictions for each row; rows are float32, as the trees compare them."""
    out = np.zeros(rows.shape[0])
    for i in range(rows.shape[0]):
        total = 0.0
        for tree in range(roots.shape[0]):
            node = roots[tree]
            while left[node] >= 0:
                node = left[node] if np.float64(rows[i, feature[node]]) <= threshold[node] else right[node]
            total += weights[tree] * value[node]
        out[i] = total
    return out
