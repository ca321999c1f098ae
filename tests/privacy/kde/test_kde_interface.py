"""Files, refusals, the ledger, the public rule, and what must stay private."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kde_cases import MAKERS, NoNoise, make
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from assay.privacy import SeededNoise
from assay.privacy.accounting import rho_for
from assay.privacy.budget import Budget
from assay.privacy.errors import BudgetError, SeededNoiseError
from assay.privacy.kde import L1KDE, L2KDE, GaussianKDE
from assay.privacy.ledger import Ledger
from assay.privacy.noise import noise_source


def points_for(name: str, n: int = 12) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(4).uniform(-0.5, 2.5, (n, MAKERS[name][1]["dims"]))
    return found


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("budget", ["pure", "zcdp"])
def test_save_and_load_are_exact(name: str, budget: str, tmp_path: Path) -> None:
    points, path = points_for(name), tmp_path / "kde.npz"
    kde = make(name, budget).fit(points, noise=noise_source("exact"))
    kde.save(path)
    again = type(kde).load(path)
    np.testing.assert_array_equal(again.query(points), kde.query(points))
    np.testing.assert_array_equal(again.standard_error(points), kde.standard_error(points))
    assert str(again.plan_) == str(kde.plan_)
    assert again.plan_.blocks == kde.plan_.blocks
    for key, value in kde.get_params().items():
        np.testing.assert_array_equal(again.get_params()[key], value)
    with pytest.raises(FileExistsError):
        again.save(path)


def test_files_hold_nothing_private_and_no_pickle(tmp_path: Path) -> None:
    points, path = np.array([[5.0, 0.0], [0.1, 0.2], [-9.0, 9.0]]), tmp_path / "kde.npz"
    kde = make("l1-centred").fit(points)
    assert (kde.clamping_.values, kde.clamping_.records) == (3, 2)
    kde.save(path)
    with np.load(path, allow_pickle=False) as held:
        head = json.loads(held["head"].tobytes())
        assert set(held.files) == {"head", "moment0", "moment1"}
    assert set(head) == {"schema", "class", "settings", "design", "law", "amount", "noise_error", "approximation"}
    assert not hasattr(L1KDE.load(path), "clamping_")
    for held_by in (pickle.loads(pickle.dumps(kde)), copy.deepcopy(kde)):
        assert not hasattr(held_by, "clamping_")
        np.testing.assert_array_equal(held_by.query(points), kde.query(points))
    assert repr(kde.clamping_) == "Clamping()"
    # scikit-learn shows fitted attributes in notebooks: this one by its repr.
    assert "<td>Clamping()</td>" in kde._repr_html_() or "clamping_" not in kde._repr_html_()
    assert "clamping" not in repr(kde)


def damage(raw: bytes, how: str) -> bytes:
    if how == "cut":
        return raw[: len(raw) // 2]
    if how == "noise":
        return b"not a file of arrays"
    with np.load(io.BytesIO(raw)) as held:
        arrays = {name: held[name] for name in held.files}
    head = json.loads(arrays["head"].tobytes())
    if how == "schema":
        head["schema"] = "assay.private-kde/9"
    elif how == "class":
        head["class"] = "LpKDE"
    elif how == "amount":
        head["amount"] = {"fraction": "-1"}
    elif how == "design":
        head["design"]["name"] = "unknown"
    elif how == "shape":
        arrays["moment0"] = arrays["moment0"][:, :-1]
    elif how == "dtype":
        arrays["moment0"] = arrays["moment0"].astype(np.float64)
    elif how == "missing":
        del arrays["moment1"]
    elif how == "objects":
        arrays["moment0"] = np.array([{"a": 1}], dtype=object)
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    named: dict[str, Any] = arrays
    np.savez(buffer, **named)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "how", ["cut", "noise", "schema", "class", "amount", "design", "shape", "dtype", "missing", "objects"]
)
def test_damaged_files_are_refused(how: str, tmp_path: Path) -> None:
    path = tmp_path / "kde.npz"
    make("l1-centred").fit(points_for("l1-centred")).save(path)
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(ValueError, match="not a saved L1KDE or is damaged"):
        L1KDE.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no private kernel sum"):
        L1KDE.load(tmp_path / "none.npz")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_bad_records_and_queries(name: str) -> None:
    dims = MAKERS[name][1]["dims"]
    kde = make(name)
    good = np.zeros((3, dims))
    bad = good.copy()
    bad[1, 0] = math.nan
    with pytest.raises(ValueError, match="points must not be NaN"):
        kde.fit(bad)
    with pytest.raises(ValueError, match=rf"points must have shape \(n, {dims}\)"):
        kde.fit(np.zeros((3, dims + 1)))
    with pytest.raises(ValueError, match="points must have shape"):
        kde.fit(np.zeros((3, dims, 1)))
    with pytest.raises(TypeError, match="points must be real numbers"):
        kde.fit(np.zeros((3, dims), dtype=complex))
    with pytest.raises(NotFittedError):
        kde.query(good)
    with pytest.raises(NotFittedError):
        kde.save("nowhere.npz")
    kde.fit(good, noise=NoNoise())
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="points must"):
            kde.query(np.full((1, dims), wrong))
    with pytest.raises(ValueError, match="points must have shape"):
        kde.standard_error(np.zeros((3, dims + 1)))
    with pytest.raises(ValueError, match="costs again"):
        kde.fit(good)


def test_infinite_records_are_moved_to_the_bounds() -> None:
    points = np.array([[math.inf, 0.0], [-math.inf, 7.0]])
    kde = make("l1-centred").fit(points, noise=NoNoise())
    assert (kde.clamping_.values, kde.clamping_.records) == (3, 2)
    np.testing.assert_allclose(kde.query([[1.0, 1.0]]), [2 + 2 + 1 + 2], atol=0.6)
    for name in ("features", "l2"):  # neither an angle nor a direction
        with pytest.raises(ValueError, match="finite"):
            make(name).fit(points)


def test_far_records_are_moved_to_the_ball() -> None:
    kde = make("l2", projections=256).fit(np.array([[1001.0, 1.0], [1.0, 1.0]]), noise=NoNoise())
    assert kde.clamping_.records == 1
    np.testing.assert_allclose(kde.query([[1.0, 1.0]]), [2.0], rtol=0.2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("l1-centred", {"low": 3.0}, "low < high"),
        ("l1-centred", {"low": math.nan}, "finite"),
        ("l1-centred", {"high": math.inf}, "finite"),
        ("l1-centred", {"low": [0.0, 0.0, 0.0]}, "low must be a number or 2 of them"),
        ("l1-centred", {"n": 0}, "n must be an integer of at least 1"),
        ("l1-centred", {"n": 3.5}, "n must be an integer"),
        ("l1-centred", {"dims": 0}, "dims must be"),
        ("l1-centred", {"dims": True}, "dims must be"),
        ("l1-centred", {"epsilon": 0.0}, "epsilon must be positive"),
        ("l1-centred", {"epsilon": math.nan}, "epsilon must be positive"),
        ("l1-centred", {"epsilon": 1.0, "rho": 1.0}, "exactly one of epsilon and rho"),
        ("l1-centred", {"epsilon": None}, "exactly one of epsilon and rho"),
        ("l1-centred", {"delta": 1.0}, "delta must be in"),
        ("l1-centred", {"epsilon": None, "rho": 0.1, "delta": 1e-6}, "delta must be 0 beside rho"),
        ("l1-centred", {"adjacency": "swap"}, "adjacency must be one of"),
        ("l1-centred", {"unit": "person"}, "unit must be one of"),
        ("l1-centred", {"construction": "best"}, "construction must be one of"),
        ("l1-centred", {"law": "uniform"}, "law must be"),
        ("l1-centred", {"law": "gaussian"}, "does not fit this budget"),
        ("l1-centred", {"depth": 24}, r"depth must be an integer in \[1, 23\]"),
        ("l1-centred", {"epsilon": 1e-9}, "budget is too small"),
        ("l1-rings", {"alpha": 0.0}, "alpha must be"),
        ("l1-centred", {"density": 0.5}, "density must be"),
        ("l2", {"radius": -1.0}, "radius must be"),
        ("l2", {"beta": 0.0}, "beta must be"),
        ("l2", {"seed": -1}, "seed must be"),
        ("l2", {"centre": [0.0, 0.0, 0.0]}, "centre must be"),
        ("l2", {"projections": 0}, "projections must be"),
        ("lp-2", {"power": 0}, "power must be"),
        ("lp-2", {"power": 9}, "power must be"),
        ("lp-5", {"depth": 12}, "tree too deep"),
        ("features", {"bandwidth": 0.0}, "bandwidth must be"),
        ("features", {"pairs": 0}, "pairs must be"),
        ("features", {"low": 0.0}, "together"),
        ("cells-1", {"low": None, "high": None}, "needs low, high"),
        ("cells-3", {"dims": 4}, "at most 3"),
        ("cells-3", {"bandwidth": 1e-3}, "too small for cells"),
        ("cells-1", {"construction": "tables"}, "construction must be"),
    ],
)
def test_bad_settings(name: str, changes: dict[str, Any], message: str) -> None:
    kde = make(name, **changes)
    with pytest.raises(ValueError, match=message):
        kde.plan()
    with pytest.raises(ValueError, match=message):
        kde.fit(np.zeros((2, MAKERS[name][1]["dims"])))


# --- noise and the ledger -----------------------------------------------------------------------------------------


def test_the_ledger_pays_before_noise_is_drawn(tmp_path: Path) -> None:
    points = points_for("l1-centred")
    order: list[str] = []

    class Watched(NoNoise):
        def laplace(self, scale: object, size: tuple[int, int]) -> np.ndarray:
            order.append(f"drawn with {ledger.spent} spent")
            return super().laplace(scale, size)

    budget = Budget.pure(2, adjacency="add-remove", unit="document")
    with Ledger.create(tmp_path / "ledger", budget) as ledger:
        make("l1-centred").fit(points, noise=Watched(), ledger=ledger)
        assert ledger.spent == 1
        assert set(order) == {"drawn with 1 spent"}
        with pytest.raises(SeededNoiseError):
            make("l1-centred").fit(points, noise=SeededNoise(1), ledger=ledger)
        with pytest.raises(ValueError, match="add-remove of one document"):
            make("l1-centred", adjacency="replace").fit(points, ledger=ledger)
        make("l1-centred").fit(points, ledger=ledger)
        order.clear()
        with pytest.raises(BudgetError):
            make("l1-centred").fit(points, noise=Watched(), ledger=ledger)
        assert not order
        assert ledger.spent == 2


def test_bad_records_cost_nothing(tmp_path: Path) -> None:
    budget = Budget.pure(2, adjacency="add-remove", unit="document")
    with Ledger.create(tmp_path / "ledger", budget) as ledger:
        with pytest.raises(ValueError, match="NaN"):
            make("l1-centred").fit([[math.nan, 0.0]], ledger=ledger)
        assert ledger.spent == 0


def test_seeded_noise_is_not_saved(tmp_path: Path) -> None:
    kde = make("l1-centred").fit(points_for("l1-centred"), noise=SeededNoise(1))
    with pytest.raises(SeededNoiseError, match="this release"):
        kde.save(tmp_path / "kde.npz")
    assert not (tmp_path / "kde.npz").exists()


def test_epsilon_and_delta_cost_what_a_ledger_can_pay(tmp_path: Path) -> None:
    """The Gaussian route of (epsilon, delta) fits a budget of the same numbers to the last bit."""
    kde = make("l1-centred", dims=2, delta=1e-6, law="gaussian")
    assert kde.plan().cost.rho == rho_for(1.0, 1e-6, sharp=True)
    budget = Budget.approximate(1.0, 1e-6, adjacency="add-remove", unit="document")
    with Ledger.create(tmp_path / "ledger", budget) as ledger:
        kde.fit(points_for("l1-centred"), ledger=ledger)
        assert ledger.remaining == 0


# --- the public rule ----------------------------------------------------------------------------------------------


def test_the_rule_never_sees_the_data() -> None:
    """One plan for any records, and the plan before the fit is the plan that is carried out."""
    for name in MAKERS:
        kde, dims = make(name), MAKERS[name][1]["dims"]
        before = str(kde.plan()), kde.plan().design
        for points in (np.zeros((1, dims)), np.full((50, dims), 0.4), points_for(name, 200)):
            fitted = clone(kde).fit(points, noise=NoNoise())
            assert (str(fitted.plan_), fitted.plan_.design) == before


@pytest.mark.parametrize(
    ("n", "dims", "delta", "chosen"),
    [
        (100, 1, 0.0, ("histogram", "laplace")),
        (10**4, 1, 0.0, ("centred", "laplace")),
        (10**6, 1, 1e-6, ("centred", "laplace")),  # 6.70 against 6.98
        (10**6, 2, 1e-6, ("centred", "gaussian")),
        (10**4, 64, 1e-6, ("centred", "gaussian")),
        (100, 64, 0.0, ("histogram", "laplace")),
    ],
)
def test_the_rule(n: int, dims: int, delta: float, chosen: tuple[str, str]) -> None:
    settings: dict[str, Any] = {"low": 0, "high": 1, "n": n, "dims": dims, "delta": delta, "epsilon": 1.0}
    plan = L1KDE(**settings, adjacency="add-remove", unit="event").plan()
    assert (plan.design.name, plan.terms.law) == chosen
    for other in ("centred", "histogram"):
        assert plan.error <= L1KDE(**settings, adjacency="add-remove", unit="event", construction=other).plan().error


def test_a_declared_density_lets_the_histogram_win_for_more_records() -> None:
    """At n = 1e4 and d = 1 few bins beat the tree if records are known to be spread (3.6 against 6.5)."""
    common: dict[str, Any] = {
        "low": 0,
        "high": 1,
        "n": 10**4,
        "epsilon": 1.0,
        "adjacency": "add-remove",
        "unit": "event",
    }
    plan = L1KDE(**common, density=2.5).plan()
    assert (plan.design.name, plan.design.depth) == ("histogram", 5)
    rng, found = np.random.default_rng(5), []
    points, queries = rng.beta(2, 5, 10**4), rng.uniform(0, 1, 20)
    for seed in range(20):
        kde = L1KDE(**common, density=2.5).fit(points, noise=SeededNoise(seed))
        found.append(kde.query(queries) - np.abs(points[:, None] - queries).sum(axis=0))
    assert np.sqrt(np.mean(np.square(found))) < L1KDE(**common).plan().error


def test_the_rule_of_the_gaussian_kernel() -> None:
    common: dict[str, Any] = {"bandwidth": 0.2, "n": 10**4, "adjacency": "add-remove", "unit": "event"}
    bounds: dict[str, Any] = {"low": 0.0, "high": 1.0}
    assert GaussianKDE(dims=1, epsilon=1.0, **common, **bounds).plan().design.name == "cells"
    assert GaussianKDE(dims=1, epsilon=1.0, **common).plan().design.name == "features"
    assert GaussianKDE(dims=8, epsilon=1.0, **common).plan().design.pairs == math.ceil(10**4 / math.sqrt(8))
    zcdp = GaussianKDE(dims=8, rho=0.01, **common).plan()
    assert zcdp.design.pairs == 4096
    assert zcdp.noise_error == pytest.approx(1 / math.sqrt(0.02), rel=1e-3)


def test_pure_lines_are_few_and_gaussian_ones_many() -> None:
    common: dict[str, Any] = {"radius": 1.0, "dims": 16, "n": 3000, "adjacency": "add-remove", "unit": "event"}
    pure, gauss = (L2KDE(**common, **b).plan() for b in ({"epsilon": 1.0}, {"rho": 0.05}))
    assert pure.design.dims < gauss.design.dims == 256
