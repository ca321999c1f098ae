"""Compiled functions where no folder can be written: a warning, and the same answers."""

from __future__ import annotations

import numba
import pytest
from numba.core import caching

from assay.kernels.compiled import compiled


def plus_one(x):  # type: ignore[no-untyped-def]
    return x + 1


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a read-only installation without a home folder."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])


@pytest.mark.usefixtures("nowhere")
def test_without_a_folder_functions_are_compiled_in_memory() -> None:
    # The near-miss: numba's own decorator refuses.
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(plus_one)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        made = compiled()(plus_one)
    assert made(1) == 2


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
