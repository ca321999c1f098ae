"""report.html: self-contained, inert, escaped, accessible, the same bytes each time."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from assay.detection.result import TestResult
from assay.report import Excerpt, InputFile, RejectReason, Report, render
from assay.report.records import TokenizerRecord

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "</title></svg><svg onload=alert(5)>",
    "{{ 7*7 }}{% raw %}",
    "$\\frac{1}{2}$ & &amp; &#60;",
    "javascript:alert(6) http://evil.example/ //evil.example/x",
    "abc\u202egnp.exe \u2066x\u2069 \u200fy",
    "nul\x00 bell\x07 esc\x1b[31m cr\r nel\x85 del\x7f",
    "line\u2028para\u2029 bom\ufeff tag\U000e0041 vs\ufe01\U000e0101 private\ue000 non\uffff",
    "lone \ud800 and \udfff",
    "<!-- --> ]]> <![CDATA[",
    "日本語 العربية עברית 👩\u200d🚀",
)


class Page(HTMLParser):
    """Elements with their attributes, nesting checked as the HTML standard wants it, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.titles: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment {data!r}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def result(log_pvalue: float = -40.0) -> TestResult:
    return TestResult(
        test="<b>gumbel</b>",
        statistic=9.0,
        log_pvalue=log_pvalue,
        log_evalue=3.0,
        n_tokens=90,
        n_scored=80,
        null="no <i>key</i>",
        alternative="greater",
        key_id="k",
        scheme="gumbel/1",
        assumptions=("assumed <u>this</u>",),
    )


def hostile_report() -> Report:
    rows = [(text, text, result(-40.0 - i)) for i, text in enumerate(HOSTILE)]
    tails = (-1.0, -9.0, -2.0, None)
    excerpts = [Excerpt(doc_id=text, pieces=(text, "x" * 1_000_000, "", "\n"), log_tail=tails) for text in HOSTILE]
    return Report.from_results(
        rows,
        title=HOSTILE[1],
        excerpts=excerpts,
        inputs=[InputFile(name=text, sha256=None, size=None) for text in HOSTILE],
        rejects=[RejectReason(reason=text, rows=1) for text in HOSTILE],
        tokenizer=TokenizerRecord(name=HOSTILE[0], sha256="00"),
    )


def inert(html: str) -> Page:
    """The page, after checking that it can do nothing and fetches nothing."""
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "form", "input", "base", "foreignobject", "image"}
    )
    assert len(page.all("style")) == 1
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "src", "srcset", "action", "xlink:href"), (tag, name)
            if name == "href":
                assert re.fullmatch(r"#[\w-]+", value or ""), value
            if "url(" in (value or ""):
                assert re.fullmatch(r"url\(#[\w-]+\)", value or ""), value
    css = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert css is not None
    assert not re.search(r"url\(|@import|expression|//", css.group(1))
    digest = base64.b64encode(hashlib.sha256(css.group(1).encode()).digest()).decode()
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    # The policy stands before everything that it governs.
    assert html.index("Content-Security-Policy") < html.index("<style>")
    return page


def test_page_is_inert_and_well_formed(any_report: Report) -> None:
    inert(any_report.to_html())
    inert(Report.from_results([]).to_html())


def test_no_link_leads_out_of_the_page(any_report: Report) -> None:
    html = any_report.to_html()
    assert "://" not in html
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in page.elements if a.get("href")}
    targets |= set(re.findall(r"url\(#([\w-]+)\)", html))
    targets |= {one for _, a in page.elements for one in (a.get("aria-labelledby") or "").split()}
    assert targets
    assert targets <= set(ids)


def test_hostile_documents_stay_text() -> None:
    report = hostile_report()
    html = report.to_html()
    page = inert(html)
    # As many elements as the same report with harmless words, plus one for each character written out.
    written_out = len([a for a in page.all("span") if a.get("class") == "ctrl"])
    assert written_out > 100
    tame = Report.from_results(
        [(f"d{i:02}", f"s{i:02}", result(-40.0 - i)) for i in range(len(HOSTILE))],
        title="x",
        excerpts=[
            Excerpt(doc_id=f"d{i:02}", pieces=("a", "b", "", "\n"), log_tail=(-1.0, -9.0, -2.0, None))
            for i in range(len(HOSTILE))
        ],
        inputs=[InputFile(name="n", sha256=None, size=None)] * len(HOSTILE),
        rejects=[RejectReason(reason="r", rows=1)] * len(HOSTILE),
        tokenizer=TokenizerRecord(name="t", sha256="00"),
    )
    plain = Page(tame.to_html())
    dots = len([a for a in plain.all("span") if a.get("class") == "ctrl"])
    assert len(page.elements) - written_out == len(plain.elements) - dots
    text = "".join(page.text)
    for shown in (HOSTILE[0], "{{ 7*7 }}{% raw %}", "assumed <u>this</u>", "[U+202E]", "[U+0000]", "\\ud800"):
        assert shown in text
    assert "<script" not in html.lower()


def test_no_character_that_hides_or_reorders_text_reaches_the_page() -> None:
    html = hostile_report().to_html()
    forbidden = re.compile(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2060-\u206f\u200b\u200e\u200f\ufeff\ue000\uffff\ufe01\ud800-\udfff]"
    )
    assert forbidden.search(html) is None
    html.encode("utf-8")
    assert "👩\u200d🚀" in html


