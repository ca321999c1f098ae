"""Private kernel sums: errors beside the reference table, and speed.

    python benchmarks/privacy_kde.py [--quick] [--out benchmarks/results/privacy_kde.md]

Errors: Beta(2, 5) records in [0, 1]^d, 100 queries of the same law, epsilon = 1 under add/remove, and rho = 0.01747,
which is (1, 1e-6) by rho + 2 sqrt(rho ln(1 / delta)). The figure is the expected root mean square error of the released
sum for these records and queries, root of mean(standard_error^2 + bias^2): the standard error is exact, the bias is
measured with the noise off. "drawn" is the same from real noise, where that is at most 4e6 draws a release. The l1
constructions of d coordinates are d of one coordinate with a d-th of the budget, and are measured so: memory then does
not grow.

The references in brackets were measured from few draws, in the last row from one, whose queries share their noise:
they scatter by up to a third around their own formula, 2 sqrt(2) L^1.5 d^1.5 sqrt(1 + E y^2) for the refined tree.

Targets: the published trees reproduce within 10 % (of the reference or of that formula); centred, pure at d = 1,
n = 1e6: at most 7.2 R / epsilon; zCDP at d = 64: at most 600; the default at most 1/20 of the refined tree in every
cell; fit of n = 1e6, d = 1 at most 1 s beside the noise; 1e6 queries/s on one core at d = 1. Seconds are CPU time.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import math
import platform
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import rho_for
from assay.privacy.kde import L1KDE, GaussianKDE, LpKDE
from assay.privacy.noise import ExactNoise

Floats = npt.NDArray[np.float64]

RHO = rho_for(1.0, 1e-6)
QUERIES = 100
CELLS = [(n, d) for n in (10**4, 10**5, 10**6) for d in (1, 8, 64)]
# Columns: name, settings of L1KDE, budget.
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "refined": ({"construction": "refined"}, {"epsilon": 1}),
    "rings 0.1": ({"construction": "rings", "alpha": 0.1}, {"epsilon": 1}),
    "rings 0.5": ({"construction": "rings", "alpha": 0.5}, {"epsilon": 1}),
    "bins 32": ({"construction": "histogram", "depth": 5}, {"epsilon": 1}),
    "bins 256": ({"construction": "histogram", "depth": 8}, {"epsilon": 1}),
    "centred pure": ({"construction": "centred"}, {"epsilon": 1}),
    "centred zCDP": ({"construction": "centred"}, {"rho": RHO}),
    "default pure": ({}, {"epsilon": 1}),
    "default (1, 1e-6)": ({}, {"epsilon": 1, "delta": 1e-6}),
}
REFERENCE = {
    (10**4, 1): (160.6, 93.8, 444.7, 3.6, 9.2, 6.5, 7.3),
    (10**4, 8): (3937, 1026, 3915, 71.8, 168.6, 158.8, 59.0),
    (10**4, 64): (68979, 14055, 34153, 2014, 4793, 2695, 402),
    (10**5, 1): (201.8, 944, 4446, 20.8, 8.1, 7.1, 8.0),
    (10**5, 8): (4763, 6997, 34396, 169.7, 232.9, 126.3, 62.9),
    (10**5, 64): (95051, 62231, 268321, 2228, 3157, 2274, 419),
    (10**6, 1): (267.6, 9441, 44915, 207.3, 10.9, 6.6, 9.9),
    (10**6, 8): (5900, 71775, 338810, 1228, 144.1, 122.8, 73.9),
    (10**6, 64): (184770, 559680, 2643885, 9781, 3653, 4323, 428),
}


class NoNoise:
    """Adds nothing."""

    name = "none"
    seeded = False

    def laplace(self, scale: Fraction, size: Any) -> npt.NDArray[np.int64]:
        """Zeros."""
        return np.zeros(size, dtype=np.int64)

    gaussian = laplace


class Timed:
    """Real noise, and the CPU seconds it took."""

    name = "exact"
    seeded = False

    def __init__(self) -> None:
        self.seconds = 0.0
        self._source = ExactNoise()

    def laplace(self, scale: Fraction, size: Any) -> npt.NDArray[np.int64]:
        """See `NoiseSource`."""
        began = time.process_time()
        drawn = self._source.laplace(scale, size)
        self.seconds += time.process_time() - began
        return drawn

    def gaussian(self, variance: Fraction, size: Any) -> npt.NDArray[np.int64]:
        """See `NoiseSource`."""
        began = time.process_time()
        drawn = self._source.gaussian(variance, size)
        self.seconds += time.process_time() - began
        return drawn


def one_coordinate(column: str, n: int, d: int) -> dict[str, Any]:
    """Settings of one coordinate of a release of `d`: as the public rule plans the whole, with a d-th of the budget."""
    settings, budget = COLUMNS[column]
    whole = L1KDE(low=0, high=1, n=n, dims=d, adjacency="add-remove", unit="event", **settings, **budget).plan()
    amount = whole.terms.amount / d
    return {
        **settings,
        "construction": whole.design.name,
        "depth": whole.design.depth,
        **({"epsilon": amount} if whole.terms.law == "laplace" else {"rho": amount}),
    }


def coordinates(n: int, d: int, seed: int = 1) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Records, queries and exact sums of each coordinate in turn."""
    rng = np.random.default_rng([seed, n, d])
    for _ in range(d):
        records, queries = rng.beta(2, 5, n), rng.beta(2, 5, QUERIES)
        order = np.sort(records)
        below = np.searchsorted(order, queries)
        sums = np.concatenate([[0.0], np.cumsum(order)])
        yield records, queries, queries * (2 * below - n) + sums[-1] - 2 * sums[below]


