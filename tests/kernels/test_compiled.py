"""Compiled functions where no folder can be written: a warning, and the same answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from numba.core import caching

from assay._compiled import _warn_once, compiled

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "assay").rglob("*.py")}

CACHED = re.compile(r"\b(?:n?jit|vectorize|cfunc)\([^)]*\bcache=")

# As in a read-only installation without a home folder, before anything of Assay is loaded.
LOCKED_DOWN = """
import importlib, sys, warnings
from numba.core import caching
caching.CacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("default")
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import numpy as np
    from assay.privacy.continual import steps_numba
    from assay.privacy.discrete_numba import below
    released, state = np.zeros(3), np.array([0, 0])
    steps_numba.plain(np.zeros(1), np.arange(3.0), released)
    drawn = below(np.array([5], dtype=np.uint64), state, np.uint64(7))
print(*released, drawn, len(said), "NUMBA_CACHE_DIR" in str(said[0].message))
"""


def plus_one(x):  # type: ignore[no-untyped-def]
    return x + 1


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a read-only installation without a home folder, nothing said yet."""
    _warn_once.cache_clear()
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])


@pytest.mark.usefixtures("nowhere")
def test_without_a_folder_functions_are_compiled_in_memory() -> None:
    # The near-miss: numba's own decorator refuses.
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(plus_one)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR") as said:
        made, again = compiled()(plus_one), compiled()(plus_one)
    assert made(1) == again(1) == 2
    assert len(said) == 1


def test_with_a_folder_they_are_cached() -> None:
    made = compiled(error_model="numpy")(plus_one)
    assert made(1) == 2
    assert isinstance(made._cache, caching.FunctionCache)
    assert made.targetoptions["error_model"] == "numpy"
    assert made.targetoptions["nogil"]


@pytest.mark.usefixtures("nowhere")
def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(TypeError):
        compiled()(3)


def test_every_room_loads_and_answers_in_a_locked_down_process() -> None:
    """Counters of `privacy` stand for all: whatever is compiled anywhere in the package is imported."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path, source in SOURCES.items()
        if "from assay._compiled import" in source
    ]
    assert {name.split(".")[1] for name in names} == {"kernels", "watermark", "conformal", "privacy"}
    done = subprocess.run(
        [sys.executable, "-c", LOCKED_DOWN, *names], capture_output=True, text=True, check=False, timeout=120
    )
    # One warning for all the functions, not one each.
    assert done.stdout.split() == ["0.0", "1.0", "3.0", "5", "1", "True"], done.stderr


def test_nothing_is_cached_by_another_way() -> None:
    """The near-miss that the test above cannot see in a module that is loaded inside a function."""
    places = [str(path.relative_to(ROOT)) for path, source in SOURCES.items() if CACHED.search(source)]
    assert places == ["assay/_compiled.py"]
