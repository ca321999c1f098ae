"""The monitor: an e-process with its exact expectation, alarms with and without cause, pictures and the command."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from assay._cli_monitor import monitor as command
from assay.conformal import MissMartingale, ScoreMonitor, monitor_scores
from assay.conformal.plots import intervals_over_time, rolling_coverage_plot, set_sizes


def series(n: int, seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=n)
    for i in range(1, n):
        scores[i] += 0.5 * scores[i - 1]
    return scores


# --- the martingale ---------------------------------------------------------------------------------------------------


def by_hand(misses: tuple[int, ...], rate: float, grid: int) -> float:
    """The mixture written out over alternatives and starting steps."""
    t = len(misses)
    total = 0.0
    for k in range(1, grid + 1):
        q = rate + (1 - rate) * k / (grid + 1)
        for start in range(1, t + 1):
            ratio = math.prod(q / rate if miss else (1 - q) / (1 - rate) for miss in misses[start - 1 :])
            total += ratio / (start * (start + 1)) / grid
    return total + 1 / (t + 1)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_the_e_process_by_hand_and_its_mean(rate: float) -> None:
    """All 2^8 sequences: the value by its definition; its mean is exactly 1 at the rate, less below, more above."""
    means = {rate: 0.0, 0.7 * rate: 0.0, 1.3 * rate: 0.0}
    for misses in itertools.product((0, 1), repeat=8):
        martingale = MissMartingale(rate, n_alternatives=3)
        for miss in misses:
            log_evalue = martingale.update(bool(miss))
        assert math.exp(log_evalue) == pytest.approx(by_hand(misses, rate, 3))
        for true in means:
            means[true] += math.exp(log_evalue) * math.prod(true if miss else 1 - true for miss in misses)
    assert means[rate] == pytest.approx(1, abs=1e-12)
    assert means[0.7 * rate] < 1 < means[1.3 * rate]  # the near-miss: too large a rate breaks the bound


def test_a_long_quiet_stretch_costs_little() -> None:
    """10,000 steps at the rate, then misses half of the time: found within 100 steps; 1e300 is no obstacle."""
    martingale = MissMartingale(0.1)
    rng = np.random.default_rng(1)
    for miss in rng.random(10_000) < 0.1:
        martingale.update(bool(miss))
    assert martingale.log_evalue < math.log(100)
    for _ in range(100):
        martingale.update(bool(rng.random() < 0.5))
    assert martingale.log_evalue > math.log(100)
    for _ in range(1000):
        martingale.update(True)
    assert 1500 < martingale.log_evalue < math.inf
    assert martingale.n_steps == 11_100


@pytest.mark.slow
def test_ville() -> None:
    """2,000 processes of 300 steps at the rate: at most 5 % ever reach 20, plus four standard errors of 0.5 %."""
    rng = np.random.default_rng(2)
    reached = 0
    for _ in range(2000):
        martingale = MissMartingale(0.15)
        reached += any(martingale.update(bool(miss)) >= math.log(20) for miss in rng.random(300) < 0.15)
    assert reached / 2000 < 0.05 + 4 * 0.0049


# --- the monitor ------------------------------------------------------------------------------------------------------


def test_a_change_is_found() -> None:
    scores = series(600, 100)
    assert monitor_scores(scores, reference=300, random_state=1).alarm is None
    scores[400:] += 4
    assert 100 <= monitor_scores(scores, reference=300, random_state=1).alarm < 200


@pytest.mark.slow
def test_no_alarm_in_order_and_an_alarm_after_a_change() -> None:
    """60 series in order: at most two alarms (bound 1 %, so three or more have probability 3e-3 at most).

    20 with a shift of 3.5 standard deviations after 150 scores: all are found, none before, half within 40 scores.
    """
    false = sum(monitor_scores(series(900, s), reference=300, random_state=s).alarm is not None for s in range(60))
    assert false <= 2
    delays = []
    for seed in range(20):
        scores = series(900, 100 + seed)
        scores[450:] += 4
        alarm = monitor_scores(scores, reference=300, random_state=seed).alarm
        assert alarm is not None
        assert alarm >= 150
        delays.append(alarm - 150)
    assert np.median(delays) < 40


def test_one_direction_only() -> None:
    scores = series(700, 3)
    scores[400:] += 4
    up = monitor_scores(scores, reference=300, direction="above", random_state=1)
    down = monitor_scores(scores, reference=300, direction="below", random_state=1)
    assert up.alarm is not None
    assert down.alarm is None
    assert np.isneginf(up.lower).all()
    assert np.isposinf(down.upper).all()
    assert up.missed[:100].mean() < 0.2


def test_watching_in_parts_is_watching_at_once() -> None:
    scores = series(600, 4)
    scores[450:] += 5
    whole = monitor_scores(scores, reference=250, random_state=5)
    parts = ScoreMonitor(random_state=5).fit(scores[:250])
    results = [parts.update(scores[first : first + 50]) for first in range(250, 600, 50)]
    np.testing.assert_allclose(np.concatenate([one.log_evalue for one in results]), whole.log_evalue)
    np.testing.assert_array_equal(np.concatenate([one.missed for one in results]), whole.missed)
    first = next(place for place, one in enumerate(results) if one.alarm is not None)
    assert 50 * first + results[first].alarm == whole.alarm
    assert all(one.alarm == 0 for one in results[first + 1 :])  # an alarm stays
    assert f"Alarm at score {whole.alarm + 1}" in whole.sentence()
    assert json.loads(json.dumps(whole.to_dict()))["alarm"] == whole.alarm


def test_bad_input() -> None:
    scores = series(100, 6)
    needed = ScoreMonitor().n_reference
    assert needed == 5 + 20 + 9
    ScoreMonitor().fit(scores[:needed])
    with pytest.raises(ValueError, match=f"at least {needed} scores.*got {needed - 1}"):
        ScoreMonitor().fit(scores[: needed - 1])
    with pytest.raises(ValueError, match="fit comes before update"):
        ScoreMonitor().update(scores)
    ready = ScoreMonitor().fit(scores)
    for bad in ([np.nan], [[1.0]], [np.inf]):
        with pytest.raises(ValueError, match="scores must be finite"):
            ready.update(bad)
    with pytest.raises(ValueError, match="at least one score"):
        ready.update([])
    with pytest.raises(ValueError, match="at least one score more, got 0"):
        monitor_scores([], reference=5)
    for reference in (0, 100, True, 3.5):
        with pytest.raises(ValueError, match=r"reference must be in 1\.\.99"):
            monitor_scores(scores, reference=reference)
    # Squares beyond the largest float would make intervals of NaN, which no score leaves: a monitor that is blind.
    for sized in (1e200, 1e307):
        with pytest.raises(ValueError, match=r"scores must be in \[-1e\+100, 1e\+100\]"):
            ScoreMonitor().fit(scores * sized)
        with pytest.raises(ValueError, match=r"scores must be in"):
            ready.update([sized])
    assert ScoreMonitor(random_state=1).fit(scores * 1e99).update(scores[:20] * 1e99).missed.mean() < 0.5
    for options, message in [
        ({"alpha": 0.0}, "alpha must be"),
        ({"alpha": 0.6, "direction": "above"}, r"alpha must be a number in \(0, 0.5\)"),
        ({"false_alarm": 1.0}, "false_alarm must be"),
        ({"max_miss_rate": 0.05}, r"max_miss_rate must be in \[alpha, 1\)"),
        ({"direction": "up"}, 'direction must be "both"'),
        ({"lags": 0}, "lags must be"),
        ({"window": 0}, "window must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            ScoreMonitor(**options)
    for rate, grid in ((0.0, 9), (1.0, 9), (0.1, 0)):
        with pytest.raises(ValueError, match="must be"):
            MissMartingale(rate, grid)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_sound_svg() -> None:
    y = series(200, 7)
    ends = np.column_stack([np.full(200, -2.0), np.full(200, 2.0)])
    ends[:5] = [-np.inf, np.inf]
    pictures = [
        intervals_over_time(y, np.zeros(200), ends, alarm=150, title="a < b"),
        rolling_coverage_plot(y, ends, 0.1, window=50),
        set_sizes(np.array([0, 1, 2, 2, 1]), 4),
    ]
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.tag.endswith("svg")
        assert root.attrib["role"] == "img"
        assert "<script" not in picture
        assert "<metadata>" not in picture or "date" not in picture
    missed = int((np.abs(y[5:]) > 2).sum())
    assert f"200 steps, {missed} of them outside" in pictures[0]
    assert "alarm is raised at step 150" in pictures[0]
    assert "on average 1.20 of 4" in pictures[2]
    assert intervals_over_time(y, np.zeros(200), ends) == intervals_over_time(y, np.zeros(200), ends)
    with pytest.raises(ValueError, match="point must be"):
        intervals_over_time(y, np.zeros(3), ends)
    with pytest.raises(ValueError, match="one level"):
        intervals_over_time(y, np.zeros(200), np.dstack([ends, ends]))
    with pytest.raises(ValueError, match="one level alpha"):
        rolling_coverage_plot(y, ends, 1.0)
    for sizes, n in (([5], 4), ([-1], 4), ([], 4), ([0.5], 4), ([1], 65)):
        with pytest.raises(ValueError, match="must be"):
            set_sizes(np.array(sizes), n)


def bands(picture: str) -> list[str]:
    """What is filled with the band's colour, as path data."""
    used = re.findall(r'xlink:href="#([^"]+)"[^>]*style="fill: #cfe0f3', picture)
    return [re.findall(rf'<path id="{name}" d="([^"]+)"', picture)[0] for name in used]


