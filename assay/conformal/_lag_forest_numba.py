"""Compiled part of `_lag_forest`: bootstrap draws, split search over all lags at once, paths, trees, leaf weights.

The lag matrix is never built: row i is codes[i : i + lags], a window that slides over one series of bin codes. Position
p of the series lies in row p - f at lag f, so one position adds a contiguous stretch of the (reversed) row weights to
one row of the histogram. That is vector code, where one increment per cell of the lag matrix is not.
"""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled

_MARGIN = 1e-10


@compiled()
def _mix(x):
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): one 64-bit word from a counter."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled()
def bootstrap(rows, seed, tree, counts):
    """How often each of `rows` rows is drawn for a tree: a function of seed and tree only."""
    counts[:rows] = 0.0
    state = _mix(seed ^ _mix(np.uint64(tree) + np.uint64(0x9E3779B97F4A7C15)))
    for _ in range(rows):
        state += np.uint64(0x9E3779B97F4A7C15)
        # The top 32 bits, scaled: a bias below rows / 2**32.
        counts[((_mix(state) >> np.uint64(32)) * np.uint64(rows)) >> np.uint64(32)] += 1.0


@compiled()
def best_split(codes, lags, bins, weights, targets, padded, hist, cum, min_leaf):
    """Lag and code of the split with the largest drop of squared error: rows with code <= c go left. (-1, -1) if none.

    weights: how often each row counts in this node. Scratch: padded (2 rows + 4 lags,), hist (bins, 2 lags), cum
    (2 lags,). Count and sum stand side by side, so that one stretch carries both.
    """
    rows = weights.shape[0]
    edge = lags - 1
    total_n, total_s = 0.0, 0.0
    # Reversed and with lags - 1 zeros on both sides, so that every position adds a stretch of full length.
    padded[: 2 * edge] = 0.0
    padded[2 * (edge + rows) :] = 0.0
    for i in range(rows):
        j = 2 * (edge + rows - 1 - i)
        weighted = weights[i] * targets[i]
        padded[j] = weights[i]
        padded[j + 1] = weighted
        total_n += weights[i]
        total_s += weighted
    if total_n < 2 * min_leaf:
        return -1, -1
    hist[:] = 0.0
    for p in range(rows + edge):
        # Lag f of position p belongs to row p - f, whose pair begins at 2 (edge + rows - 1 - p + f).
        start = 2 * (edge + rows - 1 - p)
        row, part = hist[codes[p]], padded[start : start + 2 * lags]
        for f in range(2 * lags):
            row[f] += part[f]
    # Equal gains are common, as several lags cut off the same rows. The first must win whatever rounding does, and
    # rounding must not split a node whose targets are all the same: hence a margin.
    best, best_lag, best_code = total_s * total_s / total_n * (1 + _MARGIN) + 1e-300, -1, -1
    cum[:] = 0.0
    for c in range(bins - 1):
        for f in range(2 * lags):
            cum[f] += hist[c, f]
        for f in range(lags):
            left = cum[2 * f]
            right = total_n - left
            if left < min_leaf or right < min_leaf:
                continue
            rest = total_s - cum[2 * f + 1]
            gain = cum[2 * f + 1] * cum[2 * f + 1] / left + rest * rest / right
            if gain > best:
                best, best_lag, best_code = gain * (1 + _MARGIN), f, c
    return best_lag, best_code


@compiled()
def path_weights(codes, query, lags, bins, targets, trees, depth, min_leaf, seed):
    """Weights of the rows for one query, growing only the path that the query takes in each tree."""
    rows = targets.shape[0]
    out = np.zeros(rows)
    weights = np.empty(rows)
    padded, hist, cum = np.empty(2 * rows + 4 * lags), np.empty((bins, 2 * lags)), np.empty(2 * lags)
    for tree in range(trees):
        bootstrap(rows, seed, tree, weights)
        for _ in range(depth):
            lag, code = best_split(codes, lags, bins, weights, targets, padded, hist, cum, min_leaf)
            if lag < 0:
                break
            goes_left = query[lag] <= code
            for i in range(rows):
                if (codes[i + lag] <= code) != goes_left:
                    weights[i] = 0.0
        total = weights.sum()
        for i in range(rows):
            out[i] += weights[i] / (total * trees)
    return out


@compiled()
def grow(codes, lags, bins, targets, trees, depth, min_leaf, seed):
    """Whole trees: split lag and code per node (-1 where it is a leaf), each row's leaf, and how often it was drawn.

    Nodes are numbered as in a heap: the children of k are 2k + 1 and 2k + 2.
    """
    rows = targets.shape[0]
    nodes = 2 ** (depth + 1) - 1
    split_lag = np.full((trees, nodes), -1, dtype=np.int64)
    split_code = np.full((trees, nodes), -1, dtype=np.int64)
    leaf = np.zeros((trees, rows), dtype=np.int64)
    counts = np.empty((trees, rows))
    weights = np.empty(rows)
    padded, hist, cum = np.empty(2 * rows + 4 * lags), np.empty((bins, 2 * lags)), np.empty(2 * lags)
    for tree in range(trees):
        bootstrap(rows, seed, tree, counts[tree])
        for node in range(2**depth - 1):
            if node > 0 and split_lag[tree, (node - 1) // 2] < 0:
                continue
            for i in range(rows):
                weights[i] = counts[tree, i] if leaf[tree, i] == node else 0.0
            lag, code = best_split(codes, lags, bins, weights, targets, padded, hist, cum, min_leaf)
            if lag < 0:
                continue
            split_lag[tree, node], split_code[tree, node] = lag, code
            for i in range(rows):
                if leaf[tree, i] == node:
                    leaf[tree, i] = 2 * node + 1 if codes[i + lag] <= code else 2 * node + 2
    return split_lag, split_code, leaf, counts


@compiled()
def tree_weights(split_lag, split_code, leaf, counts, query):
    """Weights of the rows for one query in grown trees."""
    trees, rows = leaf.shape
    out = np.zeros(rows)
    for tree in range(trees):
        node = 0
        while node < split_lag.shape[1] and split_lag[tree, node] >= 0:
            node = 2 * node + 1 if query[split_lag[tree, node]] <= split_code[tree, node] else 2 * node + 2
        total = 0.0
        for i in range(rows):
            if leaf[tree, i] == node:
                total += counts[tree, i]
        for i in range(rows):
            if leaf[tree, i] == node:
                out[i] += counts[tree, i] / (total * trees)
    return out
