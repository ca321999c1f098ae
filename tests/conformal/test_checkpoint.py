"""Checkpoints: a restart changes no digit, no step is lost or counted twice, damage is refused."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

from assay._cli_monitor import monitor as command
from assay._errors import StateError
from assay.conformal import Checkpoint, DriftGuard, ELond, Lord, MissMartingale, Saffron, ScoreMonitor, checkpoint


def scores(n: int, seed: int) -> np.ndarray:
    return np.round(np.random.default_rng(seed).normal(size=n), 1)  # with ties, which are broken at random


def guard() -> DriftGuard:
    return DriftGuard(scores(40, 1), level=0.05, rng=np.random.default_rng(2))


def watch() -> ScoreMonitor:
    return ScoreMonitor(window=5, lags=2, random_state=3).fit(scores(60, 4))


KINDS: dict[str, tuple[Any, list[Any]]] = {
    "DriftGuard": (guard, scores(30, 5).tolist()),
    "ScoreMonitor": (watch, list(np.split(scores(30, 6) + 1.0, 10))),
    "MissMartingale": (lambda: MissMartingale(0.1, 4), [bool(x > 0.5) for x in scores(30, 7)]),
    "Lord": (lambda: Lord(fdr=0.1), (np.random.default_rng(8).random(30) ** 6).tolist()),
    "Saffron": (lambda: Saffron(fdr=0.1, cut=0.4), (np.random.default_rng(9).random(30) ** 4).tolist()),
    "ELond": (lambda: ELond(fdr=0.1), (4 * np.random.default_rng(10).normal(size=30)).tolist()),
}


def same(one: Any, other: Any) -> bool:
    return json.dumps(one.state(), sort_keys=True) == json.dumps(other.state(), sort_keys=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_before_every_step_changes_no_digit(kind: str, tmp_path: Path) -> None:
    make, steps = KINDS[kind]
    whole = make()
    Checkpoint.start(tmp_path / "state", make()).close()
    for step in steps:
        with Checkpoint.resume(tmp_path / "state") as kept:
            found, expected = kept.update(step), whole.update(step)
            if kind == "ScoreMonitor":
                assert np.array_equal(found.log_evalue, expected.log_evalue)
                assert np.array_equal(found.lower, expected.lower)
                assert (found.alarm, kept.process.alarmed) == (expected.alarm, whole.alarmed)
            else:
                assert found == expected
            assert same(kept.process, whole)
    with Checkpoint.resume(tmp_path / "state") as kept:
        assert kept.n_steps == 30
        assert type(kept.process).__name__ == kind
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"state", "state.lock"}


def test_many_steps_and_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, steps = KINDS["DriftGuard"]
    whole = make()
    kept = Checkpoint.start(tmp_path / "state", make())
    writes = []
    write = Checkpoint._write
    monkeypatch.setattr(Checkpoint, "_write", lambda self: (writes.append(1), write(self)))
    assert kept.extend(steps[:20]) == [whole.update(step) for step in steps[:20]]
    assert (len(writes), kept.n_steps) == (1, 20)
    with pytest.raises(ValueError, match="single steps"):
        kept.extend([[1.0, 2.0]])
    with pytest.raises(ValueError, match="score must be finite"):
        kept.extend([np.nan, 1.0])  # refused before anything changed: go on
    assert kept.extend([]) == []
    with pytest.raises(StateError, match="value 2 of 2 was refused"):
        kept.extend([0.5, np.nan])
    with pytest.raises(StateError, match="broke off"):
        kept.update(0.5)  # what is in memory is ahead of the file
    kept.close()
    with Checkpoint.resume(tmp_path / "state") as again:
        assert again.n_steps == 20
        assert same(again.process, whole)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_step_that_broke_off_is_counted_once(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoint.start(tmp_path / "state", Lord(fdr=0.1))
    kept.update(0.9, number=1)
    before = (tmp_path / "state").read_bytes()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(type(error)):
            kept.update(1e-9, number=2)
    assert (tmp_path / "state").read_bytes() == before
    with pytest.raises(StateError, match="broke off"):
        kept.update(1e-9, number=2)
    kept.close()
    with Checkpoint.resume(tmp_path / "state") as again:
        assert again.update(1e-9, number=2)
        with pytest.raises(StateError, match="taken in already"):
            again.update(1e-9, number=2)  # the sender did not hear the answer
        with pytest.raises(StateError, match="missing"):
            again.update(1e-9, number=4)
        assert (again.n_steps, again.process.discoveries) == (2, [2])


def test_a_killed_process_leaves_every_answered_step(tmp_path: Path) -> None:
    """Killed at a random place, the file holds what was answered, and at most one step more."""
    code = f"""