def cell(n: int, d: int, names: list[str]) -> dict[str, tuple[float, float]]:
    """Expected and drawn root mean square errors of the columns in one cell."""
    plans = {name: one_coordinate(name, n, d) for name in names}
    bias = {name: np.zeros(QUERIES) for name in names}
    variance = {name: np.zeros(QUERIES) for name in names}
    drawn = {name: np.zeros(QUERIES) for name in names}
    for records, queries, exact in coordinates(n, d):
        for name in names:
            make = {"low": 0, "high": 1, "n": n, "adjacency": "add-remove", "unit": "event", **plans[name]}
            quiet = L1KDE(**make).fit(records, noise=NoNoise())
            bias[name] += quiet.query(queries) - exact
            variance[name] += quiet.standard_error(queries) ** 2
            # One release of all coordinates, where it is small.
            small = d * sum(array.size for array in quiet.arrays_.values()) <= 4e6
            drawn[name] += (
                math.nan if not small else L1KDE(**make).fit(records, noise=ExactNoise()).query(queries) - exact
            )
    return {
        name: (
            float(np.sqrt(np.mean(variance[name] + bias[name] ** 2))),
            float(np.sqrt(np.mean(drawn[name] ** 2))),
        )
        for name in names
    }


def errors(cells: list[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The table and the verdicts."""
    names = list(COLUMNS)
    lines = ["| n, d | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    targets = []
    for n, d in cells:
        found = cell(n, d, names)
        texts = []
        for i, name in enumerate(names):
            expected, drawn = found[name]
            reference = f" ({REFERENCE[n, d][i]:g})" if i < 7 else ""
            texts.append(f"{expected:.4g}{reference}" + ("" if math.isnan(drawn) else f", drawn {drawn:.3g}"))
        lines.append(f"| 1e{round(math.log10(n))}, {d} | " + " | ".join(texts) + " |")
        refined = found["refined"][0]
        depth = max(1, (n - 1).bit_length())
        formula = 2 * math.sqrt(2) * depth**1.5 * d**1.5 * math.sqrt(1 + 6 / 56)
        targets.append(
            f"n = {n:g}, d = {d}: refined tree {refined / REFERENCE[n, d][0]:.3f} of the reference, "
            f"{refined / formula:.3f} of its formula; rings 0.1 {found['rings 0.1'][0] / REFERENCE[n, d][1]:.3f}, "
            f"rings 0.5 {found['rings 0.5'][0] / REFERENCE[n, d][2]:.3f} of the reference; refined over default: "
            f"pure {refined / found['default pure'][0]:.1f}, (1, 1e-6) {refined / found['default (1, 1e-6)'][0]:.1f}"
        )
    return lines, targets


def fourier() -> list[str]:
    """n = 1e4, d = 64: sampling error alone, pure, zCDP, beside the reference."""
    reference = {200: (148, 155, 149), 1000: (69, 96, 68), 5000: (32, 132, 32)}
    rng = np.random.default_rng(7)
    points, queries = rng.normal(size=(10**4, 64)), rng.normal(size=(20, 64))
    bandwidth = math.sqrt(64 / math.log(1 / 0.61))  # a mean kernel of about 0.61, as there
    squares = (points**2).sum(axis=1)[:, None] + (queries**2).sum(axis=1) - 2 * points @ queries.T
    exact = np.exp(-squares / (2 * bandwidth**2)).sum(axis=0)
    lines = [
        f"Mean true sum {exact.mean():.0f} (reference 6098). The sampling error depends on the records.",
        "",
        "| pairs | sampling error | pure | zCDP | noise alone, pure | noise alone, zCDP |",
        "|---|---|---|---|---|---|",
    ]
    for pairs, known in reference.items():
        error, noise = [], []
        for seed in range(4):
            for budget in ({"epsilon": 1}, {"rho": RHO}):
                kde = GaussianKDE(
                    bandwidth=bandwidth,
                    dims=64,
                    n=10**4,
                    adjacency="add-remove",
                    unit="event",
                    pairs=pairs,
                    seed=seed,
                    construction="features",
                    **budget,  # type: ignore[arg-type]
                )
                kde.fit(points, noise=NoNoise())
                noise.append(float(kde.standard_error(queries[:1])[0]))
            error.append(kde.query(queries) - exact)
        sampling = float(np.sqrt(np.mean(np.square(error))))
        pure, zcdp = (math.hypot(sampling, one) for one in noise[:2])
        cells = [f"{v:.4g} ({k})" for v, k in zip((sampling, pure, zcdp), known, strict=True)]
        lines.append(
            f"| {pairs} | "
            + " | ".join(cells)
            + f" | {noise[0]:.4g} ({2 * math.sqrt(pairs):.4g}) | {noise[1]:.4g} (5.35) |"
        )
    return lines


def speed() -> list[str]:
    """CPU seconds of a fit beside its noise, and queries a second."""
    rng = np.random.default_rng(3)
    points, queries = rng.beta(2, 5, 10**6), rng.uniform(0, 1, 10**6)
    lines = [
        "| n = 1e6, d = 1, pure | fit without noise, s | noise, s | queries/s | standard errors/s |",
        "|---|---|---|---|---|",
    ]
    makers: dict[str, Any] = {
        kind: L1KDE(low=0, high=1, n=10**6, epsilon=1, adjacency="add-remove", unit="event", construction=kind)
        for kind in ("centred", "refined", "rings", "histogram")
    }
    for p in (2, 3):
        makers[f"p = {p}"] = LpKDE(power=p, low=0, high=1, n=10**6, epsilon=1, adjacency="add-remove", unit="event")
    makers["Gaussian, cells"] = GaussianKDE(
        bandwidth=0.1, dims=1, low=0, high=1, n=10**6, epsilon=1, adjacency="add-remove", unit="event"
    )
    for name, kde in makers.items():
        few = 10**6 if name != "rings" else 10**4
        type(kde)(**kde.get_params()).fit(points[:1000], noise=NoNoise()).query(queries[:10])  # compiles
        source = Timed()
        began = time.process_time()
        kde.fit(points, noise=source)
        fitted = time.process_time() - began - source.seconds
        began = time.process_time()
        kde.query(queries[:few])
        asked = time.process_time() - began
        kde.standard_error(queries[:10])
        began = time.process_time()
        kde.standard_error(queries[:few])
        weighed = time.process_time() - began
        lines.append(f"| {name} | {fitted:.2f} | {source.seconds:.2f} | {few / asked:.2e} | {few / weighed:.2e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="n of at most 1e5 and d of at most 8")
    parser.add_argument("--out", type=Path, help="also write the page here")
    arguments = parser.parse_args()
    cells = [(n, d) for n, d in CELLS if not arguments.quick or (n <= 10**5 and d <= 8)]
    table, targets = errors(cells)
    page = [
        "# Private kernel sums",
        "",
        f"`python benchmarks/privacy_kde.py`, Python {platform.python_version()}, one thread, CPU time. The head of",
        "the script says what the columns are. In brackets the reference.",
        "",
        "## Root mean square error of the released sum of l1 distances",
        "",
        *table,
        "",
        *[f"* {line}" for line in targets],
        "",
        "## Gaussian kernel by random Fourier features, n = 1e4, d = 64",
        "",
        *fourier(),
        "",
        "## Speed",
        "",
        *speed(),
    ]
    text = "\n".join(page) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
