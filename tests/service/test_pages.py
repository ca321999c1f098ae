"""The web page: log in, test a text, jobs, reports; without scripts, under its own policy, in a real browser."""

from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote_from_bytes

import httpx
import numpy as np
import orjson
import pytest
import uvicorn
from chromium import CHROMIUM, Chromium
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from service_app import marked_text

from assay.service.accounts import Charge
from assay.service.app import create_app
from assay.service.auth import create_api_key, revoke_api_key
from assay.service.pages import render, verdict
from assay.service.pages.sessions import WebSessions, form_token
from assay.service.routes import pages as pages_route
from assay.service.settings import Settings
from assay.service.worker import work
from assay.watermark.gumbel import GumbelConfig

PLAIN = (
    "Dear editor, thank you for your letter of last week. I have read the proofs with care and found three slips on "
    "the second page, which I have marked in red. The map at the end is upside down. My brother adds this account of "
    "our walk along the shore, and sends his regards to your sister, whose drawings of the harbour we admired. "
)
HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7*7 }} \u202eevil \x07 &amp; </div></main>' + PLAIN
)


class Service:
    """A service with two tenants, a key and marked text."""

    def __init__(self, data: Path) -> None:
        self.app = create_app(Settings(data=data))
        self.state = self.app.state.assay
        self.tokens = {}
        for tenant, scopes in (("press", ["admin"]), ("reader", ["detect"]), ("other", ["admin"])):
            _, self.tokens[tenant] = create_api_key(self.state.sessions, tenant, scopes)
            self.state.keys.create(tenant, GumbelConfig(), f"key-{tenant}")
        _, self.tokens["guest"] = create_api_key(self.state.sessions, "press", ["detect"])
        self.key = self.state.keys.key("press", "key-press")
        self.marked = marked_text(self.key, tokens=120, unmarked=b"page")

    def browser(self, who: str | None = "press") -> Browser:
        found = Browser(TestClient(self.app, base_url="https://testserver", follow_redirects=False))
        if who is not None:
            assert found.login(self.tokens[who]).status_code == 303
        return found


class Browser:
    """A client that fills in the forms it was shown."""

    form = ""

    def __init__(self, client: TestClient | httpx.Client) -> None:
        self.client = client

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def token(self, path: str = "/") -> str:
        found = re.search(r'name="form_token" value="([0-9a-f]{64})"', self.client.get(path).text)
        assert found is not None
        return found.group(1)

    def login(self, api_key: str) -> httpx.Response:
        return self.client.post("/login", data={"api_key": api_key, "form_token": self.token()})

    def post(self, path: str, **fields: str) -> httpx.Response:
        return self.client.post(path, data={"form_token": self.token(), **fields})

    def test(self, text: str = "", file: bytes | None = None, **fields: str) -> httpx.Response:
        files = {"file": ("a.txt", file, "text/plain")} if file is not None else {"file": ("", b"")}
        data = {"form_token": self.token(), "text": text, **fields}
        return self.client.post("/test", data=data, files=files)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service"))
    yield made
    made.state.engine.dispose()


@pytest.fixture(scope="module")
def opened(service: Service) -> Browser:
    """Logged in, with a form that was loaded once."""
    found = service.browser()
    found.form = found.token()
    return found


