"""Compiled parts of the fast-Gauss cells: moments of every cell, and answers from the cells near a query.

Lengths are in units of sqrt(2) bandwidth, cells have side 1, and three axes are always there: an axis that the data
lacks has one cell and order 1.
"""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled

_jit = compiled()

REACH = 7  # cells on each side of a query: exp(-6.5**2) is below 1e-18


@_jit
def add_moments(places, cells, orders, one, out):
    """Add round(one * z1**i z2**j z3**k) of every record to its cell; z in [-1, 1] is its place in the cell.

    places: (n, 3), from 0. cells, orders: (3,). out: int64, (cells, orders), both flattened, last axis fastest.
    """
    index = np.zeros(3, dtype=np.int64)
    z = np.zeros(3)
    for row in range(len(places)):
        for a in range(3):
            index[a] = min(max(np.int64(np.floor(places[row, a])), 0), cells[a] - 1)
            z[a] = min(max(2.0 * (places[row, a] - index[a]) - 1.0, -1.0), 1.0)
        cell = (index[0] * cells[1] + index[1]) * cells[2] + index[2]
        column = 0
        first = 1.0
        for _ in range(orders[0]):
            second = first
            for _ in range(orders[1]):
                third = second
                for _ in range(orders[2]):
                    out[cell, column] += np.int64(np.rint(third * one))
                    third *= z[2]
                    column += 1
                second *= z[1]
            first *= z[0]


@_jit
def fill_axis(place, count, order, lacking, low, high, axis, values):
    """Cells near a query on one axis and their coefficients 2**-k / k! H_k(t) exp(-t^2), t from their middle."""
    if lacking:
        low[axis], high[axis] = 0, 1
        values[axis, 0, 0] = 1.0
        return
    centre = np.floor(place)
    low[axis] = np.int64(min(max(centre - REACH, 0.0), np.float64(count)))
    high[axis] = np.int64(min(max(centre + REACH + 1.0, 0.0), np.float64(count)))
    for cell in range(low[axis], high[axis]):
        t = place - (cell + 0.5)
        before, here = 0.0, np.exp(-t * t)
        scale = 1.0
        for k in range(order):
            values[axis, cell - low[axis], k] = scale * here
            # H_{k+1} = 2 t H_k - 2 k H_{k-1}
            before, here = here, 2.0 * t * here - 2.0 * k * before
            scale *= 0.5 / (k + 1)


@_jit
def combine(places, cells, orders, lacking, table, power):
    """Sum over near cells and moments of table * coefficient**power.

    table: float64, (cells, orders), or (1, orders) where all cells have the same.
    """
    out = np.zeros(len(places))
    low, high = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    values = np.zeros((3, 2 * REACH + 1, max(orders[0], orders[1], orders[2])))
    for row in range(len(places)):
        for a in range(3):
            fill_axis(places[row, a], cells[a], orders[a], lacking[a], low, high, a, values)
        total = 0.0
        for c0 in range(low[0], high[0]):
            for c1 in range(low[1], high[1]):
                for c2 in range(low[2], high[2]):
                    cell = (c0 * cells[1] + c1) * cells[2] + c2 if len(table) > 1 else 0
                    column = 0
                    for k0 in range(orders[0]):
                        for k1 in range(orders[1]):
                            both = values[0, c0 - low[0], k0] * values[1, c1 - low[1], k1]
                            for k2 in range(orders[2]):
                                weight = both * values[2, c2 - low[2], k2]
                                total += table[cell, column] * (weight * weight if power == 2 else weight)
                                column += 1
        out[row] = total
    return out
