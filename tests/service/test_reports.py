"""/v1/reports: made from a finished job, signed, fetched byte for byte, verified; another tenant sees none of it."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
from fastapi.testclient import TestClient
from service_app import marked_text

from assay.report import Report, verify
from assay.service import audit, reports
from assay.service.app import create_app
from assay.service.auth import create_api_key
from assay.service.settings import Settings
from assay.service.worker import work
from assay.watermark import signing
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.signing import Ed25519Config

FILES = ("report.json", "report.html", "report.sig.json")


class Service:
    """A service with a finished and a waiting job of one tenant, and a signed report."""

    def __init__(self, data: Path, database_url: str | None = None) -> None:
        self.app = create_app(Settings(data=data, database_url=database_url))
        self.state = self.app.state.assay
        self.http = TestClient(self.app)
        self.headers = {}
        for name, tenant, scope in (
            ("press", "press", "admin"),
            ("keeper", "press", "keys"),
            ("reader", "press", "detect"),
            ("other", "other", "admin"),
        ):
            token = create_api_key(self.state.sessions, tenant, [scope])[1]
            self.headers[name] = {"authorization": f"Bearer {token}"}
        for tenant in ("press", "other"):
            self.state.keys.create(tenant, GumbelConfig(), f"mark-{tenant}")
            self.state.keys.create(tenant, Ed25519Config(), f"sign-{tenant}")
        self.text = marked_text(self.state.keys.key("press", "mark-press"), tokens=80, unmarked=b"report")
        lines = [{"text": self.text}, {"text": "We went to the shore and came back before it was dark. " * 2}]
        self.finished = self.submit(lines)
        work(self.state, once=True)
        self.waiting = self.submit(lines)
        self.signed = self.post("press", job_id=self.finished, sign_with="sign-press").json()

    def submit(self, lines: list[dict[str, str]]) -> str:
        content = b"\n".join(orjson.dumps(line) for line in lines)
        return self.http.post("/v1/jobs", content=content, headers=self.headers["press"]).json()["id"]

    def get(self, who: str, path: str = ""):
        return self.http.get(f"/v1/reports{path}", headers=self.headers[who])

    def post(self, who: str, path: str = "", **body: object):
        return self.http.post(f"/v1/reports{path}", json=body, headers=self.headers[who])

    def file(self, name: str) -> bytes:
        return self.get("press", f"/{self.signed['id']}/{name}").content


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(tmp_path_factory.mktemp("service"))


def test_a_signed_report_is_what_the_library_verifies(service: Service, tmp_path: Path) -> None:
    assert service.signed["signed"]
    assert service.signed["job_id"] == service.finished
    for name in FILES:
        (tmp_path / name).write_bytes(service.file(name))
    public = signing.public_key(service.state.keys.key("press", "sign-press"))
    found = verify(tmp_path, public)
    assert found.valid
    assert found.signer_checked
    assert found.key_id == "sign-press"
    report = Report.from_json((tmp_path / "report.json").read_bytes())
    assert (report.counts.documents, report.counts.flagged) == (2, 1)
    assert report.documents[0].excerpt is not None
    assert report.to_html().encode() == (tmp_path / "report.html").read_bytes()
    stored = str(service.state.settings.data)
    assert all(stored.encode() not in (tmp_path / name).read_bytes() for name in FILES)


def test_both_databases_hold_reports(database_url: str, tmp_path: Path) -> None:
    service = Service(tmp_path, database_url)
    content = service.get("press", f"/{service.signed['id']}/report.json").content
    assert reports.find(service.state.sessions, "press", service.signed["id"]).content == content
    assert service.get("press").json()["reports"] == [service.signed]
    service.state.guard.close()
    service.state.engine.dispose()


def test_files_come_with_safe_headers(service: Service) -> None:
    page = service.get("press", f"/{service.signed['id']}/report.html")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert re.search(r"style-src 'sha256-[\w+/=]{44}'", page.headers["content-security-policy"])
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    json = service.get("press", f"/{service.signed['id']}/report.json")
    assert json.headers["content-disposition"] == 'attachment; filename="report.json"'
    assert json.headers["x-content-type-options"] == "nosniff"


def test_verify_finds_every_change(service: Service) -> None:
    names = {"report_json": "report.json", "signature": "report.sig.json", "report_html": "report.html"}
    sent = {field: service.file(name).decode() for field, name in names.items()}
    public = signing.public_key(service.state.keys.key("press", "sign-press")).hex()
    stranger = signing.public_key(service.state.keys.key("other", "sign-other")).hex()
    # Anybody may check: another tenant, with the scope "detect" alone.
    for who in ("press", "reader", "other"):
        found = service.post(who, "/verify", **sent, public_key=public).json()
        assert found["valid"]
        assert found["signer_checked"]
        assert sorted(found["checked"]) == ["report.html", "report.json"]
    without_page = {name: text for name, text in sent.items() if name != "report_html"}
    found = service.post("reader", "/verify", **without_page).json()
    assert (found["valid"], found["signer_checked"], found["checked"]) == (True, False, ["report.json"])
    assert "integrity, not who signed" in found["sentence"]
    assert not service.post("reader", "/verify", **sent, public_key=stranger).json()["valid"]
    for field in names:
        text = sent[field]
        place = text.index("press") if "press" in text else len(text) // 2
        changed = text[:place] + ("q" if text[place] != "q" else "r") + text[place + 1 :]
        found = service.post("reader", "/verify", **{**sent, field: changed}, public_key=public).json()
        assert not found["valid"], field
        assert found["problems"]


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": "zz"},
        {"public_key": "00" * 31},
        {"report_json": 5},
        {"surprise": 1},
        {"signature": None},
    ],
)
def test_verify_refuses_other_forms(service: Service, change: dict[str, object]) -> None:
    sent = {"report_json": "{}", "signature": "{}", **change}
    assert service.post("reader", "/verify", **sent).status_code == 422


def test_verify_is_no_report(service: Service) -> None:
    answer = service.get("press", "/verify")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_verify_survives_nonsense(service: Service) -> None:
    for text in ("", "{}", "[" * 10_000, "null", '{"files":[{"name":"../../etc/passwd"}]}', "\x00"):
        answer = service.post("reader", "/verify", report_json=text, signature=text)
        assert answer.status_code == 200
        assert not answer.json()["valid"]


def test_unsigned_reports_and_reports_without_texts(service: Service) -> None:
    made = service.post("keeper", job_id=service.finished, excerpts=0, title="A & <b>").json()
    assert not made["signed"]
    assert service.get("keeper", f"/{made['id']}/report.sig.json").status_code == 404
    page = service.get("keeper", f"/{made['id']}/report.html").text
    assert "A &amp; &lt;b&gt;" in page
    assert service.text[:40] not in page
    assert service.text[:40] not in service.get("keeper", f"/{made['id']}/report.json").text
    listed = service.get("keeper").json()["reports"]
    assert {made["id"], service.signed["id"]} <= {one["id"] for one in listed}
    assert service.get("keeper", f"/{made['id']}").json() == made


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"job_id": "job-" + "0" * 24}, 404),
        ({"job_id": "nonsense"}, 422),
        ({"job_id": "FINISHED", "sign_with": "mark-press"}, 422),
        ({"job_id": "FINISHED", "sign_with": "sign-other"}, 404),
        ({"job_id": "FINISHED", "excerpts": 51}, 422),
        ({"job_id": "FINISHED", "title": ""}, 422),
        ({"job_id": "WAITING"}, 409),
    ],
)
def test_what_cannot_be_reported(service: Service, body: dict[str, object], status: int) -> None:
    jobs = {"FINISHED": service.finished, "WAITING": service.waiting}
    before = len(list((service.state.settings.data / "reports").iterdir()))
    answer = service.post("press", **{**body, "job_id": jobs.get(str(body["job_id"]), body["job_id"])})
    assert answer.status_code == status
    assert len(list((service.state.settings.data / "reports").iterdir())) == before, "half a report was left"


def test_a_retired_signing_key_signs_nothing(service: Service) -> None:
    service.state.keys.create("press", Ed25519Config(), "old-signer")
    service.state.keys.revoke("press", "old-signer")
    before = len(service.get("press").json()["reports"])
    assert service.post("press", job_id=service.finished, sign_with="old-signer").status_code == 409
    assert len(service.get("press").json()["reports"]) == before


def test_reports_belong_to_their_tenant_and_need_the_scope(service: Service) -> None:
    paths = ["", *(f"/{service.signed['id']}{rest}" for rest in ("", *(f"/{name}" for name in FILES)))]
    for path in paths:
        assert service.get("reader", path).status_code == 403
        assert service.http.get(f"/v1/reports{path}").status_code == 401
    assert service.get("other").json() == {"reports": []}
    for path in paths[1:]:
        assert service.get("other", path).status_code == 404
    assert service.post("other", job_id=service.finished).status_code == 404
    assert service.post("reader", job_id=service.finished).status_code == 403
    for bad in ("/../../x", f"/{service.signed['id']}/..%2f..%2fassay.db", f"/{service.signed['id']}/other"):
        assert service.get("press", bad).status_code in (404, 422)


def test_no_report_without_its_entry_in_the_audit_log(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row and entry are one transaction: what cannot be entered was not made."""

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    before = service.get("press").json()
    files = sorted((service.state.settings.data / "reports").iterdir())
    monkeypatch.setattr(audit, "event", broken)
    assert service.post("press", job_id=service.finished, sign_with="sign-press").status_code == 500
    assert service.get("press").json() == before
    assert sorted((service.state.settings.data / "reports").iterdir()) == files


def test_the_audit_log_says_who_made_and_signed(service: Service) -> None:
    events = [
        one for one in audit.events(service.state.sessions, "press", limit=1000) if one.action == "reports.create"
    ]
    assert events[0].subject == service.signed["id"]
    assert events[0].detail == {"job": service.finished, "signed_with": "sign-press"}