class Elements(HTMLParser):
    """Elements with attributes; nesting checked."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def accessible(source: str) -> Elements:
    """The page, after checking what keyboard and screen-reader users need, and that nothing in it can run."""
    page = Elements(source)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("title")) == 1
    assert page.all("a")[0] == {"class": "skip", "href": "#main"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for attributes in page.all("label")}
    for tag, attributes in page.elements:
        if tag in ("textarea", "select") or (tag == "input" and attributes.get("type") != "hidden"):
            assert attributes["id"] in labelled, attributes
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids), attributes
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert not {"script", "style", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.elements}
    return page


def test_visitor_sees_the_login_and_nothing_else(service: Service) -> None:
    visitor = service.browser(None)
    answer = visitor.get("/")
    assert answer.status_code == 200
    accessible(answer.text)
    assert "API key" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    for path in ("/jobs", "/reports", f"/reports/report-{'0' * 24}"):
        answer = visitor.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert visitor.client.post("/test", data={"text": "x"}).status_code == 303


def test_cookies_are_strict_and_hold_no_api_key(service: Service) -> None:
    browser = service.browser(None)
    answer = browser.login(service.tokens["press"])
    cookie = next(one for one in answer.headers.get_list("set-cookie") if one.startswith("assay_session="))
    for part in ("HttpOnly", "SameSite=strict", "Secure", "Max-Age=28800"):
        assert part in cookie
    secret = service.tokens["press"].rsplit("_", 1)[1]
    pages = [browser.get(path).text for path in ("/", "/jobs", "/reports")] + [browser.test(service.marked).text]
    assert not any(secret in text or secret in cookie for text in pages)
    kept = [path.read_text() for path in (service.state.settings.data / "web-sessions").iterdir()]
    assert kept
    token = cookie.split("=", 1)[1].split(";")[0]
    assert not any(secret in text or token in text for text in kept)


def test_wrong_keys_are_refused_alike(service: Service) -> None:
    right = service.tokens["press"]
    answers = set()
    for wrong in ("", "nonsense", right[:-4] + "AAAA", "assay_" + "a" * 16 + "_" + "A" * 43, "\ud7ff" * 300):
        answer = service.browser(None).login(wrong)
        assert answer.status_code == 401
        assert not any("assay_session" in one for one in answer.headers.get_list("set-cookie"))
        answers.add(re.sub(r'value="\w+"', "", answer.text))
    assert len(answers) == 1
    accessible(answer.text)
    assert service.browser(None).login(f"  {right}\n").status_code == 303


def test_forms_need_the_token_of_this_browser(service: Service) -> None:
    browser, another = service.browser(), service.browser()
    cases = [None, "", "0" * 64, another.token(), "é" * 64]
    for path in ("/test", "/jobs", "/logout", f"/jobs/job-{'0' * 24}/report"):
        for token in cases:
            data = {"text": PLAIN} | ({} if token is None else {"form_token": token})
            answer = browser.client.post(path, data=data)
            assert answer.status_code == 403, (path, token)
    # A request that another site started is refused even with the right token.
    data = {"text": PLAIN, "form_token": browser.token()}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        assert browser.client.post("/test", data=data, headers={"sec-fetch-site": site}).status_code == status
    visitor = service.browser(None)
    login = {"api_key": service.tokens["press"], "form_token": form_token("x" * 43)}
    assert visitor.client.post("/login", data=login).status_code == 403


def test_logout_ends_the_session_on_the_server(service: Service) -> None:
    browser = service.browser()
    stolen = browser.client.cookies["assay_session"]
    assert browser.post("/logout").status_code == 303
    thief = service.browser(None)
    thief.client.cookies.set("assay_session", stolen)
    assert thief.get("/jobs").status_code == 303


def test_sessions_end_with_time_and_with_the_api_key(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = WebSessions(service.state.settings.data / "some", service.state.sessions)
    id, token = create_api_key(service.state.sessions, "press", ["detect"])
    caller = service.state.authenticator.caller(token)
    session = sessions.begin(caller)
    assert sessions.caller(session) == caller
    assert sessions.caller("../" + session[3:]) is None
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 8 * 3600 + 1)
        assert sessions.caller(session) is None
        sessions.begin(caller)
    assert len(list((service.state.settings.data / "some").iterdir())) == 1
    session = sessions.begin(caller)
    assert sessions.caller(session) == caller
    revoke_api_key(service.state.sessions, "press", id)
    assert sessions.caller(session) is None


def test_verdict_on_a_marked_passage_in_a_book(service: Service, human_text: str) -> None:
    before, after = human_text[20_000:22_000], human_text[40_000:42_000]
    answer = service.browser().test(f"{before} {service.marked} {after}")
    assert answer.status_code == 200
    page = accessible(answer.text)
    assert "Very strong evidence of a mark" in answer.text
    assert re.search(r"p-value\s+[\d.]+&#8239;&times;&#8239;10<sup>", answer.text)
    assert "key-press" in page.text
    assert "What this does not mean" in page.text
    status = next(attributes for _, attributes in page.elements if attributes.get("role") == "status")
    assert status["aria-live"] == "polite"
    assert "autofocus" in page.all("h1")[0]
    shown = re.search(r'<div class="text"[^>]*>(.*?)</div>', answer.text, re.DOTALL)
    assert shown is not None
    # Most of the passage is highlighted, most of the book is not.
    marks = html.unescape(" ".join(re.findall(r"<mark>.*?</span>(.*?)<span.*?</mark>", shown.group(1), re.DOTALL)))
    inside = set(service.marked.split())
    outside = set(f"{before} {after}".split()) - inside
    assert len(inside & set(marks.split())) > 0.7 * len(inside)
    assert len(outside & set(marks.split())) < 0.25 * len(outside)


def test_plain_text_shows_no_mark_and_what_that_does_not_mean(service: Service) -> None:
    answer = service.browser().test(PLAIN)
    assert "No evidence of a mark" in answer.text
    assert "does not say that a person wrote the text" in answer.text
    assert 'class="text"' in answer.text
    assert "<mark>" not in answer.text
    answer = service.browser().test("Hi")
    assert "Nothing could be tested" in answer.text
    assert "p-value" not in answer.text.split("<h2", 1)[0]


def test_line_ends_of_a_text_area_do_not_change_the_text(service: Service) -> None:
    words = service.marked.split()
    lines = "\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9))
    browser = service.browser()
    number = re.compile(r'<p class="number">(.*?)</p>', re.DOTALL)
    pasted = number.findall(browser.test(lines.replace("\n", "\r\n")).text)
    uploaded = number.findall(browser.test(file=lines.encode()).text)
    assert pasted == uploaded
    assert pasted
    # As they come in a file, the other line ends are another text.
    assert number.findall(browser.test(file=lines.replace("\n", "\r\n").encode()).text) != uploaded


def test_hostile_text_stays_text(service: Service) -> None:
    answer = service.browser().test(HOSTILE)
    assert answer.status_code == 200
    page = accessible(answer.text)
    for shown in ("<script>alert(1)</script>", "{{ 7*7 }}", "[U+202E]", "[U+0007]", "&amp;"):
        assert shown in page.text


@pytest.mark.parametrize(
    ("text", "file", "words"),
    [
        ("", None, "one of the two"),
        ("a text", b"and a file", "one of the two"),
        (" \r\n ", None, "one of the two"),
        ("", b"\xff\xfe bad", "UTF-8"),
        ("x" * 1_000_001, None, "at most 1000000 characters"),
    ],
)
def test_what_cannot_be_tested_says_why(service: Service, text: str, file: bytes | None, words: str) -> None:
    answer = service.browser().test(text, file)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert words in accessible(answer.text).text


@given(
    content=st.one_of(
        st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(alphabet=st.characters(categories=["Cs", "Cc", "Cf", "Mn", "Lo", "Zs"])).map(
            lambda text: text.encode("utf-8", "surrogatepass")
        ),
        st.binary(),
    ),
    kind=st.sampled_from(["file", "multipart", "urlencoded"]),
)
@example(b"\x00", "file")
@example(b"\xed\xa0\x80 lone surrogate", "multipart")
@example(b"\xed\xa0\x80 lone surrogate", "urlencoded")
@example("\u202e\u05d0".encode() * 50, "multipart")
@example(b"--b--\r\n", "multipart")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_form_is_answered(opened: Browser, content: bytes, kind: str) -> None:
    """A verdict, or a page that says what is wrong: whatever is pasted or uploaded, also bytes that are no text."""
    token = opened.form
    if kind == "urlencoded":
        body = b"form_token=" + token.encode() + b"&text=" + quote_from_bytes(content).encode()
        sent = "application/x-www-form-urlencoded"
    else:
        named = b'name="file"; filename="a.txt"' if kind == "file" else b'name="text"'
        head = b'--b\r\nContent-Disposition: form-data; name="form_token"\r\n\r\n' + token.encode()
        body = head + b"\r\n--b\r\nContent-Disposition: form-data; " + named + b"\r\n\r\n" + content + b"\r\n--b--\r\n"
        sent = "multipart/form-data; boundary=b"
    answer = opened.client.post("/test", content=body, headers={"content-type": sent})
    assert answer.status_code in (200, 422), answer.text
    accessible(answer.text)


def test_a_key_can_be_chosen_but_not_another_tenants(service: Service) -> None:
    browser = service.browser()
    assert "key-press" in browser.get("/").text
    assert "key-other" not in browser.get("/").text
    assert "Very strong" in browser.test(service.marked, key="key-press").text
    answer = browser.test(service.marked, key="key-other")
    assert answer.status_code == 404
    accessible(answer.text)
    answer = browser.test(service.marked, key="../no-key-at-all")
    assert answer.status_code == 422
    assert "no-key-at-all" not in answer.text


def test_a_stranger_cannot_make_it_decode_megabytes(service: Service) -> None:
    """A field in percent signs takes seconds to decode, on the event loop: other forms than uploads are small."""
    stranger = service.browser(None)
    typed = {"content-type": "application/x-www-form-urlencoded"}
    token = f"form_token={stranger.token()}&api_key={service.tokens['press']}&more="
    for size, status in ((1000, 303), (100_000, 413)):
        answer = stranger.client.post("/login", content=token + "%41" * (size // 3), headers=typed)
        assert answer.status_code == status
    # A form with a file may be large, and is not decoded.
    assert service.browser().test("", file=b"word " * 100_000).status_code == 200


def test_logins_are_counted_as_requests(tmp_path: Path) -> None:
    app = create_app(Settings(data=tmp_path, requests_per_second=0.001, burst=2))
    _, token = create_api_key(app.state.assay.sessions, "press", ["admin"])
    client = TestClient(app, base_url="https://testserver", follow_redirects=False)
    statuses = []
    for _ in range(4):
        client.cookies.clear()
        statuses.append(Browser(client).login(token).status_code)
    assert statuses == [303, 303, 429, 429]
    assert len(list((tmp_path / "web-sessions").iterdir())) == 2
    app.state.assay.engine.dispose()


def test_forms_that_are_no_text(service: Service) -> None:
    browser = service.browser()
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    head = part % (b"form_token", browser.token().encode())
    for body, status in (
        (head + b"".join(part % (b"f%d" % i, b"x") for i in range(20)) + b"--b--\r\n", 400),
        (b"nonsense", 400),
        (b"", 403),
    ):
        answer = browser.client.post("/test", content=body, headers=boundary)
        assert answer.status_code == status, body
        accessible(answer.text)
    assert browser.client.post("/test", content=b"x" * (9 * 2**20)).status_code == 413


def test_readers_see_rounded_evidence_and_pay_for_parts(service: Service) -> None:
    answer = service.browser("guest").test(service.marked)
    assert "at most 1.0&#8239;&times;&#8239;10<sup>\u22129</sup>" in answer.text
    assert "rounded up" in answer.text
    assert "<select" not in service.browser("guest").get("/").text
    guard = service.state.guard
    caller = service.state.authenticator.caller(service.tokens["guest"])
    most = service.state.settings.detections_per_key_per_day
    assert guard.charge_all([Charge(caller, ("key-press",), most - 2, "detect")]) == [True]
    assert guard.charge_all([Charge(caller, ("key-press",), 1, "detect")]) == [False], "a test with its parts costs two"
    assert service.browser("guest").test(service.marked).status_code == 429
    for path in ("/reports", f"/reports/report-{'0' * 24}"):
        assert service.browser("guest").get(path).status_code == 403


def test_jobs_and_reports_are_shown_and_belong_to_their_tenant(service: Service) -> None:
    lines = [
        orjson.dumps({"text": service.marked, "id": "<b>marked</b>"}),
        orjson.dumps({"text": PLAIN, "id": "plain"}),
    ]
    header = {"authorization": f"Bearer {service.tokens['press']}"}
    browser = service.browser()
    sent = browser.client.post("/v1/jobs?id_column=id", content=b"\n".join(lines), headers=header)
    job = sent.json()["id"]
    queued = browser.get("/jobs").text
    assert "queued" in queued
    assert "Make a report" not in queued
    assert work(service.state, once=True) == 1
    shown = accessible(browser.get("/jobs").text)
    assert "finished" in shown.text
    assert job in shown.text
    made = browser.post(f"/jobs/{job}/report")
    assert made.status_code == 303
    path = made.headers["location"]
    report = browser.get(path)
    assert report.status_code == 200
    assert "<b>marked</b>" not in report.text
    assert "&lt;b&gt;marked" in report.text
    assert str(service.state.settings.data) not in report.text
    assert "style-src 'sha256-" in report.headers["content-security-policy"]
    assert browser.get(f"{path}/report.json").json()["counts"]["documents"] == 2
    assert browser.get(f"{path}/report.sig.json").status_code == 404
    for page in ("/jobs", "/reports"):
        assert path in accessible(browser.get(page).text).all("a")[-1]["href"] or path in browser.get(page).text
    stranger = service.browser("other")
    for page in ("/jobs", "/reports"):
        text = stranger.get(page).text
        assert job not in text
        assert path not in text
    for answer in (stranger.get(path), stranger.get(f"{path}/report.json"), stranger.post(f"/jobs/{job}/report")):
        assert answer.status_code == 404
        accessible(answer.text)
    assert "http-equiv" not in browser.get("/jobs").text
    assert '<meta http-equiv="refresh" content="5">' in browser.get("/jobs?refresh=on").text
    assert service.browser().get("/reports/../../etc/passwd").status_code == 404


def test_a_corpus_from_the_page_becomes_a_job(service: Service) -> None:
    browser = service.browser()
    page = browser.get("/jobs").text
    once = re.search(r'name="once" value="(\w+)"', page)
    assert once is not None
    accessible(page)
    corpus = b"\n".join(orjson.dumps({"text": text, "name": f"doc-{i}"}) for i, text in enumerate((PLAIN, "other")))

    def send(content: bytes, once: str) -> httpx.Response:
        data = {"form_token": browser.token("/jobs"), "id_column": " name ", "once": once}
        return browser.client.post("/jobs", data=data, files={"corpus": ("c.jsonl", content, "text/plain")})

    def ids() -> list[str]:
        header = {"authorization": f"Bearer {service.tokens['press']}"}
        return [one["id"] for one in browser.client.get("/v1/jobs", headers=header).json()["jobs"]]

    before = ids()
    for content, form, new in ((corpus, "a", 1), (corpus, "a", 1), (corpus + b"\n", "a", 2), (corpus, "b", 3)):
        answer = send(content, form)  # a form that is sent twice makes one job
        assert (answer.status_code, answer.headers["location"]) == (303, "/jobs")
        assert len(ids()) == len(before) + new
    job = next(one for one in ids() if one not in before)
    work(service.state, once=True)
    header = {"authorization": f"Bearer {service.tokens['press']}"}
    found = browser.client.get(f"/v1/jobs/{job}/results", headers=header).text.splitlines()
    assert [orjson.loads(line)["doc_id"] for line in found] == ["doc-0", "doc-1"]
    assert job in browser.get("/jobs").text
    assert job not in service.browser("other").get("/jobs").text
    assert 'name="corpus"' not in browser.get("/jobs?refresh=on").text  # loading anew would empty the form


def test_a_corpus_that_cannot_be_taken_says_why(service: Service) -> None:
    browser, guest = service.browser(), service.browser("guest")
    folders = service.state.settings.data / "jobs"
    before = sorted(folders.iterdir()) if folders.exists() else []

    def send(who: Browser, content: bytes, id_column: str = "") -> httpx.Response:
        data = {"form_token": who.token("/jobs"), "id_column": id_column, "once": "x"}
        return who.client.post("/jobs", data=data, files={"corpus": ("c.jsonl", content, "text/plain")})

    for content, id_column in ((b"", ""), (b" \n ", ""), (b"{}", "\x07"), (b"{}", "x" * 65)):
        answer = send(browser, content, id_column)
        assert answer.status_code == 422
        assert 'role="alert"' in answer.text
        accessible(answer.text)
    assert (
        browser.client.post("/jobs", data={"form_token": browser.token("/jobs"), "corpus": "text"}).status_code == 422
    )
    answer = send(guest, b'{"text": "a"}\n' * (service.state.settings.detections_per_key_per_day + 1))
    assert answer.status_code == 429  # a corpus is no way around the budget
    accessible(answer.text)
    assert send(browser, b"x" * (9 * 2**20)).status_code == 413
    _, writer = create_api_key(service.state.sessions, "press", ["embed"])
    embeds = service.browser(None)
    embeds.login(writer)
    data = {"form_token": embeds.token("/"), "once": "x"}
    assert embeds.client.post("/jobs", data=data, files={"corpus": ("c", b"{}")}).status_code == 403
    assert (sorted(folders.iterdir()) if folders.exists() else []) == before


# What a stranger who knows the ids gets. A route that is not here fails the test below.
STRANGERS: dict[tuple[str, str], int] = {
    ("GET", "/"): 200,
    ("GET", "/static/page.css"): 200,
    ("GET", "/jobs"): 200,
    ("GET", "/reports"): 200,
    ("POST", "/login"): 403,  # the form's token is that of a visitor
    ("POST", "/test"): 404,
    ("POST", "/jobs"): 422,
    ("POST", "/jobs/{id}/report"): 404,
    ("GET", "/reports/{id}"): 404,
    ("GET", "/reports/{id}/{name}"): 404,
    ("POST", "/logout"): 303,
}


def test_no_page_shows_another_tenant_s_things(service: Service) -> None:
    """Every route of the page, called with the ids of another tenant."""
    header = {"authorization": f"Bearer {service.tokens['press']}"}
    line = orjson.dumps({"text": PLAIN, "id": "secret-document"})
    job = service.browser().client.post("/v1/jobs?id_column=id", content=line, headers=header).json()["id"]
    work(service.state, once=True)
    report = service.browser().post(f"/jobs/{job}/report").headers["location"].rsplit("/", 1)[1]
    routes = {(method, one.path) for one in pages_route.router.routes for method in one.methods}
    assert routes == STRANGERS.keys(), "say in STRANGERS what a stranger gets"
    stranger = service.browser("other")
    for (method, path), status in sorted(STRANGERS.items(), key=lambda one: one[0][1] == "/logout"):
        url = path.replace("{id}", job if path.startswith("/jobs") else report).replace("{name}", "report.json")
        data = {"form_token": stranger.token(), "text": PLAIN, "key": "key-press"} if method == "POST" else None
        answer = stranger.client.request(method, url, data=data)
        assert answer.status_code == status, (method, path, answer.text)
        for hidden in (job, report, "key-press", "secret-document"):
            assert hidden not in answer.text or hidden in url or status == 404, (method, path)


def test_headline_steps() -> None:
    steps = {-50.0: 3, np.log(1e-6): 3, np.log(2e-6): 2, np.log(1e-3): 2, np.log(1e-2): 1, np.log(0.011): 0, 0.0: 0}
    assert {log_p: verdict.headline(log_p, 9)[0] for log_p in steps} == steps
    assert verdict.headline(-50.0, 0) == (0, "Nothing could be tested")


def test_pieces_hold_the_whole_text_once() -> None:
    text = "one two three four"
    cut = verdict.pieces(text, [(0, 3), (4, 7), (6, 13)])
    assert "".join(str(piece.html) for piece in cut) == text
    assert [str(piece.html) for piece in cut if piece.marked] == ["one", "two", " three"]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark() -> None:
    css = render.style()[0].decode()
    palettes = re.findall(r":root {([^}]*--paper[^}]*)}", css)
    assert len(palettes) == 2
    for palette in palettes:
        c = dict(re.findall(r"--([\w-]+): (#\w{6})", palette))
        inks = ("ink", "muted", "accent", "bad", "step0", "step1", "step2", "step3")
        pairs = [(ink, paper, 4.5) for ink in inks for paper in ("paper", "card")]
        # Edges of controls need 3 to 1.
        pairs += [("ink", "hit", 4.5), ("on-accent", "accent", 4.5), ("edge", "paper", 3.0), ("edge", "card", 3.0)]
        for ink, paper, least in pairs:
            light, dark = sorted((luminance(c[ink]), luminance(c[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (ink, paper)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    """The service behind a real socket."""
    server = uvicorn.Server(uvicorn.Config(service.app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed, so no page is used in a browser"
)


@NEEDS_BROWSER
@pytest.mark.parametrize("scripts", [False, True], ids=["without JavaScript", "with JavaScript"])
def test_by_keyboard_in_a_real_browser(service: Service, address: str, tmp_path: Path, scripts: bool) -> None:
    with Chromium(tmp_path / "profile", scripts=scripts) as browser:
        browser.open(f"{address}/")
        assert browser.tab_to("button Log in")[:3] == ["a Skip to the content", "a Assay", "input api_key"]
        browser.press("Tab", shift=True)
        browser.type(service.tokens["press"])
        browser.press("Enter")
        browser.wait("Test a text")
        order = browser.tab_to("textarea text")
        assert order[0] == "a Skip to the content"
        # Whoever uses the keyboard sees where they are.
        assert browser.value("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        browser.type(service.marked)
        assert browser.tab_to("button Test") == ["input file", "select key", "button Test"]
        browser.press("Enter")
        browser.wait("Very strong evidence of a mark")
        assert browser.focused() == "h1 verdict"
        spoken = browser.spoken()
        status = next(properties for role, _, properties in spoken if role == "status")
        assert status["live"] == "polite"
        assert status["atomic"] is True
        roles = {role for role, _, _ in spoken}
        assert {"banner", "navigation", "main", "contentinfo", "heading", "status", "mark"} <= roles
        assert not [one for one in spoken if one[0] in ("button", "link", "textbox", "combobox") and not one[1]]
        # The style sheet was admitted: highlighted words have its colour, and the log has no complaint.
        assert browser.value("getComputedStyle(document.querySelector('mark')).backgroundColor") == "rgb(250, 224, 156)"
        assert browser.value("document.cookie") == ""
        browser.tab_to("a Test another text")
        browser.press("Enter")
        browser.wait("Test a text")
        browser.tab_to("a Jobs")
        browser.press("Enter")
        browser.wait("Jobs")
        browser.tab_to("input corpus")
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_bytes(orjson.dumps({"text": service.marked}))
        chosen = browser.send("Runtime.evaluate", expression="document.activeElement")["result"]["objectId"]
        browser.send("DOM.setFileInputFiles", files=[str(corpus)], objectId=chosen)
        before = browser.value("document.querySelectorAll('tbody tr').length")
        assert browser.tab_to("button Start the job") == ["input id_column", "button Start the job"]
        browser.press("Enter")
        browser.until(f"document.querySelectorAll('tbody tr').length === {before + 1}")
        browser.wait("Jobs")
        assert not [one for one in browser.spoken() if one[0] in ("button", "link", "textbox") and not one[1]]
        browser.tab_to("button Log out")
        browser.press("Enter")
        browser.wait("Log in")
        assert browser.log == []


@NEEDS_BROWSER
def test_the_policy_stops_a_smuggled_script(
    service: Service, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The near-miss: a page that does not escape. The browser refuses the script and says so.
    bad = "<title>bad</title><script>document.title='x'</script>"
    monkeypatch.setattr(pages_route, "page", lambda name, **_: bad)
    with Chromium(tmp_path / "profile") as browser:
        browser.open(f"{address}/")
        assert browser.value("document.title") == "bad"
        assert any("Content Security Policy" in line for line in browser.log)
