"""Published histograms: their cost, their law, their bounds, refusals; private statistics of a corpus."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from assay.privacy import Budget, Ledger
from assay.privacy.errors import BudgetError, SeededNoiseError
from assay.privacy.histogram import _half_width, _standard_error, publish_histograms
from assay.privacy.noise import SeededNoise
from assay.report.private import LENGTHS, LEVELS, publish_statistics


def ledger_at(path: Path, adjacency: str = "add-remove", limit: float = 10.0, unit: str = "document") -> Ledger:
    return Ledger.create(path, Budget.pure(limit, adjacency=adjacency, unit=unit))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.5, 200.0])
def test_error_and_width_are_those_of_the_discrete_law(scale: float) -> None:
    support = np.arange(-20_000, 20_001)
    mass = np.exp(-np.abs(support) / scale)
    mass /= mass.sum()
    assert _standard_error(scale) == pytest.approx(math.sqrt(np.sum(mass * support**2)), rel=1e-9)
    for bins in (1, 16):
        width = _half_width(scale, bins)
        beyond = mass[np.abs(support) > width].sum()
        assert bins * beyond <= 0.05 + 1e-12
        assert width == 0 or bins * mass[np.abs(support) > width - 1].sum() > 0.05


@pytest.mark.parametrize(("adjacency", "factor"), [("add-remove", 1), ("replace", 2)])
def test_noise_has_the_scale_that_the_cost_pays_for(tmp_path: Path, adjacency: str, factor: int) -> None:
    # 4,000 bins of two histograms at epsilon 1: scale 2 * factor. Chi-square over values, false alarm 1e-6.
    with ledger_at(tmp_path / "l", adjacency) as ledger:
        counts = {"a": np.full(4000, 50), "b": np.zeros(4000, dtype=int)}
        found = publish_histograms(counts, ledger, epsilon=1)
        assert ledger.spent == 1
    drawn = np.concatenate([np.array(found["a"].counts) - 50, np.array(found["b"].counts)])
    edges = np.arange(-3 * factor, 3 * factor + 1)

    def p_value(scale: float) -> float:
        q = math.exp(-1 / scale)
        law = (1 - q) / (1 + q) * q ** np.abs(edges)
        seen = np.array([np.sum(drawn == value) for value in edges])
        seen, expected = np.append(seen, len(drawn) - seen.sum()), np.append(law, 1 - law.sum()) * len(drawn)
        return float(stats.chisquare(seen, expected).pvalue)

    assert p_value(2 * factor) > 1e-6
    assert p_value(factor) < 1e-6  # near-misses: the split over two histograms forgotten,
    assert p_value(2 * (3 - factor)) < 1e-6  # and one adjacency's noise sold as the other's


def test_nothing_is_published_that_is_not_paid_for(tmp_path: Path) -> None:
    with ledger_at(tmp_path / "l", limit=1.0) as ledger:
        publish_histograms({"a": [1, 2]}, ledger, epsilon=Fraction(3, 4))
        with pytest.raises(BudgetError, match="Nothing was spent"):
            publish_histograms({"a": [1, 2]}, ledger, epsilon=0.5)
        with pytest.raises(SeededNoiseError):
            publish_histograms({"a": [1, 2]}, ledger, epsilon=0.1, noise=SeededNoise(1))
        for bad in ({}, {"a": []}, {"a": [-1]}, {"a": [0.5]}, {"a": [[1]]}):
            with pytest.raises(ValueError, match="counts"):
                publish_histograms(bad, ledger, epsilon=0.1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="epsilon must be positive"):
            publish_histograms({"a": [1]}, ledger, epsilon=0)
        assert ledger.spent == Fraction(3, 4)


def test_statistics_of_a_corpus(tmp_path: Path) -> None:
    logs = np.log(np.concatenate([np.full(4000, 1e-12), np.linspace(1e-3, 1, 6000)]))
    tokens = np.full(10_000, 250)
    tokens[:100] = 0
    with ledger_at(tmp_path / "l", limit=4.0) as ledger:
        found = publish_statistics(logs, tokens, ledger, epsilon=2)
        assert (found.epsilon, found.epsilon_spent, found.epsilon_limit) == (2.0, 2.0, 4.0)
        assert found.ledger_head == ledger.head
    found.save(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "private.json").read_text())
    # Within the half-width everywhere: fails with probability at most 0.1 for fair noise; 4 widths never.
    width = 4 * found.p_values.half_width
    assert data["p_values"]["bins"][0]["up_to"] == 1e-9
    assert abs(data["p_values"]["bins"][0]["count"] - 4000) <= width
    assert abs(data["lengths"]["bins"][LENGTHS.index(200)]["count"] - 9900) <= width
    assert abs(sum(found.p_values.counts) - 10_000) <= width * len(LEVELS)
    page = (tmp_path / "out" / "private.html").read_text()
    assert "epsilon = 2. The ledger has spent 2 of 4" in page
    assert "one document is added or removed" in page
    assert "<script" not in page
    assert page.count("<tr>") == 2 + len(LEVELS) + len(LENGTHS)


def test_one_document_changes_one_bin_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, np.ndarray]] = []

    def spy(counts: dict[str, np.ndarray], *args: object, **kwargs: object) -> None:
        seen.append(counts)
        raise KeyboardInterrupt

    monkeypatch.setattr("assay.report.private.publish_histograms", spy)
    rng = np.random.default_rng(3)
    logs, tokens = np.log(rng.random(300)), rng.integers(0, 2000, 300)
    logs[:5] = [-np.inf, 0.0, math.log(1e-9), math.log(0.05), -1e300]
    with ledger_at(tmp_path / "l") as ledger:
        for left_out in (None, *range(300)):
            keep = np.arange(300) != left_out
            with pytest.raises(KeyboardInterrupt):
                publish_statistics(logs[keep], tokens[keep], ledger, epsilon=1)
    whole = seen[0]
    for other in seen[1:]:
        for name in ("p_values", "lengths"):
            change = whole[name] - other[name]
            assert np.abs(change).sum() == 1


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with ledger_at(tmp_path / "l") as ledger:
        for logs, tokens, match in (
            ([0.0], [1, 2], "one shape"),
            ([0.1], [1], "in \\[-inf, 0\\]"),
            ([np.nan], [1], "in \\[-inf, 0\\]"),
            ([-1.0], [-1], "at least 0"),
        ):
            with pytest.raises(ValueError, match=match):
                publish_statistics(logs, tokens, ledger, epsilon=1)
    with ledger_at(tmp_path / "m", unit="author") as ledger, pytest.raises(ValueError, match="about documents"):
        publish_statistics([-1.0], [5], ledger, epsilon=1)


def test_the_command_publishes_a_run(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet
    from typer.testing import CliRunner

    from assay.cli import app

    run = tmp_path / "run"
    run.mkdir()
    columns = {"doc_id": ["secret-name"] * 50, "log_pvalue": np.log(np.linspace(0.01, 1, 50)), "n_tokens": [120] * 50}
    parquet.write_table(pa.table(columns), run / "results.parquet")
    command = ["report", str(run), "--out", str(tmp_path / "out"), "--private", str(tmp_path / "l")]
    first = CliRunner().invoke(app, [*command, "--epsilon", "2"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["privacy"]["spent"] == 2.0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["private.html", "private.json"]
    assert "secret-name" not in (tmp_path / "out" / "private.html").read_text()
    again = CliRunner().invoke(app, [*command, "--epsilon", "0.5"])
    assert again.exit_code == 1
    assert "Nothing was spent" in again.output
    assert CliRunner().invoke(app, command).exit_code == 2
    empty = CliRunner().invoke(app, ["report", str(tmp_path), *command[2:-1], str(tmp_path / "m"), "--epsilon", "1"])
    assert empty.exit_code == 1
    assert "results.parquet" in empty.output
