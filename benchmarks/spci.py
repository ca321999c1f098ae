"""Intervals for sequences, and exact sets of hidden states: coverage, width, score and cost, in one run.

    python benchmarks/spci.py FOLDER [--mapie PYTHON]

FOLDER holds the two series, electricity_elec2_9to12.csv.gz and solar_atlanta_2018_hourly.csv.gz;
benchmarks/results/spci.md says where they come from. PYTHON is an interpreter that has MAPIE 1.x, numpy and
scikit-learn; without it its rows are left out. One thread; times are process CPU times. alpha = 0.1, first 80 % train,
one step ahead, the truth is revealed after each row; base model: RandomForest of 10 trees of depth 1, B = 25.

Targets: coverage >= 0.90 - 2 SE; Winkler score no worse than the published code's (electricity 0.271, solar 145) within
seed noise, and below MAPIE's; at n = 2000 at most 2 ms a step with w = 100 and 6 ms with w = 300; one exact HMM set at
T = 200 in at most 0.2 ms.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import csv
import gzip
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestRegressor

ALPHA = 0.1
SERIES = ("electricity", "solar")
SETTINGS = [  # name, transitions, emissions, T, alpha
    ("2 states, stay .9, symbol .75, T 50", [[0.9, 0.1], [0.1, 0.9]], [[0.75, 0.25], [0.25, 0.75]], 50, 0.2),
    ("2 states, stay .9, symbol .9, T 100", [[0.9, 0.1], [0.1, 0.9]], [[0.9, 0.1], [0.1, 0.9]], 100, 0.2),
    ("2 states, stay .7, symbol .75, T 100", [[0.7, 0.3], [0.3, 0.7]], [[0.75, 0.25], [0.25, 0.75]], 100, 0.2),
    ("2 states, stay .1, symbol .75, T 100", [[0.1, 0.9], [0.9, 0.1]], [[0.75, 0.25], [0.25, 0.75]], 100, 0.2),
    (
        "3 states, T 100",
        [[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]],
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]],
        100,
        0.2,
    ),
    (
        "3 states, T 200",
        [[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]],
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]],
        200,
        0.1,
    ),
]


def base_model() -> RandomForestRegressor:
    return RandomForestRegressor(n_estimators=10, max_depth=1, bootstrap=False, random_state=1103)


def read(folder: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def load(folder: Path, name: str, test: int | None = None) -> tuple[np.ndarray, ...]:
    """Training and test rows: features, targets, features, targets."""
    if name == "electricity":
        rows = read(folder, "electricity_elec2_9to12.csv.gz")
        y = np.array([float(row["transfer"]) for row in rows])
        columns = ("nswprice", "nswdemand", "vicprice", "vicdemand")
        x = np.array([[float(row[column]) for column in columns] for row in rows])
        train, stop = 2755, 2755 + (test or 300)
    else:
        rows = read(folder, "solar_atlanta_2018_hourly.csv.gz")
        dhi = np.array([float(row["DHI"]) for row in rows])
        hour = np.array([int(row["Hour"]) for row in rows])
        lags = np.lib.stride_tricks.sliding_window_view(dhi, 20)[:-1]
        x, y = np.column_stack([np.eye(24)[hour[20:]], lags])[-2000:], dhi[20:][-2000:]
        train, stop = 1600, 1600 + (test or 400)
    return x[:train], y[:train], x[train:stop], y[train:stop]


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def score(y: np.ndarray, ends: np.ndarray) -> tuple[float, float, float, int]:
    """Coverage, mean width and Winkler score of the finite intervals, number of infinite ones.

    Written out, so that MAPIE's interpreter needs nothing of ours.
    """
    low, high = ends[:, 0], ends[:, 1]
    finite = np.isfinite(high - low)
    miss = np.maximum(low - y, 0) + np.maximum(y - high, 0)
    return (
        float(((low <= y) & (y <= high)).mean()),
        float((high - low)[finite].mean()),
        float((high - low + 2 / ALPHA * miss)[finite].mean()),
        int((~finite).sum()),
    )


def show(name: str, rows: list[tuple[float, float, float, int]], n: int, milliseconds: float) -> None:
    table = np.array(rows)
    mean = table.mean(axis=0)
    spread = f" (sd {table[:, 2].std(ddof=1):.4f}, {len(rows)} seeds)" if len(rows) > 1 else ""
    if table[:, 3].any():
        spread += f"; without the infinite ones: {', '.join(f'{count:.0f}' for count in table[:, 3])} of {n}"
    error = math.sqrt(max(mean[0] * (1 - mean[0]), 1e-12) / n)
    print(
        f"  {name:<26}{mean[0]:7.4f} ({error:.3f}){mean[1]:10.4f}{mean[2]:10.4f}{milliseconds:9.2f}{spread}", flush=True
    )


# --- intervals ----------------------------------------------------------------------------------------------------


def intervals(folder: Path, seeds: int, mapie: str | None, *, exact: bool) -> None:
    from assay.conformal import ACI, SPCI, ConformalPID, DtACI, EnbPI, SplitConformal

    methods: list[tuple[str, int, Callable[[int], Any]]] = [
        ("SPCI w=100", seeds, lambda s: SPCI(base_model(), 25, 100, ALPHA, random_state=s)),
        ("SPCI w=300", seeds, lambda s: SPCI(base_model(), 25, 300, ALPHA, random_state=s)),
        ("SPCI w=100, exact engine", 1, lambda s: SPCI(base_model(), 25, 100, ALPHA, engine="exact", random_state=s)),
        ("EnbPI w=100", seeds, lambda s: EnbPI(base_model(), 25, 100, ALPHA, random_state=s)),
        ("EnbPI w=300", seeds, lambda s: EnbPI(base_model(), 25, 300, ALPHA, random_state=s)),
        ("ACI", seeds, lambda s: ACI(base_model(), 25, alpha=ALPHA, random_state=s)),
        ("DtACI", seeds, lambda s: DtACI(base_model(), 25, alpha=ALPHA, random_state=s)),
        ("conformal PID", seeds, lambda s: ConformalPID(base_model(), 25, alpha=ALPHA, random_state=s)),
        ("split", seeds, lambda s: SplitConformal(base_model(), ALPHA, random_state=s)),
    ]
    if not exact:
        methods = [method for method in methods if "exact" not in method[0]]
    for name in SERIES:
        x, y, new_x, new_y = load(folder, name)
        print(f"\n{name}: {len(y)} training rows, {len(new_y)} test rows")
        print(f"  {'':<26}{'coverage (SE)':<15}{'width':>10}{'Winkler':>10}{'ms/step':>9}")
        for label, repeats, make in methods:
            found, seconds = [], 0.0
            for seed in range(repeats):
                model = make(seed).fit(x, y)
                spent, (_, ends) = cpu_seconds(partial(model.backtest, new_x, new_y))
                found.append(score(new_y, ends[:, :, 0]))
                seconds += spent / repeats
            show(label, found, len(new_y), 1e3 * seconds / len(new_y))
        ahead = SPCI(base_model(), 25, 100, ALPHA, horizon=4, random_state=0).fit(x, y)
        _, ends = ahead.backtest(new_x, new_y)
        show("SPCI w=100, 4 steps ahead", [score(new_y, ends[:, :, 0])], len(new_y), math.nan)
        if mapie is not None:
            with tempfile.TemporaryDirectory() as scratch:
                np.savez(Path(scratch) / "rows.npz", x=x, y=y, new_x=new_x, new_y=new_y)
                command = [mapie, __file__, str(scratch), "--mapie-rows"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                print(done.stdout if done.returncode == 0 else done.stderr, end="", flush=True)


def mapie_rows(folder: Path) -> None:
    """EnbPI with an update after each row, and ACI with gamma = 0.005; runs in MAPIE's interpreter."""
    import mapie
    from mapie.regression import TimeSeriesRegressor
    from mapie.subsample import BlockBootstrap

    warnings.simplefilter("ignore")
    data = np.load(folder / "rows.npz")
    x, y, new_x, new_y = (data[key] for key in ("x", "y", "new_x", "new_y"))
    for method in ("enbpi", "aci"):
        folds = BlockBootstrap(n_resamplings=25, length=10, overlapping=True, random_state=0)
        model = TimeSeriesRegressor(base_model(), method=method, cv=folds, agg_function="mean").fit(x, y)

        def loop(model: Any = model, method: str = method) -> np.ndarray:
            ends = np.empty((len(new_y), 2))
            for row in range(len(new_y)):
                at = slice(row, row + 1)
                infinite = {"allow_infinite_bounds": True} if method == "aci" else {}
                ends[row] = model.predict(new_x[at], ensemble=True, confidence_level=1 - ALPHA, **infinite)[1][0, :, 0]
                if method == "aci":
                    model.adapt_conformal_inference(
                        new_x[at], new_y[at], gamma=0.005, ensemble=True, confidence_level=1 - ALPHA
                    )
                else:
                    model.update(new_x[at], new_y[at], ensemble=True)
            return ends

        seconds, ends = cpu_seconds(loop)
        label = f"MAPIE {mapie.__version__} {'ACI' if method == 'aci' else 'EnbPI'}"
        show(label, [score(new_y, ends)], len(new_y), 1e3 * seconds / len(new_y))


