"""Continual release: variances, simulated errors and speed, each next to its reference figure.

    python benchmarks/privacy_continual.py [--runs 20] [--quick] [--jax-privacy PYTHON]
    python benchmarks/privacy_continual.py --figure docs/images/privacy-crossover.svg

PYTHON is an interpreter that has jax-privacy 2.x; without it its rows are left out. The second command only draws the
figure of docs/explanation/privacy-continual.md. One thread. Times are process CPU times, medians over repeats. Targets:
closed forms to 1e-6; BLT with 5 buffers within 0.5 % of the square root at T = 2^16; largest errors within 15 % of the
published table; tree and k-ary at least 1e6 steps/s; T = 2^20 by FFT in at most 2 s.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import dataclasses
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from assay.privacy.continual import Counter, Selection, crossover, plan_counter, plan_selection
from assay.privacy.continual import toeplitz as tp
from assay.privacy.continual import trees as tr
from assay.privacy.noise import ExactNoise, SeededNoise, gaussian_variance, laplace_scale

TERMS: dict[str, Any] = {"adjacency": "add-remove", "unit": "event"}
HALF = Fraction(1, 2)

# Mean and largest variance at T = 2^10 and 2^16, as published.
VARIANCES = {
    "pure: noise on each step": ((1025, 2048), (65537, 131072)),
    "pure: binary tree": ((1210, 2420), (4624, 9248)),
    "pure: Honaker": ((702.3, 1404), (2544, 5088)),
    "pure: k-ary, k = 19": ((199.5, 378), (950.1, 1850)),
    "pure: k-ary, best k": ((170.5, 324), (614.6, 1184)),
    "zCDP: binary tree": ((55.0, 110), (136.0, 272)),
    "zCDP: left children only": ((50.0, 100), (128.0, 256)),
    "zCDP: smooth binary": ((49, 49), (100, 100)),
    "zCDP: Honaker": ((31.9, 63.8), (74.8, 149.7)),
    "zCDP: BLT, 1 buffer": ((None, 14.94), (None, 57.9)),
    "zCDP: BLT, 2 buffers": ((None, 11.09), (None, 25.8)),
    "zCDP: BLT, 3 buffers": ((None, 10.74), (None, 22.06)),
    "zCDP: BLT, 5 buffers": ((9.671, 10.710), (19.77, 21.19)),
    "zCDP: square root": ((9.671, 10.710), (19.66, 21.13)),
    "zCDP: nuclear bound": ((8.466, None), (17.91, None)),
}
# Mean over runs of the largest |error| over time.
LARGEST = {
    2**10: {"binary tree": 131, "k-ary tree": 44.8, "zCDP binary tree": 25.5, "square root": 9.8},
    2**16: {"binary tree": 346, "k-ary tree": 116.6, "zCDP binary tree": 51.6, "square root": 18.1},
}
# T -> recompute zCDP, square root d = 4, 16, 64, 256, recompute pure, k-ary (k = 19) d = 1, 4, 16.
SELECTION: dict[int, tuple[float | None, ...]] = {
    2**8: (15.6, 15.8, 38.1, 82.6, 190, 30.1, 36, 146, 743),
    2**10: (27.1, 20.7, 46.9, 102, 220, 76.0, 50, 206, 906),
    2**12: (46.8, 28.5, 60.1, 130, 280, 171, 75, 303, 1515),
    2**14: (80.1, 30.1, 76.4, 158, 316, 375, 98, 408, 1815),
    2**16: (133, 38.2, 83.5, 172, None, 797, 110, 468, 2285),
}


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def closed_form(name: str, horizon: int) -> tuple[float | None, float | None]:
    """Mean and largest variance, pure at epsilon 1, zCDP at rho 1/2."""
    if name.endswith("bound"):
        return tp.nuclear_bound(horizon), None
    designs: dict[str, Any] = {
        "pure: noise on each step": lambda: tr.Plain(horizon),
        "pure: binary tree": lambda: tr.BinaryTree(horizon, left_only=False),
        "pure: Honaker": lambda: tr.Honaker(horizon),
        "pure: k-ary, k = 19": lambda: tr.KaryTree(horizon, 19),
        "pure: k-ary, best k": lambda: tr.KaryTree(horizon, tr.best_arity(horizon)),
        "zCDP: binary tree": lambda: tr.BinaryTree(horizon, left_only=False),
        "zCDP: left children only": lambda: tr.BinaryTree(horizon - 1),
        "zCDP: smooth binary": lambda: tr.SmoothTree(horizon),
        "zCDP: Honaker": lambda: tr.Honaker(horizon),
        "zCDP: square root": lambda: tp.SquareRoot(horizon),
    }
    if "BLT" in name:
        design: Any = tp.fit_blt(horizon, int(name.split()[2]))
    else:
        design = designs[name]()
    mean, worst = tr.mean_and_max_rows(design)
    unit = 2 * design.l1**2 if name.startswith("pure") else design.l2_squared
    return unit * mean, unit * worst


def show_variances() -> None:
    print("\nVariance of a release: mean / largest [published]")
    for name, (small, large) in VARIANCES.items():
        cells = []
        for horizon, published in ((2**10, small), (2**16, large)):
            found = closed_form(name, horizon)
            cells.append(" / ".join("-" if value is None else f"{value:.7g}" for value in found))
            cells.append("[" + " / ".join("-" if value is None else f"{value:g}" for value in published) + "]")
        print(f"  {name:26s} {cells[0]:>24s} {cells[1]:16s} {cells[2]:>24s} {cells[3]}")
    root, blt = closed_form("zCDP: square root", 2**16)[1], closed_form("zCDP: BLT, 5 buffers", 2**16)[1]
    assert root is not None
    assert blt is not None
    print(f"  BLT with 5 buffers over square root at 2^16: {blt / root - 1:+.3%} (target <= 0.5 %)")


def plans(horizon: int) -> dict[str, Any]:
    return {
        "binary tree": plan_counter(horizon, mechanism="binary tree", epsilon=1, **TERMS),
        "k-ary tree": plan_counter(horizon, mechanism="k-ary tree", epsilon=1, **TERMS),
        "zCDP binary tree": plan_counter(horizon, mechanism="binary tree", rho=HALF, **TERMS),
        "square root": plan_counter(horizon, mechanism="square root", rho=HALF, **TERMS),
    }


def show_simulation(runs: int, quick: bool) -> None:
    print("\nSimulation: mean square over its closed form (in standard errors), mean largest |error| [published]")
    source = SeededNoise(1)
    for horizon in (2**10,) if quick else (2**10, 2**16):
        for name, plan in plans(horizon).items():
            steps, exact = np.ones(horizon, int), np.arange(1, horizon + 1)
            errors = [np.asarray(Counter(plan, noise=source).extend(steps))[:, 0] - exact for _ in range(runs)]
            squares = np.array([float(np.mean(error.astype(float) ** 2)) for error in errors])
            expected = plan.mean_and_max_variance[0]
            off = (squares.mean() - expected) / (squares.std(ddof=1) / math.sqrt(runs))
            largest = float(np.mean([np.abs(error).max() for error in errors]))
            print(
                f"  T = {horizon:6d} {name:18s} {squares.mean() / expected:6.3f} ({off:+.1f})   "
                f"{largest:7.1f} [{LARGEST[horizon][name]}]"
            )


def largest_error(plan: Any, runs: int, source: SeededNoise) -> float:
    rows = np.ones((plan.horizon, plan.columns), dtype=np.int8)
    truth = np.arange(1, plan.horizon + 1)
    found = [np.abs(np.asarray(Selection(plan, noise=source).extend(rows)) - truth).max() for _ in range(runs)]
    return float(np.mean(found))


def show_selection(runs: int, quick: bool) -> None:
    print("\nMaxSum: mean largest |error| on the worst stream [published], expected by the planner's formula")
    source = SeededNoise(2)
    ways: list[tuple[str, int, Any, dict[str, Any]]] = [
        ("recompute zCDP", 4, "recompute", {"rho": HALF}),
        *((f"square root d={d}", d, "tree", {"rho": HALF}) for d in (4, 16, 64, 256)),
        ("recompute pure", 4, "recompute", {"epsilon": 1}),
        *((f"k-ary pure d={d}", d, "tree", {"epsilon": 1}) for d in (1, 4, 16)),
    ]
    for horizon, published in SELECTION.items():
        if quick and horizon > 2**12:
            break
        for (name, columns, way, privacy), value in zip(ways, published, strict=True):
            if value is None:
                continue
            plan = plan_selection("max", horizon, columns, way=way, **privacy, **TERMS)
            count = max(4, min(4 * runs, 2**22 // (horizon * columns)))
            found = largest_error(plan, count, source)
            note = ""
            if name.startswith("k-ary"):  # the published column is for k = 19; the planner takes the best k
                fixed = plan_counter(horizon, mechanism="k-ary tree", arity=19, columns=columns, **privacy, **TERMS)
                nineteen = largest_error(dataclasses.replace(plan, counter=fixed), count, source)
                note = f"   k = 19: {nineteen:8.1f} ({nineteen / value - 1:+.0%})"
            print(
                f"  T = {horizon:6d} {name:18s} {found:8.1f} [{value:g}] {found / value - 1:+5.0%}   "
                f"formula {plan.expected_error:8.1f}{note}"
            )
    where = {d: math.log2(crossover(d, rho=HALF, **TERMS)) for d in (4, 16, 64, 256, 1024)}
    reference = {4: 7.5, 16: 11.75, 64: 15.75, 256: 19.5, 1024: 23.25}
    print("  crossover, log2 T [published]:", ", ".join(f"d={d}: {t:g} [{reference[d]}]" for d, t in where.items()))


def show_peer(runs: int) -> None:
    """OpenDP has no continual release; its b-ary tree with consistency answers prefix sums of a whole batch at once."""
    try:
        import opendp.prelude as dp
    except ImportError:
        print("\nOpenDP b-ary tree: not installed")
        return
    dp.enable_features("contrib")
    horizon, exact = 2**10, np.arange(1, 2**10 + 1)
    print("\nPrefix sums at T = 2^10, pure, epsilon 1: mean / largest mean square, steps per CPU second")
    for arity in (2, 4, 16):
        levels = math.ceil(math.log(horizon, arity)) + 1
        space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
        tree = dp.t.make_b_ary_tree(*space, leaf_count=horizon, branching_factor=arity)
        mechanism = tree >> dp.m.then_laplace(scale=float(levels))
        consistent = dp.t.make_consistent_b_ary_tree(branching_factor=arity)
        assert mechanism.map(1) <= 1 + 1e-9
        began = time.process_time()
        released = [np.cumsum(consistent(mechanism([1] * horizon)))[:horizon] for _ in range(4 * runs)]
        rate = 4 * runs * horizon / (time.process_time() - began)
        squares = np.mean((np.array(released) - exact) ** 2.0, axis=0)
        print(f"  OpenDP, batch, b = {arity:2d}        {squares.mean():7.1f} / {squares.max():7.1f}   {rate:10,.0f}")
    plan = plan_counter(horizon, epsilon=1, **TERMS)
    began = time.process_time()
    for _ in range(4 * runs):
        Counter(plan, noise=ExactNoise()).extend(np.ones(horizon, int))
    rate = 4 * runs * horizon / (time.process_time() - began)
    mean, worst = plan.mean_and_max_variance
    print(f"  ours, online, k-ary          {mean:7.1f} / {worst:7.1f}   {rate:10,.0f}   (exact)")


def prefix_filter(c: np.ndarray) -> np.ndarray:
    """First column of A C^-1 for a Toeplitz C with first column c: the power series 1 / ((1 - x) c(x)), by Newton."""
    from scipy.signal import fftconvolve

    found = np.array([1 / c[0]])
    while len(found) < len(c):
        length = 2 * len(found)
        correction = -fftconvolve(c[:length], found)[:length]
        correction[0] += 2
        found = fftconvolve(found, correction)[:length]
    return np.cumsum(found[: len(c)])


def errors_of(c: np.ndarray, horizon: int) -> tuple[float, float]:
    """Mean and largest variance at rho 1/2 of the Toeplitz C with this first column, filled up with zeros."""
    rows = np.cumsum(prefix_filter(np.pad(c, (0, horizon - len(c)))) ** 2)
    sensitivity = float(np.sum(c**2))
    return sensitivity * float(rows.mean()), sensitivity * float(rows.max())


def show_jax_privacy(python: str, horizons: tuple[int, ...]) -> None:
    """The same job with noise for the same rho: strategies of both, their variances by the same code."""
    for horizon in horizons:
        print(f"\nPrefix sums at T = {horizon}, zCDP: mean / largest variance, CPU s to build (jax: again, compiled)")
        ours: dict[str, Callable[[], Any]] = {
            "square root": lambda t=horizon: tp.square_root(t),
            "BLT, 3 buffers": lambda t=horizon: tp.fit_blt.__wrapped__(t, 3),
            "BLT, 5 buffers": lambda t=horizon: tp.fit_blt.__wrapped__(t, 5),
            "banded, 64": lambda t=horizon: np.array(tp.fit_banded.__wrapped__(t, 64).coefficients),
            "cut off, 64": lambda t=horizon: tp.square_root(64),
        }
        for name, build in ours.items():
            began = time.process_time()
            found = build()
            seconds = time.process_time() - began
            if isinstance(found, tp.BufferedLinear):
                poles = np.array(found.poles)
                powers = poles ** np.arange(horizon - 1)[:, None]
                found = np.concatenate([[1.0], powers @ tp.blt_weights(poles, np.array(found.zeros))])
            mean, worst = errors_of(found, horizon)
            print(f"  {'ours':18s} {name:18s} {mean:9.4f} / {worst:9.4f}   {seconds:8.3f}")
        with tempfile.TemporaryDirectory() as scratch:
            command = [python, str(Path(__file__).with_name("privacy_continual_jax.py")), scratch, str(horizon)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr)
            for file in sorted(Path(scratch).glob("*.npz")):
                saved = np.load(file)
                mean, worst = errors_of(saved["c"], horizon)
                first, again = saved["seconds"]
                label = f"jax-privacy {saved['version']}"
                print(f"  {label:18s} {file.stem:18s} {mean:9.4f} / {worst:9.4f}   {first:8.3f} ({again:.3f})")
        print(f"  no factorisation has a mean below {tp.nuclear_bound(horizon):.4f}")


def draw(path: str) -> None:
    """Expected largest error of MaxSum, recompute against tree, by T and d, with the crossovers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "assay"  # the same file on every run
    import matplotlib.pyplot as plt

    horizons = [1 << power for power in range(4, 23)]
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    errors = [plan_selection("max", t, 1, way="recompute", rho=HALF, **TERMS).expected_error for t in horizons]
    axes.loglog(horizons, errors, color="black", linewidth=2, label="recompute, any d")
    for columns in (4, 16, 64, 256):
        errors = [plan_selection("max", t, columns, way="tree", rho=HALF, **TERMS).expected_error for t in horizons]
        (line,) = axes.loglog(horizons, errors, label=f"tree, d = {columns}")
        at = crossover(columns, rho=HALF, **TERMS)
        error = plan_selection("max", at, columns, way="tree", rho=HALF, **TERMS).expected_error
        axes.plot([at], [error], "o", color=line.get_color(), markersize=6)
        print(f"d = {columns}: trees from T = 2^{math.log2(at):g} on")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("steps T")
    axes.set_ylabel("expected largest error over time, rho = 1/2")
    axes.legend(fontsize="small")
    axes.grid(visible=True, which="major", linewidth=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})


