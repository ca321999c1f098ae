"""/v1/telemetry: noise of the stated law, a budget that ends, one figure for a day for ever, sensitivity 2."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pyarrow import parquet
from scipy import stats

from assay.privacy.errors import BudgetError, SeededNoiseError
from assay.privacy.noise import SeededNoise
from assay.service import audit, jobs
from assay.service.app import create_app
from assay.service.auth import create_api_key
from assay.service.database import Job
from assay.service.settings import Settings
from assay.service.telemetry import SENSITIVITY, ConflictError, Telemetry, figures, half_width
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.signing import Ed25519Config

YESTERDAY = datetime.now(UTC).date() - timedelta(days=1)
NOON = datetime.combine(YESTERDAY, datetime.min.time(), UTC) + timedelta(hours=12)
LEVEL = 1e-4


class Service:
    """A service without requests yet, and jobs whose results are written by hand."""

    def __init__(self, data: Path, database_url: str | None = None) -> None:
        self.state = create_app(Settings(data=data, database_url=database_url)).state.assay
        self.data = data

    def telemetry(self, tenant: str, noise: object = None) -> Telemetry:
        return Telemetry(self.state.sessions, self.data, tenant, noise=noise)

    def job(self, tenant: str, rows: list[tuple[str, float]], at: datetime = NOON, state: str = jobs.FINISHED) -> str:
        """A job with these keys and log p-values, that ended at a time."""
        id = jobs.new_id()
        folder = jobs.JobFolders(self.data).run(id)
        folder.mkdir(parents=True)
        keys, log_p = [row[0] for row in rows], [row[1] for row in rows]
        parquet.write_table(
            pa.table({"key_id": pa.array(keys, pa.string()), "log_pvalue": pa.array(log_p, pa.float64())}),
            folder / "results.parquet",
        )
        row = Job(
            id=id,
            tenant_id=tenant,
            api_key_id="x",
            state=state,
            created=at,
            updated=at,
            request_sha256="",
            options={},
            progress={},
            attempts=1,
        )
        with self.state.sessions.begin() as session:
            session.add(row)
        return id


class Silent:
    """No noise: shows what would be noised."""

    name, seeded = "silent", False

    def laplace(self, scale: Fraction, size: int) -> np.ndarray:
        self.scale = scale
        return np.zeros(size, dtype=np.int64)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    made = Service(tmp_path_factory.mktemp("service"))
    for tenant in ("press", "other", "exact", "busy", "poor"):
        create_api_key(made.state.sessions, tenant, ["admin"])
    return made


def test_what_is_counted(service: Service) -> None:
    below, above = math.log(LEVEL), math.log(LEVEL) + 1e-9
    service.job("exact", [("a", below), ("a", -50.0), ("b", above), ("b", -20.0), ("a", 0.0)])
    service.job("exact", [("b", -30.0)], at=NOON + timedelta(hours=11, minutes=59))
    service.job("exact", [("a", -30.0)] * 100, at=NOON + timedelta(hours=12))  # today
    service.job("exact", [("a", -30.0)] * 100, at=NOON - timedelta(hours=12, seconds=1))  # the day before
    service.job("exact", [("a", -30.0)] * 100, state=jobs.CANCELLED)
    service.job("other", [("a", -30.0)] * 100)
    noise = Silent()
    telemetry = service.telemetry("exact", noise)
    telemetry.grant(1.0)
    found = telemetry.publish(YESTERDAY, ["a", "b", "never"], epsilon=0.5, level=LEVEL)
    assert found["documents"] == 6
    assert {id: one["flagged"] for id, one in found["detectors"].items()} == {"a": 2, "b": 2, "never": 0}
    assert noise.scale >= Fraction(SENSITIVITY) / Fraction("0.5")
    assert noise.scale < Fraction(SENSITIVITY) / Fraction("0.5") * (1 + Fraction(1, 2**39))


def test_both_databases_find_the_jobs_of_a_day(database_url: str, tmp_path: Path) -> None:
    service = Service(tmp_path, database_url)
    create_api_key(service.state.sessions, "press", ["admin"])
    service.job("press", [("a", -30.0)])
    service.job("press", [("a", -30.0)] * 10, at=NOON + timedelta(hours=12))
    telemetry = service.telemetry("press", Silent())
    telemetry.grant(1.0)
    assert telemetry.publish(YESTERDAY, ["a"], epsilon=0.5, level=LEVEL)["documents"] == 1
    service.state.guard.close()
    service.state.engine.dispose()


def test_one_document_moves_the_figures_by_two_at_most(service: Service) -> None:
    """Every single document, added to every kind of day; flags at a false discovery rate fail the same check."""
    rng = np.random.default_rng(0)
    worst = worst_fdr = 0
    for _ in range(200):
        rows = [(str(rng.choice(["a", "b"])), float(-rng.exponential(8))) for _ in range(int(rng.integers(0, 9)))]
        more = [*rows, (str(rng.choice(["a", "b"])), float(-rng.exponential(8)))]
        before, after = counted(service, rows), counted(service, more)
        worst = max(worst, sum(abs(x - y) for x, y in zip(before, after, strict=True)))
        before, after = flagged_at_fdr(rows), flagged_at_fdr(more)
        worst_fdr = max(worst_fdr, sum(abs(x - y) for x, y in zip(before, after, strict=True)))
    assert worst == SENSITIVITY
    assert worst_fdr > SENSITIVITY, "the near-miss must be noticed"


def counted(service: Service, rows: list[tuple[str, float]]) -> list[int]:
    path = service.data / "rows.parquet"
    keys, log_p = [row[0] for row in rows], [row[1] for row in rows]
    parquet.write_table(
        pa.table({"key_id": pa.array(keys, pa.string()), "log_pvalue": pa.array(log_p, pa.float64())}), path
    )
    telemetry = service.telemetry("press")
    telemetry._results = lambda day: iter([path])
    documents, flagged = telemetry._counts(YESTERDAY, LEVEL)
    return [documents, flagged["a"], flagged["b"]]


def flagged_at_fdr(rows: list[tuple[str, float]]) -> list[int]:
    """The mutant: flags as a job makes them."""
    pvalues = [math.exp(log_p) for _, log_p in rows]
    passed = stats.false_discovery_control(pvalues) <= 0.01 if rows else []
    flags = [key for (key, _), one in zip(rows, passed, strict=True) if one]
    return [len(rows), flags.count("a"), flags.count("b")]


def test_the_noise_has_the_stated_law(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 published counts against the discrete Laplace law; a scale of 1 / epsilon is rejected."""
    telemetry = service.telemetry("busy")
    telemetry.grant(1.0)
    keys = [str(i) for i in range(1999)]
    found = telemetry.publish(YESTERDAY, keys, epsilon=1.0, level=LEVEL)
    noise = np.array([found["documents"], *(one["flagged"] for one in found["detectors"].values())])

    def pvalue(scale: float) -> float:
        edges = np.arange(-5, 6)
        law = stats.dlaplace(1 / scale)
        expected = np.array([law.cdf(-6), *law.pmf(edges), law.sf(5)]) * len(noise)
        seen = np.array([np.sum(noise < -5), *(np.sum(noise == edge) for edge in edges), np.sum(noise > 5)])
        return float(stats.chisquare(seen, expected).pvalue)

    # The entropy is the system's: one run in a million fails by chance. 2,000 draws tell scale 1 from 2 by far.
    assert pvalue(2.0) > 1e-6
    assert pvalue(1.0) < 1e-12


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0, 1234.5])
@pytest.mark.parametrize("draws", [1, 4, 50])
def test_half_width_is_the_smallest_that_holds(scale: float, draws: int) -> None:
    law = stats.dlaplace(1 / scale)
    t = half_width(Fraction(scale), draws)
    beyond = lambda t: 2 * law.sf(t) * draws  # noqa: E731
    assert beyond(t) <= 0.05 * (1 + 1e-9)
    assert t == 0 or beyond(t - 1) > 0.05


