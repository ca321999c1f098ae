"""The tour: marked texts are found, tampered ones too, plain and human ones are not; the report verifies."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay import _cli_demo, demo
from assay.cli import app
from assay.report import verify


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> demo.Tour:
    return demo.run(tmp_path_factory.mktemp("tour"))


def by_id(tour: demo.Tour, prefix: str) -> list[demo.Finding]:
    return [finding for finding in tour.findings if finding.exhibit.doc_id.startswith(prefix)]


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert done.exit_code == 1
    assert "File exists" in done.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_the_command_that_checks_the_report_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["env/bin/assay", "demo"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert _cli_demo._command() == "env/bin/assay"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert _cli_demo._command() == "assay"


def test_marked_texts_are_found(tour: demo.Tour) -> None:
    whole = [finding for finding in by_id(tour, "marked-") if finding.exhibit.source == "marked"]
    assert len(whole) == 5
    assert all(finding.with_model.log10_pvalue < -40 and finding.flagged for finding in whole)


def test_tampered_texts_are_found(tour: demo.Tour) -> None:
    tampered = [finding for finding in by_id(tour, "marked-") if finding.exhibit.source != "marked"]
    assert len(tampered) == 7
    light = [f for f in tampered if "10%" in f.exhibit.doc_id or "human" in f.exhibit.doc_id]
    assert all(finding.with_model.log10_pvalue < -10 and finding.flagged for finding in light)


def test_unmarked_texts_are_not(tour: demo.Tour) -> None:
    unmarked = by_id(tour, "plain-") + by_id(tour, "human-")
    assert len(unmarked) == 9
    # Nine texts and a fresh key: one below 1e-5 is a false alarm of 1e-4.
    assert all(finding.plain.pvalue > 1e-5 for finding in unmarked)


def test_the_report_is_signed_and_in_time(tour: demo.Tour) -> None:
    assert verify(tour.page.parent).valid
    assert tour.seconds < 120
