"""Tokens needed at Type II 0.1 for token laws (1 - d, d): the table and the figure of docs/explanation/ump.md.

python benchmarks/ump_tokens.py [--figure docs/images/ump_slopes.svg]

Nothing is simulated: UMP and race are sums over types, the Gumbel tests Laplace inversions (absolute error of the Type
II error below 1e-7), the green list (gamma 0.25, delta 2) exact binomial tails.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from assay.watermark import power

BETA = 0.1
TABLE = [(0.25, 1e-3), (0.25, 1e-6), (0.1, 1e-3), (0.1, 1e-6), (0.05, 1e-3), (0.02, 1e-3), (0.01, 1e-3), (0.01, 1e-6)]
CURVES: list[tuple[power.Test, str]] = [
    ("gumbel-sum", "Gumbel, sum test"),
    ("gumbel-model-aware", "Gumbel, model-aware test"),
    ("race", "one race per sequence"),
    ("ump", "UMP limit"),
]


def print_table() -> None:
    print("| d | h | alpha |" + "".join(f" {test} |" for test in power.TESTS))
    print("|---|---|---|" + "---|" * len(power.TESTS))
    for d, alpha in TABLE:
        found = [power.tokens_needed([1 - d, d], alpha, BETA, test) for test in power.TESTS]
        print(f"| {d} | {found[0].entropy:.3f} | {alpha:.0e} |" + "".join(f" {one.tokens} |" for one in found))


def draw(path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "assay"  # the same file on every run
    import matplotlib.pyplot as plt

    alpha = 1e-6
    rare = np.geomspace(0.3, 0.001, 15)
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    slopes = {}
    for test, label in CURVES:
        found = [power.tokens_needed([1 - d, d], alpha, BETA, test) for d in rare]
        h, n = np.array([one.entropy for one in found]), np.array([one.tokens for one in found])
        axes.loglog(1 / h, n, marker="o", markersize=3, label=label)
        low = h < 0.1
        slopes[test] = np.polyfit(np.log(1 / h[low]), np.log(n[low]), 1)[0]
        if test in ("ump", "gumbel-sum"):
            shape = np.log(1 / h) / h if test == "ump" else h**-2
            # Guides pass through the last point; log(1/h) must be positive.
            used = h < 0.5
            text = "$h^{-1}\\,\\log(1/h)$" if test == "ump" else "$h^{-2}$"
            guide = shape[used] * n[-1] / shape[-1]
            axes.loglog(1 / h[used], guide, color="0.6", linestyle="--" if test == "ump" else ":", label=text)
    axes.set_xlabel("1 / entropy per token (1 / nats)")
    axes.set_ylabel("tokens for Type II 0.1 at alpha = 1e-6")
    axes.legend(fontsize="small")
    axes.grid(visible=True, which="major", linewidth=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})
    print("fitted exponents of 1/h, entropies below 0.1:", {test: round(float(s), 2) for test, s in slopes.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", help="also draw the slopes, as SVG, to this path")
    arguments = parser.parse_args()
    began = time.perf_counter()
    print_table()
    if arguments.figure:
        draw(arguments.figure)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