def test_a_megabyte_token_does_not_make_a_megabyte_page() -> None:
    report = hostile_report()
    assert len(report.to_html()) < 300_000
    assert len(report.to_json()) < 100_000


def test_without_excerpts_no_document_text_is_in_any_form(synthetic) -> None:
    shown = synthetic.report(excerpts=[synthetic.excerpts[row[0]] for row in synthetic.results])
    assert b"secretword" in shown.to_json()
    assert "secretword" in shown.to_html()
    hidden = synthetic.report()
    assert b"secretword" not in hidden.to_json()
    assert "secretword" not in hidden.to_html()
    assert "This report holds no text of any document." in hidden.to_html()
    assert all(document.excerpt is None for document in hidden.documents)


def test_no_secret_is_in_the_report(synthetic) -> None:
    for text in (synthetic.report().to_html(), synthetic.report().to_json().decode()):
        assert synthetic.key._secret.hex() not in text
        assert synthetic.key.info.fingerprint in text


def test_same_report_same_bytes_in_another_process(any_report: Report, tmp_path: Path) -> None:
    html = any_report.to_html()
    assert Report.from_json(any_report.to_json()).to_html() == html
    (tmp_path / "report.json").write_bytes(any_report.to_json())
    code = (
        "import sys, assay; data = open(sys.argv[1], 'rb').read();"
        "sys.stdout.buffer.write(assay.Report.from_json(data).to_html().encode())"
    )
    environment = {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "TZ": "Asia/Tokyo", "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60, env=environment)
    assert done.stdout.decode() == html
    assert "2026-11-21T" not in html  # the only date is the report's own, in words
    assert html.count("21 November 2026, 09:00 UTC") == 1


def test_verdict_comes_first_then_counts_then_a_picture(any_report: Report) -> None:
    html = any_report.to_html()
    body = html.index("<body>")
    verdict = any_report.verdict.replace("'", "&#39;")
    order = [verdict, "<dl", '<svg viewBox="0 0 720', "What this means, and", "<h2>The num", "<h2>How it"]
    places = [html.index(part, body) for part in order]
    assert places == sorted(places)


def test_caption_warns_of_tests_whose_pvalues_are_not_uniform() -> None:
    exact = replace(result(), test="gumbel-sum")
    other = replace(exact, key_id="k2")
    for results, cautious in (([exact], False), ([result()], True), ([exact, other], True)):
        html = Report.from_results([(str(i), "s", one) for i, one in enumerate(results)]).to_html()
        assert ("The tests used here are cautious" in html) is cautious


def test_pictures_and_tables_speak_to_screen_readers(full_report: Report) -> None:
    page = Page(full_report.to_html())
    (html,) = page.all("html")
    assert html["lang"] == "en"
    pictures = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len(pictures) == 5
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in pictures)
    assert len(page.all("title")) == 6  # the page's and the pictures'
    assert len(page.all("desc")) == 5
    assert len(page.all("caption")) == len(page.all("table")) > 4
    assert all(a["scope"] in ("col", "row") for a in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert len(page.all("main")) == 1


def test_each_token_carries_its_own_probability_and_a_mark_besides_colour() -> None:
    tails = (0.0, -1.5, -3.1, -4.7, -7.0, None)
    excerpt = Excerpt(doc_id="d", pieces=tuple("abcdef"), log_tail=tails)
    html = Report.from_results([("d", "s", result())], excerpts=[excerpt]).to_html()
    found = re.findall(r'<span class="([^"]+)" title="([^"]+)">(\w)</span>', html)
    assert found == [
        ("t", "probability 1", "a"),
        ("t e1", "probability 0.223", "b"),
        ("t e2", "probability 0.045", "c"),
        ("t e3", "probability 0.0091", "d"),
        ("t e4", "probability 0.000912", "e"),
        ("t e0", "not counted", "f"),
    ]
    css = Path(render.__file__).with_name("report.css").read_text()
    borders = [re.search(rf"\.e{level} {{[^}}]*border-bottom: ([^;]+) var", css) for level in (1, 2, 3, 4)]
    assert len({match.group(1) for match in borders if match}) == 4
    for legend in ("1 in 4 or less", "1 in 20 or less", "1 in 100 or less", "1 in 1000 or less", "not counted"):
        assert legend in html


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_at_least_4_5_in_light_dark_and_print() -> None:
    css = Path(render.__file__).with_name("report.css").read_text()
    palettes = re.findall(r":root {([^}]*--paper[^}]*)}", css)
    assert len(palettes) == 3
    for palette in palettes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", palette))
        full = {name: c if len(c) == 7 else "#" + "".join(2 * digit for digit in c[1:]) for name, c in colours.items()}
        pairs = [(ink, paper) for ink in ("ink", "muted", "accent") for paper in ("paper", "card")]
        pairs += [("ink", f"e{level}") for level in (1, 2, 3, 4)]
        for ink, paper in pairs:
            light, dark = sorted((luminance(full[ink]), luminance(full[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper, full)


@pytest.mark.parametrize(
    ("log_evalue", "shown"),
    [(float("inf"), "∞"), (float("-inf"), "0"), (8.0, "2,981"), (0.0, "1"), (20.0, "4.9&#8239;")],
)
def test_evalues_for_people(log_evalue: float, shown: str) -> None:
    assert str(render.evalue_html(log_evalue)).startswith(shown)


def test_importing_the_report_loads_no_plots() -> None:
    code = "import sys, assay.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()).isdisjoint({"matplotlib", "jinja2", "torch", "pyarrow", "numba", "scipy"})
