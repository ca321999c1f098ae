"""Monitored sources in a report: what is kept, how it reads, that it round-trips, and that older reports stay valid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.conformal import MarkovSets, MonitorResult, SentenceLabels, monitor_scores
from assay.report import Report, verify
from assay.report.records import MOST_STEPS, LabelledSource, MonitoredSource
from assay.watermark.keys import SecretKey
from tests.report.test_report_html import HOSTILE, Page, inert


def quiet(n: int, seed: int) -> MonitorResult:
    return monitor_scores(np.random.default_rng(seed).normal(size=n + 200), reference=200, random_state=seed)


def test_the_record_holds_the_stretch_around_the_alarm_and_the_totals_of_all(watched: MonitorResult) -> None:
    (one,) = Report.from_results([], monitoring=[("wire", watched)]).monitoring
    assert 600 <= watched.alarm < 640
    assert len(one.scores) == MOST_STEPS < one.n_scores == 900
    assert one.alarm == watched.alarm == one.first + MOST_STEPS // 2
    assert one.n_missed == watched.missed.sum() > sum(one.missed)
    assert one.log_evalue_largest == watched.log_evalue.max() > math.log(100)
    for name in ("scores", "point", "lower", "upper", "missed", "log_evalue"):
        kept = getattr(watched, name)[one.first : one.first + MOST_STEPS]
        assert getattr(one, name) == tuple(kept.tolist()), name
    # The series itself shows the alarm where it is said to be: there the evidence reaches 1 / false_alarm first.
    assert next(i for i, e in enumerate(one.log_evalue) if e >= -math.log(0.01)) == one.alarm - one.first


@pytest.mark.parametrize(("n", "first"), [(1, 0), (499, 0), (500, 0), (501, 1), (900, 400)])
def test_without_an_alarm_the_last_scores_are_kept(n: int, first: int) -> None:
    (one,) = Report.from_results([], monitoring=[("desk", quiet(n, 1))]).monitoring
    assert (one.alarm, one.first, len(one.scores)) == (None, first, min(n, 500))


@pytest.mark.parametrize("at", [0, 100, 600, 899])
def test_an_early_or_a_late_alarm_is_in_the_series(watched: MonitorResult, at: int) -> None:
    (one,) = Report.from_results([], monitoring=[("wire", replace(watched, alarm=at))]).monitoring
    assert one.first <= at < one.first + len(one.scores)
    assert len(one.scores) == MOST_STEPS


def test_words_name_both_numbers_of_the_bound(watched: MonitorResult) -> None:
    wire, desk = Report.from_results([], monitoring=[("wire", watched), ("desk", quiet(50, 2))]).monitoring
    assert wire.words.startswith(f"Alarm at score {watched.alarm + 1}: {watched.missed.sum()} of 900 scores left")
    assert desk.words.startswith("No alarm: ")
    assert "This does not show that nothing changed." in desk.words
    for one in (wire, desk):
        assert "If every interval missed with probability at most 15%, given the scores before it" in one.words
        assert "an alarm at any time, however long one watches, would be at most 1%." in one.words


def test_round_trip_with_infinite_ends(watched: MonitorResult) -> None:
    report = Report.from_results([], monitoring=[("wire", watched), ("desk", quiet(30, 3))])
    data = report.to_json()
    assert Report.from_json(data) == report
    assert Report.from_json(data).to_json() == data
    plain = json.loads(data)["monitoring"][0]
    assert set(plain["upper"]) == {"inf"}
    assert plain["alarm"] == watched.alarm


def test_reports_without_monitoring_are_what_they_were(small_report: Report) -> None:
    """The fields of the first version, no more: what was written and signed then reads and checks as before."""
    plain = json.loads(small_report.to_json())
    first = (
        "schema title made software fdr verdict counts log_pvalue_threshold histogram lengths sources sources_left_out "
        "documents keys tests nulls assumptions inputs inputs_left_out outputs tokenizer rejects limits"
    )
    assert plain.keys() == set(first.split())
    assert Report.from_json(small_report.to_json()) == small_report
    assert 'id="monitoring"' not in small_report.to_html()
    assert "#monitoring" not in small_report.to_html()
    # Only what is optional may be missing.
    for name in first.split():
        with pytest.raises(ValueError, match="must"):
            Report.from_json(json.dumps({key: item for key, item in plain.items() if key != name}))


def test_the_signature_covers_the_series(
    watched: MonitorResult, make_signer: Callable[[int], SecretKey], tmp_path: Path
) -> None:
    Report.from_results([], monitoring=[("wire", watched)]).save(tmp_path, sign_with=make_signer(1))
    assert verify(tmp_path)
    data = (tmp_path / "report.json").read_bytes()
    (tmp_path / "report.json").write_bytes(data.replace(b'"alarm":6', b'"alarm":7'))
    assert not verify(tmp_path)


def test_the_page_shows_each_source_with_a_picture_that_speaks(watched: MonitorResult) -> None:
    html = Report.from_results([], monitoring=[("wire", watched), ("desk", quiet(120, 4))]).to_html()
    page = inert(html)
    assert {"href": "#monitoring"} in page.all("a")
    names = [element.get("id") for _, element in page.elements if element.get("id")]
    assert len(set(names)) == len(names)
    labels = [picture.get("aria-labelledby") for picture in page.all("svg")]
    assert "monitor-1-title monitor-1-desc" in labels
    assert "monitor-2-title monitor-2-desc" in labels
    shown = sum(watched.missed[watched.alarm - 250 : watched.alarm + 250])
    assert f"{shown} of them lie outside their intervals. An alarm is raised at score {watched.alarm + 1}." in html
    assert "No alarm is raised." in html
    assert f"Scores {watched.alarm - 249} to {watched.alarm + 250} of 900" in html
    # A one-sided interval is drawn too: its band goes on to the edge of the picture.
    assert html.count('class="fill-band"') >= 4
    assert 'class="fill-mark"' in html


def test_hostile_names_stay_text_and_out_of_pictures() -> None:
    result = quiet(20, 5)
    html = Report.from_results([], monitoring=[(name, result) for name in HOSTILE]).to_html()
    inert(html)
    assert html.count("alert(1)") == 1  # the heading, escaped; not the picture
    assert Page(html).all("svg")


def test_same_bytes_twice(watched: MonitorResult) -> None:
    report = Report.from_results([], monitoring=[("wire", watched)])
    assert report.to_html() == Report.from_json(report.to_json()).to_html()


@pytest.mark.parametrize(
    ("monitoring", "message"),
    [
        ([("wire",)], r"tuples \(source, MonitorResult\), got tuple"),
        (["wire"], "got str"),
        ([("wire", {"alarm": 3})], "list of SentenceLabels or StateSets.*, got dict"),
        ([("wire", [])], "got list as the second"),
        ([("wire", quiet(3, 1)), ("wire", quiet(3, 1))], "2 with 1 names"),
        ([(str(i), quiet(3, 1)) for i in range(31)], "at most 30 sources"),
        ([("wire", replace(quiet(3, 1), point=np.full(3, np.inf)))], "scores and point .* must be finite"),
    ],
)
def test_what_is_no_monitoring_is_refused(monitoring: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_results([], monitoring=monitoring)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, r"alpha must be in \(0, 1\)"),
        ({"false_alarm": float("inf")}, "false_alarm must be"),
        ({"scores": ()}, "equal length"),
        ({"point": (0.0,)}, "equal length"),
        ({"first": 1}, "first must be"),
        ({"n_missed": 31}, "n_missed in"),
        ({"alarm": 30}, "alarm must be the place"),
        ({"lower": (9.0,) * 30, "upper": (-9.0,) * 30}, "lower of a monitored source"),
        ({"scores": (math.nan,) * 30}, "must be finite"),
    ],
)
def test_a_strangers_record_is_checked(changes: dict, message: str) -> None:
    (one,) = Report.from_results([], monitoring=[("desk", quiet(30, 6))]).monitoring
    assert isinstance(one, MonitoredSource)
    with pytest.raises(ValueError, match=message):
        replace(one, **changes)


# --- rolling coverage ------------------------------------------------------------------------------------------------


def test_rolling_coverage_is_that_of_the_scores_shown(watched: MonitorResult) -> None:
    html = Report.from_results([], monitoring=[("wire", watched)]).to_html()
    hits = ~watched.missed[watched.alarm - 250 : watched.alarm + 250]
    shares = [sum(hits[i : i + 50]) / 50 for i in range(451)]
    words = f"over 50 scores at a time. It lies between {100 * min(shares):.3g}% and {100 * max(shares):.3g}%; "
    assert words + f"the target is 90%. An alarm is raised at score {watched.alarm + 1}." in html
    assert "the 85% that is still in order" in html
    labels = [picture.get("aria-labelledby") for picture in inert(html).all("svg")]
    assert "rolling-1-title rolling-1-desc" in labels


@pytest.mark.parametrize(("n", "window"), [(19, None), (20, 10), (60, 30), (300, 50)])
def test_short_series_have_short_windows_or_no_rolling_coverage(n: int, window: int | None) -> None:
    html = Report.from_results([], monitoring=[("desk", quiet(n, 7))]).to_html()
    inert(html)
    if window is None:
        assert "at a time" not in html
    else:
        assert f"Coverage of the same scores, {window} at a time." in html


# --- sizes of sets ---------------------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_the_verdicts(labelled: list[SentenceLabels]) -> None:
    (one,) = Report.from_results([], monitoring=[("column", labelled)]).labelling
    left = [len(verdict) for labels in labelled for verdict in labels.verdicts]
    assert one.sizes == (0, left.count(1), left.count(2))
    assert min(one.sizes[1:]) > 0  # both happen, or this could not fail
    assert (one.n_sets, sum(one.sizes), one.states, one.alpha) == (30, 60, ("human", "llm"), 0.1)
    assert one.sizes[1] == sum(labels.decided for labels in labelled)
    assert one.words.startswith(f"Of 60 steps, {one.sizes[1]} have one state left, {one.sizes[2]} have several. Each")
    assert "with probability at least 90%, if the states form a Markov chain" in one.words
    sets = [labels.sets for labels in labelled]
    assert Report.from_results([], monitoring=[("column", sets)]).labelling == (one,)


def test_sets_of_a_chain_without_symbols_and_empty_ones() -> None:
    rng = np.random.default_rng(1)
    chain = MarkovSets(range(3), alpha=0.9, randomised=True).fit(rng.integers(0, 3, 40).tolist())
    sets = [chain.predict(1, rng=rng) for _ in range(20)]
    (one,) = Report.from_results([], monitoring=[("machine", sets)]).labelling
    assert one.states == ("0", "1", "2")
    assert one.sizes[0] == sum(found.size == 0 for found in sets) > 0
    assert f"{one.sizes[0]} have none, since nothing fits" in one.words


def test_labelled_sources_round_trip_are_signed_and_drawn(
    watched: MonitorResult, labelled: list[SentenceLabels], make_signer: Callable[[int], SecretKey], tmp_path: Path
) -> None:
    report = Report.from_results([], monitoring=[("wire", watched), ("column", labelled)])
    assert Report.from_json(report.to_json()) == report
    report.save(tmp_path, sign_with=make_signer(1))
    assert verify(tmp_path)
    (one,) = report.labelling
    data = (tmp_path / "report.json").read_bytes()
    sizes = f'"sizes":[0,{one.sizes[1]},{one.sizes[2]}]'.encode()
    assert sizes in data
    (tmp_path / "report.json").write_bytes(data.replace(sizes, b'"sizes":[0,60,0]'))
    assert not verify(tmp_path)
    html = report.to_html()
    labels = [picture.get("aria-labelledby") for picture in inert(html).all("svg")]
    assert "sets-1-title sets-1-desc" in labels
    assert f"how many of 2 states remain possible. 0: 0, 1: {one.sizes[1]}, 2: {one.sizes[2]}." in html
    alone = Report.from_results([], monitoring=[("column", labelled)]).to_html()
    assert {"href": "#monitoring"} in Page(alone).all("a")
    assert "An alarm says" not in alone


def test_hostile_states_stay_text() -> None:
    rng = np.random.default_rng(2)
    chain = MarkovSets(HOSTILE).fit([HOSTILE[i % len(HOSTILE)] for i in range(30)])
    html = Report.from_results([], monitoring=[(HOSTILE[0], [chain.predict(1, rng=rng)])]).to_html()
    inert(html)
    assert Page(html).all("svg")


def test_sets_that_do_not_belong_together_are_refused(labelled: list[SentenceLabels]) -> None:
    rng = np.random.default_rng(3)
    other = MarkovSets(["human", "llm"], alpha=0.2).fit(["human", "llm"]).predict(1, rng=rng)
    with pytest.raises(ValueError, match="one alpha and the same states"):
        Report.from_results([], monitoring=[("column", [*labelled, other])])
    many = MarkovSets(range(65)).fit([1, 2]).predict(1, rng=rng)
    with pytest.raises(ValueError, match="at most 64 states"):
        Report.from_results([], monitoring=[("column", [many])])
    with pytest.raises(ValueError, match="each once"):
        Report.from_results([], monitoring=[("column", [other]), ("column", [other])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha must be"),
        ({"states": ()}, r"must have 1\.\.64 states"),
        ({"sizes": (1, 2)}, "one size more"),
        ({"sizes": (-1, 30, 31)}, "sizes must be"),
        ({"n_sets": 61}, "n_sets in"),
        ({"n_sets": 0}, "n_sets in"),
    ],
)
def test_a_strangers_labels_are_checked(labelled: list[SentenceLabels], changes: dict, message: str) -> None:
    (one,) = Report.from_results([], monitoring=[("column", labelled)]).labelling
    assert isinstance(one, LabelledSource)
    with pytest.raises(ValueError, match=message):
        replace(one, **changes)
