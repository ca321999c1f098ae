"""Published rates: what they say, what they refuse, and the command that publishes them."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from assay._cli_publish import promise, publish, read_flags
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


BEGIN = ["--horizon", "365", "--epsilon", "1", "--delta", "1e-6", "--unit", "author"]
APART = ["--contributions", "12", "--separation", "30"]


def worst_error(dry_run: Any) -> float:
    return float(re.search(r"and at most ([0-9.e+]+), all", dry_run.stderr)[1])


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"unit": "document"}, "no document is counted more than once."),
        ({"unit": "document", "contributions": 3}, "no document is counted more than 3 times."),
        ({"unit": "author", "contributions": 3}, "no author has more than 3 of the documents."),
    ],
)
def test_the_promise_in_words(terms: dict[str, Any], words: str) -> None:
    plan = plan_counter(100, epsilon=1, columns=1, adjacency="add-remove", **terms)
    assert promise(plan).startswith(f"your promise: {words}")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "flags.jsonl").write_bytes(b'{"a": true}\n\xff')
    with pytest.raises(ValueError, match=r"flags\.jsonl must be UTF-8 text: invalid start byte at byte 12"):
        read_flags(str(tmp_path / "flags.jsonl"), ("a",))


def test_separate_documents_cost_their_number(tmp_path: Path) -> None:
    """12 documents at least 30 steps apart: less than half the error of 12 anywhere, at the same price."""
    flags = tmp_path / "flags.jsonl"
    flags.write_text('{"gumbel": true}\n' * 40)
    files = ["--ledger", str(tmp_path / "ledger"), "--state", str(tmp_path / "state"), "--detectors", "gumbel"]
    anywhere = invoke(str(flags), *files, *BEGIN, *APART[:2], "--dry-run")
    apart = invoke(str(flags), *files, *BEGIN, *APART, "--dry-run")
    assert worst_error(apart) < worst_error(anywhere) / 2
    assert "banded with 30 bands" in apart.stderr
    said = " ".join(apart.stderr.split())
    assert "your promise: no author has more than 12 of the documents" in said
    assert "to the next of the same author are at least 30 steps" in said
    assert "steps" not in anywhere.stderr.split("your promise")[1]

    first = invoke(str(flags), *files, *BEGIN, *APART, "--json")
    assert first.exit_code == 0, first.output
    published = json.loads(first.stdout)["privacy"]
    assert "of one author with at most 12 contributions at least 30 steps apart" in published
    with Ledger.open(tmp_path / "ledger") as opened:
        assert opened.costs[0].unit == "author"
        assert opened.remaining == 0  # the price is the same: what is saved is noise

    # Later calls may repeat the terms, and may not change them: they would change nothing, and seem to.
    assert invoke("-", *files, *BEGIN, *APART, "--json", stdin="").stdout == first.stdout
    for wrong in (
        ["--contributions", "13"],
        ["--separation", "29"],
        ["--horizon", "366"],
        ["--unit", "document"],
        ["--adjacency", "replace"],
        ["--epsilon", "2", "--delta", "1e-6"],
        ["--epsilon", "1"],
        ["--delta", "1e-6"],
    ):
        done = invoke("-", *files, *wrong, stdin="")
        assert done.exit_code == 2, wrong
        assert "began" in done.stderr
    assert invoke("-", *files, "--json", stdin="").stdout == first.stdout  # the refused calls let go of the state


def test_a_separation_that_buys_nothing_or_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    files = ["--ledger", str(tmp_path / "ledger"), "--state", str(tmp_path / "state"), "--detectors", "gumbel"]
    pure = ["--horizon", "365", "--epsilon", "1", *APART]
    for words, message in (
        ([*BEGIN, "--separation", "30"], "needs --contributions of 2 or more"),
        (pure, "needs --delta above 0"),
        ([*BEGIN, "--contributions", "14", "--separation", "30"], "must be at most 13"),
        ([*BEGIN, "--contributions", "2", "--separation", "0"], "greater than or equal to 1"),
    ):
        done = invoke("-", *files, *words, stdin="")
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "ledger").exists()
    # 13 fit: steps 1, 31, ..., 361.
    assert invoke("-", *files, *BEGIN, "--contributions", "13", "--separation", "30", stdin="").exit_code == 0
