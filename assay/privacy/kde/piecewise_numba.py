"""Compiled parts of the trees: exact moments of every node, a polynomial for every leaf, answers and their variances.

Units: a node of level l is 2 h_l wide, with h_l = 2**(bits - l) half steps of the grid; u = (y - centre) / h_l is a
query and xi = (x - centre) / h_l in [-1, 1] a record in the coordinate of a node. Siblings are 2 apart.
"""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled

_jit = compiled()


@_jit
def add_moments(cells, bits, depth, shifts, out):
    """Add the integers of every record to every node it lies in.

    cells: int64, (n,), in 0 .. 2**bits - 1. shifts: int64, (power, depth): moment k of level l is counted in units of
    2**shifts[k - 1, l - 1]. out: int64, (power + 1, 2**(depth + 1) - 2), level l from column 2**l - 2 on.
    """
    power = len(shifts)
    first = 2**depth - 2
    leaf_size = np.int64(1) << (bits - depth)
    for q in cells:
        leaf = q // leaf_size
        out[0, first + leaf] += 1
        if power > 0:
            out[1, first + leaf] += 2 * q - ((2 * leaf + 1) * leaf_size - 1)
        for level in range(1, depth + 1):
            if power < 2:
                break
            size = np.int64(1) << (bits - level)
            node = q // size
            z = np.float64(2 * q - ((2 * node + 1) * size - 1))
            value = z
            for k in range(2, power + 1):
                # Rounding is monotone, so |value| stays below the power of two that bounds it exactly.
                value *= z
                out[k, 2**level - 2 + node] += np.int64(np.rint(value / 2.0 ** shifts[k - 1, level - 1]))
    # Counts and first moments of a parent follow from its children without rounding.
    for level in range(depth - 1, 0, -1):
        up, down = 2**level - 2, 2 ** (level + 1) - 2
        half = np.int64(1) << (bits - level - 1)
        for node in range(2**level):
            left, right = down + 2 * node, down + 2 * node + 1
            out[0, up + node] = out[0, left] + out[0, right]
            if power > 0:
                out[1, up + node] = out[1, left] + out[1, right] + half * (out[0, right] - out[0, left])


@_jit
def binomials(power):
    """C(power, k) for k = 0 .. power."""
    row = np.ones(power + 1)
    for k in range(1, power + 1):
        row[k] = row[k - 1] * (power - k + 1) / k
    return row


@_jit
def add_affine_power(poly, weight, a, b, power):
    """Add weight (a + b u)**power to a polynomial in u."""
    term = weight * a**power if a != 0.0 or power == 0 else 0.0
    if a == 0.0:
        poly[power] += weight * b**power
        return
    poly[0] += term
    for j in range(1, power + 1):
        term *= (power - j + 1) / j * b / a
        poly[j] += term


@_jit
def add_node(poly, moments, column, a, b, sign, scale, choose):
    """Add scale times the sum over a node's records of (sign (u' - xi))**power, with u' = a + b u."""
    power = len(moments) - 1
    for k in range(power + 1):
        # (u' - xi)^p for records on the left, (xi - u')^p for those on the right.
        weight = scale * choose[k] * moments[k, column]
        if sign > 0:
            add_affine_power(poly, weight * (-1.0) ** k, a, b, power - k)
        else:
            add_affine_power(poly, weight, -a, -b, power - k)


