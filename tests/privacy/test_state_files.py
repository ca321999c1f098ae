"""State files of running releases: damage of any byte, handles, and steps that break off."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.privacy.budget import Budget
from assay.privacy.continual import (
    Counter,
    EndlessCounter,
    Selection,
    SlidingWindow,
    plan_counter,
    plan_selection,
)
from assay.privacy.continual.statefile import StateFile
from assay.privacy.errors import BudgetError, LedgerError
from assay.privacy.ledger import Ledger
from assay.privacy.noise import ExactNoise

TERMS: dict[str, Any] = {"adjacency": "add-remove", "unit": "event"}


class Breaking:
    """Exact noise that stops with an interrupt while `broken`."""

    name, seeded, broken = "breaking", False, False

    def laplace(self, scale: Fraction, size: int) -> np.ndarray:
        if self.broken:
            raise KeyboardInterrupt
        return np.zeros(size, dtype=np.int64)

    gaussian = laplace


def recomputing(**given: Any) -> Selection:
    plan = plan_selection("max", 64, 3, epsilon=1, way="recompute", **TERMS)
    assert plan.period
    return Selection(plan, **given)


RELEASES: dict[str, Callable[..., Any]] = {
    "counter": lambda **given: Counter(
        plan_counter(64, mechanism="k-ary tree", epsilon=1, columns=3, **TERMS), **given
    ),
    "endless": lambda **given: EndlessCounter(epsilon=1, **TERMS, **given),
    "window": lambda **given: SlidingWindow(plan_counter(8, epsilon=1, columns=3, **TERMS), **given),
    "selection": recomputing,
}

KINDS: dict[str, Any] = {
    "counter": Counter,
    "endless": EndlessCounter,
    "window": SlidingWindow,
    "selection": Selection,
}


def steps(release: Any, n: int) -> np.ndarray:
    return np.ones(n if isinstance(release, EndlessCounter) else (n, 3), dtype=np.int64)


def n_handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_damage_of_any_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Truncations, and bytes turned over: LedgerError, or all that was written. Nothing stays open.

    The zip alone does not notice all of it: two bytes of its directory, turned over, make an array disappear.
    """
    path = tmp_path / "state"
    file = StateFile(path, new=True)
    written = {"x": np.arange(5)}
    file.write("kind", {"a": 1}, written)
    raw = path.read_bytes()
    gc.collect()
    before = n_handles()
    # Every byte of the directory at the end, and every third before it.
    places = [place for place in range(len(raw)) if place >= raw.index(b"PK\x01\x02") or place % 3 == 0]
    cuts = range(0, len(raw), 7)
    outcomes = []
    for damaged in [raw[:cut] for cut in cuts] + [
        raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :] for place in places
    ]:
        path.write_bytes(damaged)
        try:
            settings, arrays = file.read("kind")
        except LedgerError:
            outcomes.append(False)
            continue
        outcomes.append(True)
        assert settings == {"a": 1}
        assert arrays.keys() == written.keys()
        assert all(np.array_equal(arrays[name], held) for name, held in written.items())
    gc.collect()
    assert n_handles() == before
    # Truncations are all noticed. What is harmless lies in fields of the zip that nothing reads, such as dates.
    assert not any(outcomes[: len(cuts)])
    assert sum(outcomes) < len(places) / 2


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_that_cannot_begin_or_was_dropped_locks_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    noise = Breaking()
    make = RELEASES[name]
    release = make(noise=noise, path=path)
    release.extend(steps(release, 5))
    whole = path.read_bytes()
    with pytest.raises(LedgerError, match="another process"):
        KINDS[name].resume(path, noise=noise)
    held = n_handles()
    del release
    gc.collect()
    assert n_handles() == held - 1
    path.write_bytes(whole[:-1])
    for _ in range(3):
        with pytest.raises(LedgerError, match="damaged"):
            KINDS[name].resume(path, noise=noise)
    gc.collect()
    assert n_handles() == held - 1
    path.write_bytes(whole)
    resumed = KINDS[name].resume(path, noise=noise)
    assert resumed.time == 5
    resumed.close()