# --- cost ---------------------------------------------------------------------------------------------------------


def cost(folder: Path) -> None:
    from assay.conformal import SPCI

    x, y, new_x, new_y = load(folder, "electricity")
    x, y = x[-2000:], y[-2000:]
    print("\nCPU milliseconds for a step at n = 2000 (medians of blocks of 20 steps, engines in turn)")
    for window, target in ((100, 2.0), (300, 6.0)):
        ours = SPCI(base_model(), 25, window, ALPHA, random_state=0).fit(x, y)
        exact = SPCI(base_model(), 25, window, ALPHA, engine="exact", random_state=0).fit(x, y)
        ours.predict(new_x[:1])
        steps, slow = [], []
        for first in range(0, 200, 20):

            def block(first: int = first, model: Any = ours) -> None:
                for row in range(first, first + 20):
                    model.predict(new_x[row : row + 1])
                    model.update(new_x[row : row + 1], new_y[row : row + 1])

            steps.append(cpu_seconds(block)[0] / 20)
            slow.append(cpu_seconds(partial(exact.predict, new_x[:1]))[0])
        print(
            f"  w = {window}: predict and update {1e3 * np.median(steps):6.2f} (target <= {target:g}); "
            f"predict with quantile-forest {1e3 * np.median(slow):7.1f}, {np.median(slow) / np.median(steps):.0f} times"
        )