def test_one_sided_intervals_are_drawn_to_the_edge() -> None:
    """An end that is not watched leaves no gap; where both ends are infinite there is one."""
    y, point = series(50, 3), np.zeros(50)
    below = np.column_stack([np.full(50, -np.inf), np.full(50, 2.0)])
    nothing = np.column_stack([np.full(50, -np.inf), np.full(50, np.inf)])
    drawn = [intervals_over_time(y, point, ends) for ends in (below, nothing, np.clip(below, -1.0, None))]
    shapes = [bands(picture) for picture in drawn]
    assert len(shapes[0]) == len(shapes[2]) == 1
    assert shapes[1] == []
    # One-sided, the band is deeper than the two-sided one by what lies between -1 and the lower edge.
    depth = [np.ptp([float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", shape[0])]) for shape in shapes[::2]]
    assert depth[0] > depth[1] * 1.1


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command()(command)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_the_command_reads_every_format(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = series(500, 8)
    scores[400:] += 6
    path = tmp_path / f"scores.{kind}"
    if kind == "txt":
        path.write_text("".join(f"{score!r}\n" for score in scores.tolist()), encoding="utf-8")
    elif kind == "csv":
        path.write_text("day,score\n" + "".join(f"{t},{s!r}\n" for t, s in enumerate(scores.tolist())))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"score": score}) + "\n" for score in scores.tolist()))
    else:
        pq.write_table(pa.table({"score": scores}), path)
    done = run(str(path), "--reference", "300", "--json", "--plot", str(tmp_path / "picture.svg"))
    assert done.exit_code == 4, done.output
    found = json.loads(done.stdout)
    assert found["log_evalue"] == monitor_scores(scores, reference=300, random_state=0).to_dict()["log_evalue"]
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8").startswith("<svg")


