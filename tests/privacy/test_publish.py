"""Published rates: what they say, what they refuse, and the command that publishes them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from assay._cli_publish import publish
from assay.privacy.budget import Budget
from assay.privacy.continual import Counter, plan_counter
from assay.privacy.errors import BudgetError, LedgerError, SeededNoiseError
from assay.privacy.ledger import Ledger
from assay.privacy.noise import SeededNoise
from assay.privacy.publish import RatePublisher

TERMS: dict[str, Any] = {"adjacency": "add-remove", "unit": "document"}
NAMES = ["gumbel", "green"]


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger.create(tmp_path / "ledger", Budget.pure(1, **TERMS)) as opened:
        yield opened


def test_a_series_is_paid_once_and_goes_on(tmp_path: Path, ledger: Ledger) -> None:
    plan = plan_counter(1000, epsilon=1, columns=2, **TERMS)
    publisher = RatePublisher.start(plan, NAMES, ledger, path=tmp_path / "state")
    assert ledger.remaining == 0
    assert np.isnan(publisher.latest().rates()["gumbel"]).all()
    flags = np.zeros((900, 2), dtype=bool)
    flags[:, 1] = True
    rates = publisher.add(flags)
    # Both intervals miss their counts together in 5 % of all series at most, and not by three times their width.
    assert abs(rates.counts[0]) < 3 * rates.half_width
    assert abs(rates.counts[1] - 900) < 3 * rates.half_width
    assert rates.standard_error == pytest.approx(float(plan.standard_error(np.array([900]))[0]))
    assert rates.privacy == "epsilon 1 for add-remove of one document"
    assert publisher.latest() == rates
    publisher.close()
    again = RatePublisher.resume(tmp_path / "state", NAMES)
    assert again.latest() == rates
    assert again.add([[True, False]]).documents == 901
    again.close()
    with pytest.raises(ValueError, match="as when the series began"):
        RatePublisher.resume(tmp_path / "state", NAMES[::-1])  # counts would be sold under another's name
    row = rates.to_dict()["detectors"]["green"]
    assert 0 <= row["low"] <= row["rate"] <= row["high"] <= 1
    with pytest.raises(BudgetError):
        RatePublisher.start(plan, NAMES, ledger, path=tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_what_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    plan = plan_counter(100, epsilon=Fraction(1, 2), columns=2, **TERMS)
    with pytest.raises(SeededNoiseError):
        RatePublisher.start(plan, NAMES, ledger, path=tmp_path / "state", noise=SeededNoise(1))
    seeded = RatePublisher(Counter(plan, noise=SeededNoise(1)), NAMES)
    with pytest.raises(SeededNoiseError):
        seeded.add([[True, True]])
    cells = plan_counter(100, epsilon=Fraction(1, 2), columns=2, touched=1, **TERMS)
    with pytest.raises(ValueError, match="touched=2"):
        RatePublisher.start(cells, NAMES, ledger, path=tmp_path / "state")
    for names, message in [
        (["a", "a"], "distinct"),
        ("ab", "sequence of names"),
        ([], "sequence"),
        (["a"], "columns=1"),
    ]:
        with pytest.raises(ValueError, match=message):
            RatePublisher.start(plan, names, ledger, path=tmp_path / "state")
    (tmp_path / "taken").write_text("")
    with pytest.raises(LedgerError, match="must be free"):
        RatePublisher.start(plan, NAMES, ledger, path=tmp_path / "taken")
    assert ledger.spent == 0  # nothing of all this was paid for


def invoke(*words: str, stdin: str | None = None) -> Any:
    app = typer.Typer()
    app.command()(publish)
    return CliRunner().invoke(app, list(words), input=stdin)


def test_the_command(tmp_path: Path) -> None:
    flags = tmp_path / "flags.jsonl"
    flags.write_text("".join(json.dumps({"gumbel": i % 2 == 0, "green": False}) + "\n" for i in range(200)))
    files = ["--ledger", str(tmp_path / "ledger"), "--state", str(tmp_path / "state"), "--detectors", "gumbel, green"]
    begin = ["--horizon", "1000", "--epsilon", "2", "--delta", "1e-6"]

    tried = invoke(str(flags), *files, *begin, "--dry-run")
    assert tried.exit_code == 0
    assert "1000 releases, standard error" in tried.stderr
    assert not (tmp_path / "ledger").exists()

    first = invoke(str(flags), *files, *begin, "--json")
    assert first.exit_code == 0, first.output
    content = json.loads(first.stdout)
    assert (content["schema"], content["documents"]) == ("assay.rates/1", 200)
    assert set(content["detectors"]) == {"gumbel", "green"}
    assert "rho (zCDP)" in content["privacy"]
    with Ledger.open(tmp_path / "ledger") as opened:
        assert opened.remaining == 0

    second = invoke("-", *files, "--json", stdin='{"gumbel": true, "green": true}\n\n')
    assert json.loads(second.stdout)["documents"] == 201
    again = invoke("-", *files, "--json", stdin="")
    assert json.loads(again.stdout) == json.loads(second.stdout)

    other = ["--ledger", str(tmp_path / "ledger"), "--state", str(tmp_path / "new"), "--detectors", "gumbel,green"]
    refused = invoke(str(flags), *other, *begin)
    assert refused.exit_code == 1
    assert "is left" in refused.stderr
    for bad in ('{"gumbel": 1, "green": true}', "[]", "secret"):
        done = invoke("-", *files, stdin=bad)
        assert done.exit_code == 2
        assert "line 1" in done.stderr
        assert "secret" not in done.stderr
    assert invoke("-", *other, stdin="").exit_code == 2  # no horizon