# --- hidden states ------------------------------------------------------------------------------------------------


def sample(P: np.ndarray, B: np.ndarray, n: int, repeats: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """States and symbols, (repeats, n), from a uniform start."""
    moves, signs = np.cumsum(P, axis=1), np.cumsum(B, axis=1)
    x = np.empty((repeats, n), dtype=np.int64)
    x[:, 0] = rng.integers(len(P), size=repeats)
    for t in range(1, n):
        x[:, t] = (rng.random(repeats)[:, None] > moves[x[:, t - 1]]).sum(axis=1)
    y = (rng.random((repeats, n))[:, :, None] > signs[x]).sum(axis=2)
    return np.minimum(x, len(P) - 1), np.minimum(y, B.shape[1] - 1)


def hidden(repeats: int) -> None:
    from assay.conformal import HMMSets

    rng = np.random.default_rng(20261121)
    print(f"\nExact sets of one hidden state, {repeats} sequences each (size: share of the states)")
    print(f"  {'':<38}{'anchor':<8}target  {'randomised (SE)':<18}conservative   size  size conservative")
    for name, transitions, emissions, length, alpha in SETTINGS:
        P, B = np.array(transitions), np.array(emissions)
        x, y = sample(P, B, length + 1, repeats, rng)
        for anchor in ("pair", "state"):
            kept = np.zeros((repeats, 4))
            for r in range(repeats):
                sets = HMMSets(range(len(P)), range(B.shape[1]), alpha=alpha, anchor=anchor)
                sets.fit(x[r, :-1], y[r, :-1])
                low, high = sets._one_step(int(y[r, -1]), 0.0), sets._one_step(int(y[r, -1]), 1.0)
                drawn = low + rng.random() * (high - low) > alpha
                truth = x[r, -1]
                kept[r] = drawn[truth], high[truth] > alpha, drawn.mean(), (high > alpha).mean()
            cover, safe, size, size_safe = kept.mean(axis=0)
            error = math.sqrt(cover * (1 - cover) / repeats)
            print(
                f"  {name:<38}{anchor:<8}{1 - alpha:.2f}    {cover:.4f} ({error:.4f})   {safe:.4f}        "
                f"{size:.3f}  {size_safe:.3f}",
                flush=True,
            )
    x, y = sample(np.array(SETTINGS[0][1]), np.array(SETTINGS[0][2]), 203, 1, rng)
    print("\nCPU milliseconds for a prediction after T = 200 steps, 2 states, 2 symbols")
    for anchor in ("pair", "state"):
        times = []
        for steps, repeat in ((1, 500), (2, 50), (3, 50)):
            sets = HMMSets([0, 1], [0, 1], anchor=anchor).fit(x[0, :200], y[0, :200])
            symbols = y[0, 200 : 200 + steps].tolist()

            def predict(sets: Any = sets, symbols: list[int] = symbols, repeat: int = repeat) -> None:
                for _ in range(repeat):
                    sets.predict(symbols, rng=rng)

            times.append(f"m = {steps}: {1e3 * cpu_seconds(predict)[0] / repeat:.3f}")
        print(f"  anchor {anchor:<6} {'   '.join(times)}   (target at m = 1: <= 0.2)")


# --- monitoring ---------------------------------------------------------------------------------------------------


def watched(reference: int, shift: float, seed: int, *, learning: bool) -> Any:
    """An autoregression of 1,000 scores after its reference, shifted by so many standard deviations after 200."""
    from assay.conformal import ScoreMonitor

    scores = np.random.default_rng(seed).normal(size=reference + 1000)
    for t in range(1, len(scores)):
        scores[t] += 0.5 * scores[t - 1]
    scores[reference + 200 :] += shift * math.sqrt(1 / 0.75)
    monitor = ScoreMonitor(random_state=seed).fit(scores[:reference])
    if learning:
        monitor._model.set_params(refit_every=1)
    return monitor.update(scores[reference:])


def monitoring(series: int = 40) -> None:
    print(f"\nMonitor at alpha 0.1, bound 0.01, miss rate 0.15: {series} series of 1,000 scores each")
    for reference in (200, 400):
        for learning in (False, True):
            quiet = [watched(reference, 0.0, seed, learning=learning) for seed in range(series)]
            rates = [one.missed.mean() for one in quiet]
            line = f"  reference {reference}, forest {'goes on learning' if learning else 'stands still   '}: "
            line += f"misses {np.mean(rates):.3f} (at most {np.max(rates):.3f}), "
            line += f"false alarms {sum(one.alarm is not None for one in quiet)};"
            for shift in (2.0, 3.0):
                alarms = [watched(reference, shift, 1000 + seed, learning=learning).alarm for seed in range(series)]
                delays = [alarm - 200 for alarm in alarms if alarm is not None and alarm >= 200]
                middle = f", median delay {np.median(delays):.0f}" if delays else ""
                line += f" shift {shift:g} sd: {len(delays)} found{middle};"
            print(line.rstrip(";"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mapie", metavar="PYTHON", help="interpreter with MAPIE")
    parser.add_argument("--mapie-rows", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help="also all intervals by quantile-forest (minutes)")
    parser.add_argument("--part", choices=("cost", "intervals", "hidden", "monitoring"), help="one part only")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20_000, help="sequences for each row of the hidden-state table")
    arguments = parser.parse_args()
    if arguments.mapie_rows:
        mapie_rows(arguments.folder)
        return
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}, one thread, CPU seconds")
    if arguments.part in (None, "cost"):
        cost(arguments.folder)
    if arguments.part in (None, "intervals"):
        intervals(arguments.folder, arguments.seeds, arguments.mapie, exact=arguments.exact)
    if arguments.part in (None, "hidden"):
        hidden(arguments.repeats)
    if arguments.part in (None, "monitoring"):
        monitoring()


if __name__ == "__main__":
    main()