def test_the_command_without_alarm_and_its_refusals(tmp_path: Path) -> None:
    quiet = tmp_path / "scores.txt"
    quiet.write_text("".join(f"{score}\n" for score in series(400, 9)))
    done = run(str(quiet), "--reference", "300")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["alarm"] is None
    (tmp_path / "bad.txt").write_text("1\ntwo\n")
    (tmp_path / "nan.txt").write_text("1\nnan\n")
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "latin.txt").write_bytes(b"1\n2\xe9\n")
    (tmp_path / "latin.csv").write_bytes(b"score,caf\xe9\n1,2\n")
    (tmp_path / "wide.csv").write_text("score\n" + "9" * 200_000 + "\n")
    (tmp_path / "large.jsonl").write_text('{"score": ' + "9" * 400 + "}\n")
    (tmp_path / "larger.jsonl").write_text('{"score": ' + "9" * 9000 + "}\n")
    (tmp_path / "deep.jsonl").write_text('{"score": ' + "[" * 100_000 + "\n")
    (tmp_path / "true.jsonl").write_text('{"score": true}\n')
    for name, message in [
        ("bad.txt", "row 2 is not a number"),
        ("nan.txt", "row 2 is nan"),
        ("bad.jsonl", "row 1 has no 'score'"),
        ("list.jsonl", "row 1 is not a JSON object"),
        ("bad.csv", "--column"),
        ("bad.parquet", "cannot be read as Parquet"),
        ("latin.txt", "is not UTF-8 text"),
        ("latin.csv", "is not UTF-8 text"),
        ("wide.csv", "cannot be read as CSV"),
        ("large.jsonl", "row 1 is inf; every score must be finite"),
        ("larger.jsonl", "row 1 is not a JSON object"),
        ("deep.jsonl", "row 1 is not a JSON object"),
        ("true.jsonl", "row 1 is not a number: True"),
    ]:
        done = run(str(tmp_path / name), "--reference", "1")
        assert done.exit_code == 2, (name, done.output)
        assert message in " ".join(done.output.replace("│", " ").split()), done.output
    assert run(str(tmp_path / "gone.txt"), "--reference", "1").exit_code == 1
    assert run(str(quiet), "--reference", "400").exit_code == 2
    assert run(str(quiet), "--reference", "300", "--direction", "up").exit_code == 2
