"""What of a report may be published without its texts: noisy histograms of p-values and lengths, and what they cost.

One document falls into one bin of each histogram, so the published counts are epsilon-DP. Flags are left out on
purpose: whether a document is flagged at a false discovery rate depends on all others, so their number has no bounded
sensitivity; the bins of small p-values say the same at fixed levels.
"""

from __future__ import annotations

import html
import json
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from assay import __version__
from assay._errors import RunError
from assay.detection.corpus.ledger import write_atomically
from assay.privacy.histogram import NoisyHistogram, publish_histograms
from assay.privacy.ledger import Ledger
from assay.privacy.noise import NoiseSource, Real

if TYPE_CHECKING:
    from collections.abc import Iterable

SCHEMA: Final = "assay.private-statistics/1"
LEVELS: Final = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LENGTHS: Final = (0, 25, 50, 100, 200, 400, 800, 1600)


@dataclass(frozen=True, kw_only=True)
class PrivateStatistics:
    """Statistics of a corpus that may be published.

    Attributes
    ----------
    p_values
        Counts of documents with a p-value up to each of `LEVELS` and above the one before.
    lengths
        Counts of documents with at least as many tokens as each of `LENGTHS` and fewer than the next.
    epsilon
        What publishing them cost.
    epsilon_spent, epsilon_limit
        Of the ledger, this publication included, as text: its total in its accountant's unit.
    adjacency, unit, accountant
        What the guarantee is about.
    ledger_head
        Hash of the ledger after the spend.
    """

    p_values: NoisyHistogram
    lengths: NoisyHistogram
    epsilon: float
    epsilon_spent: float
    epsilon_limit: float
    adjacency: str
    unit: str
    accountant: str
    ledger_head: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""

        def histogram(found: NoisyHistogram, edges: Iterable[float], edge: str) -> dict[str, Any]:
            bins = [{edge: value, "count": count} for value, count in zip(edges, found.counts, strict=True)]
            return {"bins": bins, "standard_error": found.standard_error, "half_width_95": found.half_width}

        return {
            "schema": SCHEMA,
            "version": __version__,
            "p_values": histogram(self.p_values, LEVELS, "up_to"),
            "lengths": histogram(self.lengths, LENGTHS, "from_tokens"),
            "privacy": {
                "epsilon": self.epsilon,
                "spent": self.epsilon_spent,
                "limit": self.epsilon_limit,
                "accountant": self.accountant,
                "adjacency": self.adjacency,
                "unit": self.unit,
                "ledger_head": self.ledger_head,
            },
        }

    def to_html(self) -> str:
        """One page without scripts: two tables, and the cost in words."""
        levels = ["0", *(f"{level:g}" for level in LEVELS)]
        p_rows = [f"{low} to {high}" for low, high in pairwise(levels)]
        ends = [*(f"{length - 1}" for length in LENGTHS[1:]), None]
        l_rows = [
            f"{low} and more" if high is None else f"{low} to {high}" for low, high in zip(LENGTHS, ends, strict=True)
        ]
        change = "added or removed" if self.adjacency == "add-remove" else "replaced"
        unit = html.escape(self.unit)
        return _PAGE.format(
            p_values=_table("p-value", p_rows, self.p_values),
            lengths=_table("tokens", l_rows, self.lengths),
            epsilon=f"{self.epsilon:g}",
            spent=f"{self.epsilon_spent:g}",
            limit=f"{self.epsilon_limit:g}",
            accountant=html.escape(self.accountant),
            change=f"one {unit} is {change}",
            unit=unit,
            head=html.escape(self.ledger_head),
            version=__version__,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write private.json and private.html, each whole or not at all."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / "private.json", (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_atomically(place / "private.html", self.to_html().encode())


def publish_statistics(
    log_pvalues: Any, n_tokens: Any, ledger: Ledger, *, epsilon: Real, noise: NoiseSource | None = None
) -> PrivateStatistics:
    """Pay for a corpus's statistics and publish them.

    Guarantee: epsilon-DP for one unit of the ledger, if it is one document: each document's p-value depends on that
    document alone, as the model-free tests' do.

    Parameters
    ----------
    log_pvalues, n_tokens
        Of the documents, shape (n,): natural logarithms of unadjusted p-values, and token counts. Columns of a corpus
        run's `results.parquet`.
    ledger
        Pays; its unit must be "document".
    epsilon
        For everything published here.
    noise
        See `publish_histograms`.

    Raises
    ------
    BudgetError
        If epsilon does not fit; nothing is published.
    ValueError
        On columns of different lengths or out of range, or a ledger about another unit.

    Notes
    -----
    The number of documents is itself protected under add/remove: no total is published.
    """
    logs, tokens = np.asarray(log_pvalues, dtype=np.float64), np.asarray(n_tokens)
    if logs.ndim != 1 or logs.shape != tokens.shape:
        raise ValueError(f"log_pvalues and n_tokens must have one shape (n,), got {logs.shape} and {tokens.shape}.")
    if np.isnan(logs).any() or (logs > 0).any() or (tokens < 0).any():
        raise ValueError("log_pvalues must be in [-inf, 0] and n_tokens at least 0; found another value.")
    budget = ledger.budget
    if budget.unit != "document":
        raise ValueError(f"ledger must be about documents, got one about {budget.unit!r}: use a ledger of that unit.")
    p_bins = np.searchsorted(np.log(LEVELS), logs, side="left")
    l_bins = np.searchsorted(LENGTHS, tokens, side="right") - 1
    counts = {
        "p_values": np.bincount(p_bins, minlength=len(LEVELS)),
        "lengths": np.bincount(l_bins, minlength=len(LENGTHS)),
    }
    found = publish_histograms(counts, ledger, epsilon=epsilon, noise=noise, note="statistics of a report")
    return PrivateStatistics(
        p_values=found["p_values"],
        lengths=found["lengths"],
        epsilon=float(epsilon),
        epsilon_spent=float(ledger.spent),
        epsilon_limit=float(budget.limit),
        adjacency=budget.adjacency,
        unit=budget.unit,
        accountant=budget.accountant,
        ledger_head=ledger.head,
    )


def publish_run(run_dir: str | os.PathLike[str], ledger: Ledger, *, epsilon: Real) -> PrivateStatistics:
    """As `publish_statistics`, of a finished corpus run.

    Parameters
    ----------
    run_dir
        Folder from `assay.detection.corpus.run`.
    ledger, epsilon
        See `publish_statistics`.

    Raises
    ------
    RunError
        If there is no finished run in the folder.
    """
    from pyarrow import parquet

    path = Path(run_dir) / "results.parquet"
    if not path.is_file():
        raise RunError(f"run_dir must hold results.parquet of a finished run, {str(run_dir)!r} does not.")
    columns = parquet.read_table(path, columns=["log_pvalue", "n_tokens"])
    return publish_statistics(columns["log_pvalue"].to_numpy(), columns["n_tokens"].to_numpy(), ledger, epsilon=epsilon)


def _table(head: str, rows: list[str], found: NoisyHistogram) -> str:
    body = "".join(
        f'<tr><th scope="row">{html.escape(row)}</th><td>{count}</td></tr>'
        for row, count in zip(rows, found.counts, strict=True)
    )
    around = f"Each count carries noise of standard error {found.standard_error:.2g}; all are within "
    width = "0" if math.isinf(found.half_width) else f"{found.half_width:g}"
    return (
        f"<table><caption>{around}{width} of the truth with probability 95 %.</caption>"
        f'<thead><tr><th scope="col">{head}</th><th scope="col">documents, about</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Private statistics of a corpus</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 44rem; padding: 0 1rem; color: #111; }}
table {{ border-collapse: collapse; margin: 1rem 0 2rem; }}
caption {{ text-align: left; padding-bottom: .5rem; }}
th, td {{ text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #999; }}
</style>
</head>
<body>
<main>
<h1>Private statistics of a corpus</h1>
<p>Counts of documents by p-value and by length, with noise added, so that nobody can tell from them whether
{change}. They cost epsilon = {epsilon}. The ledger has spent {spent} of {limit} ({accountant} accounting; hash
{head}).</p>
<h2>p-values</h2>
<p>If the null hypothesis (that a document carries no mark, or that a human wrote it) were true of every document, the
share of documents with a p-value up to <i>a</i> would be at most about <i>a</i>.</p>
{p_values}
<h2>Lengths</h2>
{lengths}
<p>A count may be negative: it is the true count plus noise. Made by Assay {version}.</p>
</main>
</body>
</html>
"""