@pytest.mark.parametrize("name", RELEASES)
def test_after_an_interrupt_nothing_is_counted_twice(name: str, tmp_path: Path) -> None:
    """An interrupt while noise is drawn. Repeating the step in place would count its records twice: it is refused."""
    path = tmp_path / "state"
    noise = Breaking()
    release = RELEASES[name](noise=noise, path=path)
    release.extend(steps(release, 5))
    noise.broken = True
    for state in getattr(release, "_states", ()):
        state.pop("pool", None)  # what was drawn ahead
    with pytest.raises(KeyboardInterrupt):
        release.extend(steps(release, 40))
    noise.broken = False
    for _ in range(2):
        with pytest.raises(LedgerError, match="broke off"):
            release.extend(steps(release, 40))
    release.close()
    resumed = KINDS[name].resume(path, noise=noise)
    assert resumed.time == 5
    out = resumed.extend(steps(resumed, 40))
    assert resumed.time == 45
    if name != "selection":  # held between recomputations
        assert np.all(out[-1] == (8 if name == "window" else 45))
    resumed.close()


@pytest.mark.parametrize("name", RELEASES)
def test_what_did_not_reach_the_disk_is_not_given_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    release = RELEASES[name](noise=ExactNoise(), path=path)
    release.extend(steps(release, 5))

    def full(fd: int, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("assay.privacy._chain.write_all", full)
        with pytest.raises(OSError, match="No space"):
            release.extend(steps(release, 1))
    with pytest.raises(LedgerError, match="broke off"):
        release.extend(steps(release, 1))
    if hasattr(type(release), "value"):
        with pytest.raises(LedgerError, match="broke off"):
            _ = release.value
    release.close()
    resumed = KINDS[name].resume(path)
    assert resumed.time == 5
    resumed.close()


@pytest.mark.parametrize("name", RELEASES)
def test_refused_values_break_nothing(name: str, tmp_path: Path) -> None:
    release = RELEASES[name](noise=ExactNoise(), path=tmp_path / "state")
    with pytest.raises(ValueError, match=r"in 0 \.\. 1"):
        release.extend(2 * steps(release, 3))
    assert len(release.extend(steps(release, 3))) == 3
    release.close()
    with pytest.raises(LedgerError, match="closed"):
        release.extend(steps(release, 3))
    assert release.time == 3


@pytest.mark.parametrize("kind", ["counter", "endless", "window", "selection"])
def test_a_place_that_cannot_be_had_costs_nothing(kind: str, tmp_path: Path) -> None:
    terms: dict[str, Any] = {"adjacency": "add-remove", "unit": "event"}

    def begin(ledger: Ledger, path: Path) -> Any:
        if kind == "counter":
            return Counter.start(plan_counter(16, epsilon=1, **terms), ledger, path=path)
        if kind == "endless":
            return EndlessCounter(epsilon=1, ledger=ledger, path=path, **terms)
        if kind == "window":
            return SlidingWindow(plan_counter(16, epsilon=1, **terms), ledger=ledger, path=path)
        return Selection(plan_selection("max", 16, 2, epsilon=1, **terms), ledger=ledger, path=path)

    (tmp_path / "taken").write_text("")
    with Ledger.create(tmp_path / "ledger", Budget.pure(1, **terms)) as ledger:
        with pytest.raises(LedgerError, match="must be free"):
            begin(ledger, tmp_path / "taken")
        with pytest.raises(FileNotFoundError):
            begin(ledger, tmp_path / "nowhere" / "state")
        assert ledger.spent == 0
        begin(ledger, tmp_path / "free").close()
        assert ledger.remaining == 0
        with pytest.raises(BudgetError):
            begin(ledger, tmp_path / "second")
        assert not (tmp_path / "second").exists()