def test_intervals_hold_together() -> None:
    """100 of 1,000 under key a, none under b: 95 % of 2,000 days are right everywhere; half the width fails."""
    rng = np.random.default_rng(1)
    scale = Fraction(20)
    noise = stats.dlaplace(1 / 20).rvs((2000, 3), random_state=rng)
    right = half = 0
    for d, a, b in noise.tolist():
        found = figures(YESTERDAY, ["a", "b"], [1000 + d, 100 + a, b], scale=scale, epsilon=0.1, level=LEVEL)
        rates = found["detectors"]
        right += all(rates[key]["low"] <= true <= rates[key]["high"] for key, true in (("a", 0.1), ("b", 0.0)))
        half += all(abs(one) <= found["half_width"] / 2 for one in (d, a, b))
        assert all(one["low"] <= one["rate"] <= one["high"] for one in rates.values())
    # 95 % of 2,000 is 1,900; 1,850 is five standard deviations below.
    assert right >= 1850
    assert half < 1850


def test_a_noisy_count_of_documents_below_zero_is_no_division() -> None:
    found = figures(YESTERDAY, ["a"], [-3, 2], scale=Fraction(2), epsilon=1.0, level=LEVEL)
    assert found["detectors"]["a"] == {"flagged": 2, "rate": None, "low": 0.0, "high": 1.0}