def show_speed(repeats: int) -> None:
    horizon = 2**20
    steps = np.random.default_rng(0).integers(0, 2, horizon)
    print("\nSpeed at T = 2^20, noise included: M steps per CPU second")
    for name, privacy in [
        ("binary tree", {"epsilon": 1}),
        ("k-ary tree", {"epsilon": 1}),
        ("smooth tree", {"rho": HALF}),
        ("Honaker", {"rho": HALF}),
        ("BLT", {"rho": HALF, "memory": 6}),
        ("square root", {"rho": HALF}),
    ]:
        plan = plan_counter(horizon, mechanism=name, **privacy, **TERMS)  # type: ignore[arg-type]
        Counter(plan, noise=ExactNoise()).extend(steps[:100])  # compile
        seconds = statistics.median(
            cpu_seconds(lambda plan=plan: Counter(plan, noise=ExactNoise()).extend(steps)) for _ in range(repeats)
        )
        print(f"  {name:12s} {horizon / seconds / 1e6:6.2f}   ({seconds:.2f} s)")
    print("\nSampler: CPU seconds per 1e6 draws, own / OpenDP (from 2e4 draws)")
    ours = ExactNoise()
    cases: list[tuple[str, Any, Fraction]] = [
        ("laplace", ours.laplace, Fraction(1)),
        ("laplace", ours.laplace, laplace_scale(1000)),
        ("gaussian", ours.gaussian, Fraction(1)),
        ("gaussian", ours.gaussian, gaussian_variance(1e6)),
    ]
    try:
        from assay.privacy.noise import OpenDPNoise

        peer: Any = OpenDPNoise()
    except ImportError:
        peer = None
    for law, draw, parameter in cases:
        own = statistics.median(cpu_seconds(lambda d=draw, p=parameter: d(p, 10**6)) for _ in range(repeats))
        theirs = "not installed"
        if peer is not None:
            theirs = f"{50 * cpu_seconds(lambda law=law, p=parameter: getattr(peer, law)(p, 20_000)):.1f}"
        print(f"  {law:8s} {float(parameter):10g}   {own:5.2f} / {theirs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small horizons only")
    parser.add_argument("--jax-privacy", metavar="PYTHON", help="an interpreter that has jax-privacy")
    parser.add_argument("--figure", metavar="FILE", help="only draw the crossover of MaxSum, as SVG, to this path")
    arguments = parser.parse_args()
    if arguments.figure:
        draw(arguments.figure)
        return
    show_variances()
    show_simulation(arguments.runs, arguments.quick)
    show_selection(arguments.runs, arguments.quick)
    show_peer(arguments.runs)
    if arguments.jax_privacy:
        show_jax_privacy(arguments.jax_privacy, (2**10,) if arguments.quick else (2**10, 2**16))
    show_speed(arguments.repeats)


if __name__ == "__main__":
    main()