from assay.conformal import Checkpoint, ELond
kept = Checkpoint.start({str(tmp_path / "state")!r}, ELond(fdr=0.1))
print("ready", flush=True)
for step in range(10**6):
    kept.update(0.0)
    print(step + 1, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "25":
                break
        process.kill()
        answered = [25, *(int(line) for line in process.stdout if line.endswith("\n"))][-1]
    with Checkpoint.resume(tmp_path / "state") as kept:
        assert kept.n_steps - answered in (0, 1)
        assert kept.process.n_tested == kept.n_steps


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with Checkpoint.start(path, Lord(fdr=0.1)) as kept:
        kept.update(1e-5)
    content = path.read_bytes()
    for place in range(len(content) - 1):  # the last is the line end
        for changed in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
            path.write_bytes(changed)
            with pytest.raises(StateError, match="no checkpoint, or it was changed"):
                Checkpoint.resume(path)
    path.write_bytes(content)
    Checkpoint.resume(path).close()


def resigned(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.pop("sha256")
    content |= changes
    path.write_text(checkpoint._text(content | {"sha256": checkpoint._digest(content)}))


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(StateError, match="no checkpoint at"):
        Checkpoint.resume(path)
    with pytest.raises(TypeError, match="process must be one of"):
        Checkpoint.start(path, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fit comes before"):
        Checkpoint.start(path, ScoreMonitor())
    with pytest.raises(ValueError, match="PCG64"):
        Checkpoint.start(path, DriftGuard([0.0], rng=np.random.Generator(np.random.Philox(1))))
    with pytest.raises(ValueError, match="n_steps"):
        Checkpoint.start(path, Lord(fdr=0.1), n_steps=-1)
    assert not path.exists()
    kept = Checkpoint.start(path, Lord(fdr=0.1), n_steps=7)
    with pytest.raises(StateError, match="open in another process"):
        Checkpoint.resume(path)
    with pytest.raises(ValueError, match="pvalue must be"):
        kept.update(2.0)
    assert not kept.update(0.5, number=8)  # the refused one changed nothing
    kept.close()
    with pytest.raises(StateError, match="closed"):
        kept.update(0.5)
    with pytest.raises(StateError, match="must be free"):
        Checkpoint.start(path, Lord(fdr=0.1))
    for changes in ({"schema": "assay.checkpoint/2"}, {"kind": "Nothing"}):
        resigned(path, **changes)
        with pytest.raises(StateError, match="a newer Assay may read it"):
            Checkpoint.resume(path)
    resigned(path, schema=checkpoint.SCHEMA, kind="Lord", state={"fdr": 2.0})
    with pytest.raises(StateError, match="cannot be read by this version"):
        Checkpoint.resume(path)


def test_restarts_do_not_raise_the_false_alarms_of_a_guard() -> None:
    """A stop after every 25 of 250 texts. Kept: at most the level, by a binomial bound at 1e-6. Begun anew: more."""
    rng, streams, level = np.random.default_rng(11), 120, 0.3
    alarms = {"kept": 0, "anew": 0}
    for _ in range(streams):
        calibration, texts = rng.normal(size=60), rng.normal(size=(10, 25))
        kept, raised = DriftGuard(calibration, level=level, rng=rng.spawn(1)[0]), False
        for part in texts:
            kept = DriftGuard.from_state(json.loads(json.dumps(kept.state())))
            anew = DriftGuard(calibration, level=level, rng=rng)
            for text in part:
                kept.update(text)
                raised |= anew.update(text)
        alarms["kept"] += kept.alarm_at is not None
        alarms["anew"] += raised
    bound = stats.binom.isf(1e-6, streams, level)
    assert alarms["kept"] <= bound < alarms["anew"]


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(values: np.ndarray, *words: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, ["-", *words, "--json"], input="".join(f"{value!r}\n" for value in values.tolist()))


def test_the_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    series = np.concatenate([rng.normal(size=160), rng.normal(size=60) + 6])
    options = ["--reference", "120", "--window", "5", "--seed", "3"]
    whole = json.loads(invoke(series, *options).stdout)
    state = ["--state", str(tmp_path / "watch")]

    calls = [invoke(series[:150], *options, *state), invoke(series[150:190], *state, "--first", "31")]
    calls.append(invoke(series[190:], *state, "--reference", "120", "--window", "5"))
    parts = [json.loads(call.stdout) for call in calls]
    for name in ("scores", "lower", "upper", "missed", "log_evalue"):
        assert [value for part in parts for value in part[name]] == whole[name]
    assert [part["n_watched"] for part in parts] == [30, 70, 100]
    assert [part["alarmed_before"] for part in parts] == [False, False, True]
    assert [call.exit_code for call in calls] == [0, 4, 4]
    assert parts[1]["alarm"] + 30 == whole["alarm"]

    again = invoke(series[190:], *state, "--first", "71")
    assert again.exit_code == 1
    assert "taken in already" in again.stderr
    for wrong in (["--alpha", "0.2"], ["--false-alarm", "0.5"], ["--reference", "119"], ["--seed", "3"]):
        refused = invoke(series[190:], *state, *wrong)
        assert refused.exit_code == 2
        assert "began" in refused.stderr or "begins" in refused.stderr
    with Checkpoint.resume(tmp_path / "watch") as kept:
        assert kept.n_steps == 100


def test_what_the_command_refuses(tmp_path: Path) -> None:
    series = np.random.default_rng(13).normal(size=150)
    state = ["--state", str(tmp_path / "watch")]
    for words, message in (
        ([], "--reference is needed"),
        (["--reference", "120", "--first", "1"], "--first goes with --state"),
        (state, "needed to begin a watch"),
        ([*state, "--reference", "150"], "at least one score more"),
        ([*state, "--reference", "120", "--first", "2"], "--first must be 1"),
        ([*state, "--reference", "20"], "the reference must have at least"),
    ):
        done = invoke(series, *words)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.replace("│", " ").split())
        assert not (tmp_path / "watch").exists()
    Checkpoint.start(tmp_path / "watch", Lord(fdr=0.1)).close()
    other = invoke(series, *state)
    assert other.exit_code == 1
    assert "keeps a Lord" in other.stderr