def test_the_budget_ends_and_nothing_is_drawn_for_free(service: Service) -> None:
    telemetry = service.telemetry("poor")
    telemetry.grant(0.3)
    days = [YESTERDAY - timedelta(days=back) for back in range(4)]
    for day in days[:3]:
        telemetry.publish(day, ["a"], epsilon=0.1, level=LEVEL)
    assert telemetry.standing().remaining == 0.0
    with pytest.raises(BudgetError):
        telemetry.publish(days[3], ["a"], epsilon=0.1, level=LEVEL)
    assert [one["day"] for one in telemetry.days()] == [day.isoformat() for day in sorted(days[:3])]
    with pytest.raises(ConflictError, match="the budget is set"):
        telemetry.grant(10.0)


def test_seeded_noise_is_refused_before_anything_is_spent(service: Service) -> None:
    telemetry = service.telemetry("seeded", SeededNoise(1))
    telemetry.grant(1.0)
    with pytest.raises(SeededNoiseError):
        telemetry.publish(YESTERDAY, ["a"], epsilon=0.1, level=LEVEL)
    assert telemetry.standing().spent == 0.0


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    app = create_app(Settings(data=tmp_path_factory.mktemp("http")))
    state = app.state.assay
    tokens = {
        name: create_api_key(state.sessions, tenant, scopes)[1]
        for name, tenant, scopes in (
            ("press", "press", ["admin"]),
            ("keeper", "press", ["detect", "embed", "keys"]),
            ("other", "other", ["admin"]),
        )
    }
    state.keys.create("press", GumbelConfig(), "mark")
    state.keys.create("press", Ed25519Config(), "sign")
    client = TestClient(app)

    def ask(who: str, method: str, path: str = "", **body: object):
        headers = {"authorization": f"Bearer {tokens[who]}"}
        return client.request(method, f"/v1/telemetry{path}", headers=headers, json=body if method != "GET" else None)

    return SimpleNamespace(ask=ask, state=state)


def test_over_http(http: SimpleNamespace) -> None:
    ask, day = http.ask, f"/days/{YESTERDAY}"
    assert ask("press", "GET").json() == {"budget": None, "days": []}
    assert ask("press", "POST", day).status_code == 409
    assert ask("press", "PUT", "/budget", epsilon=0.2).json() == {"epsilon": 0.2, "spent": 0.0, "remaining": 0.2}
    assert ask("press", "PUT", "/budget", epsilon=5).status_code == 409
    first = ask("press", "POST", day, epsilon=0.1)
    assert first.status_code == 200
    assert set(first.json()["detectors"]) == {"mark"}
    # Again: the same noise, and no cost.
    assert ask("press", "POST", day, epsilon=0.1).json() == first.json()
    seen = ask("press", "GET").json()
    assert seen["days"] == [first.json()]
    assert seen["budget"] == {"epsilon": 0.2, "spent": 0.1, "remaining": 0.1}
    assert ask("press", "POST", day, epsilon=0.05).status_code == 409
    before = YESTERDAY - timedelta(days=1)
    refused = ask("press", "POST", f"/days/{before}", epsilon=0.11)
    assert refused.status_code == 409
    assert "Nothing was spent" in refused.json()["detail"]
    assert ask("press", "POST", f"/days/{before}", epsilon=0.1).status_code == 200
    actions = [one.action for one in audit.events(http.state.sessions, "press", limit=1000)]
    assert actions.count("telemetry.budget") == 1
    assert "telemetry.publish" in actions


def test_days_that_are_not_over_wait(http: SimpleNamespace) -> None:
    for day in (datetime.now(UTC).date(), date(9999, 12, 31)):
        assert http.ask("press", "POST", f"/days/{day}").status_code == 409


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/days/not-a-day", {}),
        ("/days/0", {}),
        ("/days/20260101", {}),
        ("/days/2026-02-30", {}),
        (f"/days/{YESTERDAY}", {"epsilon": 0}),
        (f"/days/{YESTERDAY}", {"epsilon": -1}),
        (f"/days/{YESTERDAY}", {"epsilon": 1e9}),
        (f"/days/{YESTERDAY}", {"level": 0}),
        (f"/days/{YESTERDAY}", {"level": 1}),
        (f"/days/{YESTERDAY}", {"noise": "none"}),
    ],
)
def test_what_is_refused(http: SimpleNamespace, path: str, body: dict[str, object]) -> None:
    assert http.ask("press", "POST", path, **body).status_code == 422


def test_only_admins_and_only_their_own(http: SimpleNamespace) -> None:
    for method, path in (("GET", ""), ("PUT", "/budget"), ("POST", f"/days/{YESTERDAY}")):
        assert http.ask("keeper", method, path, epsilon=0.1).status_code == 403
    assert http.ask("other", "GET").json() == {"budget": None, "days": []}
    assert http.ask("other", "POST", f"/days/{YESTERDAY}").status_code == 409
