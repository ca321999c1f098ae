"""Products of private records with public matrices, each row by itself.

A library's matrix product may round a row one way or another depending on how many rows stand beside it. Then one
record more changes the integers of others, and no bound on what one record moves is exact.
"""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled

_COLUMNS = 256  # at once: their part of the matrix stays in the cache


@compiled()
def project(points, directions):
    """points @ directions, float64, (n, d) and (d, k) to (n, k); coordinates are added in order."""
    n, dims = points.shape
    width = directions.shape[1]
    out = np.zeros((n, width))
    for start in range(0, width, _COLUMNS):
        stop = min(start + _COLUMNS, width)
        for i in range(n):
            row = out[i, start:stop]
            for j in range(dims):
                x = points[i, j]
                column = directions[j, start:stop]
                for c in range(stop - start):
                    row[c] += x * column[c]
    return out
