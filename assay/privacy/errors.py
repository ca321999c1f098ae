"""The errors of the privacy room: budgets, ledgers and noise that must not be published."""

from __future__ import annotations

from assay._errors import AssayError


class BudgetError(AssayError, ValueError):
    """A spend that the remaining privacy budget does not cover; nothing was spent and nothing was released."""


class LedgerError(AssayError, ValueError):
    """A ledger that is damaged, locked by another process, or not the one that was asked for."""


class SeededNoiseError(AssayError, ValueError):
    """Reproducible noise, which hides nothing, on its way into a release."""