@_jit
def leaf_polynomials(moments, depth, own):
    """The answer as a polynomial in u, for every leaf and for both sides of the interval.

    moments: float64, (power + 1, 2**(depth + 1) - 2), in units of h_l**k. own: what a record of the query's own leaf
    adds. Returns float64, (2**depth + 2, power + 1), lowest power first, in units of h_depth**power.
    """
    power = len(moments) - 1
    choose = binomials(power)
    leaves = 2**depth
    table = np.zeros((leaves + 2, power + 1))
    above = np.zeros((1, power + 1))
    for level in range(1, depth + 1):
        here = np.zeros((2**level, power + 1))
        first = 2**level - 2
        for node in range(2**level):
            side = 1.0 if node % 2 else -1.0
            # The parent's polynomial in the coordinate of this child.
            for j in range(power + 1):
                add_affine_power(here[node], 2.0**power * above[node // 2, j], 0.5 * side, 0.5, j)
            sibling = first + (node ^ 1)
            add_node(here[node], moments, sibling, 2.0 * side, 1.0, 1 if node % 2 else -1, 1.0, choose)
        above = here
    ratio = 2.0 ** (depth - 1)
    for node in range(2):
        # Centres in units of h_depth, from the left end: of the node, and of the leaves next to the interval.
        centre = (2 * node + 1) * ratio
        add_node(table[0], moments, node, (-1.0 - centre) / ratio, 1.0 / ratio, -1, ratio**power, choose)
        right = (2.0 * leaves + 1.0 - centre) / ratio
        add_node(table[leaves + 1], moments, node, right, 1.0 / ratio, 1, ratio**power, choose)
    table[1 : leaves + 1] = above
    for leaf in range(leaves):
        table[leaf + 1, 0] += own * moments[0, leaves - 2 + leaf]
    return table


@_jit
def evaluate(points, origin, width, scale, table):
    """Sum over coordinates of the polynomial of the segment that each point lies in.

    points: float64, (m, d). origin, width, scale: (d,): segment s holds [origin + (s - 1) width, origin + s width), the
    first and last also what lies beyond. table: (d, segments, power + 1).
    """
    out = np.zeros(len(points))
    segments = table.shape[1]
    top = table.shape[2] - 1
    for i in range(len(points)):
        total = 0.0
        for j in range(len(origin)):
            place = (points[i, j] - origin[j]) / width[j]
            segment = min(max(np.floor(place), -1.0), segments - 2.0)
            u = 2.0 * (place - segment) - 1.0
            row = table[j, int(segment) + 1]
            value = row[top]
            for k in range(top - 1, -1, -1):
                value = value * u + row[k]
            total += value * scale[j]
        out[i] = total
    return out


@_jit
def centred_variance(points, origin, range_, scale, levels, own):
    """Variance of the answers of a centred tree.

    range_: (d,) width of the interval. scale: (d,) h_0**power in the data's units. levels: (depth, power + 1) variance
    of moment k of a node of level l, in units of h_l**k. own: as in `leaf_polynomials`.
    """
    depth, power = levels.shape[0], levels.shape[1] - 1
    choose = binomials(power)
    out = np.zeros(len(points))
    for i in range(len(points)):
        for j in range(len(origin)):
            place = (points[i, j] - origin[j]) / range_[j]
            unit = scale[j] * scale[j]
            if place < 0.0 or place >= 1.0:
                for half in range(2):
                    u = abs(4.0 * place - (2 * half + 1))
                    for k in range(power + 1):
                        term = choose[k] * u ** (power - k)
                        out[i] += term * term * levels[0, k] * unit / 4.0**power
                continue
            for level in range(1, depth + 1):
                node = np.int64(place * 2.0**level)
                u = 2.0 * (place * 2.0**level - node) - 1.0
                apart = 2.0 + u if node % 2 else 2.0 - u
                for k in range(power + 1):
                    term = choose[k] * apart ** (power - k)
                    out[i] += term * term * levels[level - 1, k] * unit / 4.0 ** (power * level)
            out[i] += own * own * levels[depth - 1, 0] * unit / 4.0 ** (power * depth)
    return out


@_jit
def prefixes(counts, depth):
    """Sums of the first 0 .. 2**depth leaves, each from the nodes of its binary expansion."""
    leaves = 2**depth
    out = np.zeros(leaves + 1)
    for i in range(leaves + 1):
        total = 0.0
        for level in range(1, depth + 1):
            node = i >> (depth - level)
            if node & 1:
                total += counts[2**level - 2 + node - 1]
        out[i] = total
    # The whole line is no node below the root: its two halves.
    out[leaves] = counts[0] + counts[1]
    return out


@_jit
def ring_edges(place, leaves, ratio, rings, edges, weights):
    """Leaf edges of the rings around a query, in order, and how the prefix at each enters the answer.

    place: in leaves from the left end. Ring j holds ratio**-(j+1) < distance / length <= ratio**-j, weight ratio**-j.
    edges, weights: (2 rings + 2,), filled.
    """
    for side in range(2):
        for j in range(rings + 1):
            # Prefix differences: an edge ends one ring and begins the next, which has another weight.
            reach = leaves * ratio**-j
            weight = (ratio**-j if j < rings else 0.0) - (ratio ** -(j - 1) if j > 0 else 0.0)
            at = place - reach if side == 0 else place + reach
            edge = min(max(np.floor(at + 0.5), 0.0), np.float64(leaves))
            slot = j if side == 0 else 2 * rings + 1 - j
            edges[slot] = np.int64(edge)
            weights[slot] = -weight if side == 0 else weight


@_jit
def ring_answers(points, origin, range_, table, ratio, rings):
    """Answers of the ring tree. table: (d, leaves + 1) prefixes."""
    leaves = table.shape[1] - 1
    edges, weights = np.empty(2 * rings + 2, dtype=np.int64), np.empty(2 * rings + 2)
    out = np.zeros(len(points))
    for i in range(len(points)):
        for j in range(len(origin)):
            place = (points[i, j] - origin[j]) / range_[j]
            inside = min(max(place, 0.0), 1.0)
            ring_edges(inside * leaves, leaves, ratio, rings, edges, weights)
            total = abs(place - inside) * table[j, leaves]
            for slot in range(len(edges)):
                total += weights[slot] * table[j, edges[slot]]
            out[i] += total * range_[j]
    return out


@_jit
def ring_variance(points, origin, range_, depth, variance, ratio, rings):
    """Variance of the answers of the ring tree; `variance` is that of each node's count."""
    leaves = 2**depth
    edges, weights = np.empty(2 * rings + 2, dtype=np.int64), np.empty(2 * rings + 2)
    out = np.zeros(len(points))
    for i in range(len(points)):
        for j in range(len(origin)):
            place = (points[i, j] - origin[j]) / range_[j]
            inside = min(max(place, 0.0), 1.0)
            ring_edges(inside * leaves, leaves, ratio, rings, edges, weights)
            whole = abs(place - inside)
            for slot in range(len(edges)):
                if edges[slot] == leaves:
                    whole += weights[slot]
            total = 0.0
            for level in range(1, depth + 1):
                # Edges are in order, so those that use one node follow each other.
                last, weight = np.int64(-1), 0.0
                # The halves that the whole line is made of: the right one is a node of no other prefix.
                if level == 1:
                    total += whole * whole
                    last, weight = np.int64(0), whole
                for slot in range(len(edges)):
                    node = edges[slot] >> (depth - level)
                    if edges[slot] == leaves or not node & 1:
                        continue
                    if node - 1 != last:
                        total += weight * weight
                        last, weight = node - 1, 0.0
                    weight += weights[slot]
                total += weight * weight
            out[i] += total * variance * range_[j] * range_[j]
    return out
