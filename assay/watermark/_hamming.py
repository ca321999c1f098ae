"""Hamming balls around i.i.d. tokens, collapsed by orbits: one variable for each type of text.

The group that permutes positions and, at each position, tokens of equal probability keeps rho and Hamming distances, so
averaging a plan over it changes neither feasibility nor value; its orbits are the counts of tokens by distinct
probability. Proof in docs/explanation/ump.md. Source: Gatermann and Parrilo (2004), symmetry reduction.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
from scipy import sparse, special

from assay.watermark import _types
from assay.watermark._laws import Floats, Integers, group_law
from assay.watermark._robust_lp import RobustSolution, check_size, solve

MAX_ORBITS = 20_000
MAX_FLOW_WORK = 50_000_000  # orbits times ways to move up to `radius` tokens between groups


def hamming_orbits(n: int, law: Floats, radius: int, alpha: float) -> RobustSolution:
    """`robust.hamming_type2_error` for checked arguments."""
    log_p, multiplicity = group_law(law)
    shares = np.asarray(multiplicity * np.exp(log_p), dtype=np.float64)
    table = _types.type_table(shares, n, MAX_ORBITS)
    if table is None:
        raise ValueError(
            f"token_law must have few distinct probabilities for n = {n} (at most {MAX_ORBITS} orbits), got "
            f"{len(log_p)}. Merge tokens into groups of equal probability, or lower n."
        )
    counts, mass = table
    text, reached, log_ways = _ball(counts, multiplicity, radius)
    orbits, column = np.unique(reached, axis=0, return_inverse=True)
    log_size = special.gammaln(n + 1.0) + np.sum(orbits * np.log(multiplicity) - special.gammaln(orbits + 1.0), axis=1)
    # K(T, S) / N_S: the share of orbit S that one text of type T covers, on average the load of W_T on a text of S.
    column = column.reshape(-1)
    load = np.exp(log_ways - log_size[column])
    incidence = sparse.csr_matrix((load, (text, column)), shape=(len(counts), len(orbits)))
    check_size(incidence.nnz)
    solution = solve(mass, incidence, alpha, left_out=max(0.0, 1.0 - math.fsum(mass)))
    return replace(solution, text_orbits=counts, region_orbits=orbits)


def _ball(counts: Integers, multiplicity: Integers, radius: int) -> tuple[Integers, Integers, Floats]:
    """For a text of each type: the types in its Hamming ball, and the log-number of texts of each way to get there."""
    groups = counts.shape[1]
    # A replaced token goes to another group, or to another token of its own.
    arcs = [(g, h) for g in range(groups) for h in range(groups) if g != h or multiplicity[g] > 1]
    choices = np.log([multiplicity[h] - (g == h) for g, h in arcs]) if arcs else np.empty(0)
    flows = math.comb(len(arcs) + radius, radius)
    if flows * len(counts) > MAX_FLOW_WORK:
        raise ValueError(
            f"radius must be smaller for this token law, got {radius}: {flows} ways to replace tokens in each of "
            f"{len(counts)} orbits. Merge tokens into fewer groups of equal probability, or lower n or radius."
        )
    texts, reached, log_ways = [], [], []
    for size in range(radius + 1):
        for moved in itertools.combinations_with_replacement(range(len(arcs)), size):
            flow = np.bincount(np.array(moved, dtype=np.int64), minlength=len(arcs))
            out, gain = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)
            for (g, h), amount in zip(arcs, flow, strict=True):
                out[g] += amount
                gain[h] += amount
            possible = np.flatnonzero((counts >= out).all(axis=1))
            start = counts[possible]
            places = special.gammaln(start + 1.0) - special.gammaln(start - out + 1.0)
            ways = float(np.sum(flow * choices - special.gammaln(flow + 1.0)))
            texts.append(possible)
            reached.append(start - out + gain)
            log_ways.append(places.sum(axis=1) + ways)
    return np.concatenate(texts), np.concatenate(reached), np.concatenate(log_ways)
