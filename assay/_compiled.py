"""Compiled functions that are kept on disk where a folder can be written, and compiled anew where none can.

numba refuses to define a cached function in a read-only installation without a home folder (a locked-down container, a
system service); such a process must still give its answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Decorator: `numba.njit` without the interpreter's lock, cached on disk where that is possible.

    Warns once in a process that can write neither beside the installed package nor in the user's cache folder: each
    such process compiles for itself.

    Parameters
    ----------
    options
        Of `numba.njit`, besides `cache` and `nogil`.
    """

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            _warn_once()
            return numba.njit(nogil=True, **options)(function)

    return decorate


@cache
def _warn_once() -> None:
    # Python's own "once per place" begins anew whenever an imported library changes the filters.
    warnings.warn(
        "no folder for compiled code can be written, so this process compiles its own, which takes seconds. "
        "Set NUMBA_CACHE_DIR to a folder that only this user can write.",
        RuntimeWarning,
        stacklevel=3,
    )
