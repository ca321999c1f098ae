"""The documentation keeps its word: its examples run, its links lead somewhere, its pages name what exists."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import assay
from assay.watermark.keys import SecretKey

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
RUNNABLE = re.compile(r"^<!-- runnable -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(code: list[str], page: Path) -> dict[str, Any]:
    """Run blocks one after the other in one namespace; a failure shows the page and the line of the block."""
    names: dict[str, Any] = {"__name__": "__example__"}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)
    return names


@pytest.fixture
def fixed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys and draws that are the same in every run, so that p-values are too."""
    import secrets

    import torch

    count = iter(range(1, 1000))
    monkeypatch.setattr(secrets, "token_bytes", lambda size: next(count).to_bytes(size, "big"))
    torch.manual_seed(20261121)


# --- examples -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fixed_keys")
def test_the_ten_lines_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "README.md"
    code = blocks(page, "python")[0]
    assert len([line for line in code.splitlines() if line]) == 10
    names = run([code], page)
    printed = capsys.readouterr().out.splitlines()
    result = names["result"]
    assert printed == [str(result.pvalue), result.sentence()]
    assert result.pvalue < 1e-6
    assert assay.detect(names["text"], SecretKey.generate("other")).pvalue > 1e-3
    # What the page shows is what they print, but for the key and the numbers.
    shown = blocks(page, "text")[0].splitlines()
    assert [shape(line) for line in shown] == [shape(line) for line in printed]


def shape(line: str) -> str:
    line = re.sub(r"'k-[0-9a-f]{12}'", "KEY", line)
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "NUMBER", line)


def test_the_first_screen_of_the_readme() -> None:
    """What it is, the two commands and the ten lines stand before the first heading, within 45 lines."""
    top = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert len(top.splitlines()) <= 45
    assert re.search(r"^Assay tests where text came from", top, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target} " in top
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.usefixtures("fixed_keys")
@pytest.mark.parametrize("page", [page for page in PAGES if RUNNABLE.search(page.read_text())], ids=name_of)
def test_runnable_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(RUNNABLE.findall(page.read_text(encoding="utf-8")), page)
    check = CHECKS.get(name_of(page))
    if check is not None:
        check(names)


def check_tutorial(names: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    key, result, aware = names["key"], names["result"], names["aware"]
    assert result.pvalue < 1e-6
    assert aware.log10_pvalue < -6
    # Five unmarked cases below: each is a false alarm at 1e-5.
    assert assay.detect(names["plain"], key).pvalue > 1e-5
    assert assay.detect(names["human"], key).pvalue > 1e-5
    assert assay.detect(names["marked"], names["stranger"]).pvalue > 1e-5
    assert result.log10_pvalue < assay.detect(names["tampered"], key).log10_pvalue
    rows = pq.read_table("run/results.parquet").to_pylist()
    assert len(rows) == names["summary"].documents == 4
    for row in rows:
        if "marked" in row["doc_id"]:
            assert row["flagged"]
            assert row["log_pvalue"] < -14
        else:
            assert row["log_pvalue"] > -12
    assert names["page"].is_file()


def check_detect(names: dict[str, Any]) -> None:
    assert names["result"].key_id == "press"
    assert names["result"].pvalue < 1e-6
    assert names["results"][0].pvalue < 1e-6 < names["results"][1].pvalue


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/tutorial.md": check_tutorial,
    "docs/how-to/detect.md": check_detect,
}


def test_every_python_block_is_valid() -> None:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python"), 1):
            compile(block, f"{name_of(page)}, block {number}", "exec")


def test_the_command_lines_of_the_readme(tmp_path: Path, human_text: str) -> None:
    (shell,) = [block for block in blocks(ROOT / "README.md", "sh") if "assay" in block]
    (tmp_path / "letter.txt").write_text(human_text[:3000], encoding="utf-8")
    (tmp_path / "archive").mkdir()
    for number in range(3):
        part = human_text[5000 * number : 5000 * (number + 1)]
        (tmp_path / "archive" / f"{number}.txt").write_text(part, encoding="utf-8")
    environment = {**os.environ, "ASSAY_KEYRING": str(tmp_path / "keys.json"), "ASSAY_PASSPHRASE": "six random words"}
    lines = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert len(lines) == 6
    for words in lines:
        assert words[0] == "assay"
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (words, done.stderr)
        assert "six random words" not in done.stdout + done.stderr
    assert (tmp_path / "report" / "report.html").is_file()


# --- links and names ----------------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Files and anchors that a page links to within the repository."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return {slugify(re.sub(r"[*`]", "", title), "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{name_of(page)} links to {path}"
        assert not anchor or anchor in anchors(path), f"{name_of(page)} links to {path}#{anchor}"


def test_a_broken_link_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title *and* more\n[a](gone.md) [b](#title-and-more) [c](https://example.org)\n```\n[d](x)\n```\n"
    )
    assert list(links(page)) == [(tmp_path / "gone.md", ""), (page, "title-and-more")]
    assert anchors(page) == {"title-and-more"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_named_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in set(re.findall(r"`((?:assay|tests|benchmarks|scripts|examples|data|docs)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for test in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {test}(" in tests, f"{name_of(page)} names {test}"


def test_the_navigation_names_every_page() -> None:
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(listed) == pages
    assert len(listed) == len(set(listed))


def test_every_public_name_is_in_the_reference() -> None:
    from assay import conformal, detection, models, privacy, report, service, watermark
    from assay.detection import corpus, zero_shot

    for name in assay.__all__:
        assert f"::: assay.{name}\n" in REFERENCE or f"`assay.{name}`" in REFERENCE, name
    for room in (watermark, detection, corpus, zero_shot, conformal, privacy, report, models, service):
        for name in room.__all__:
            homes = {getattr(getattr(room, name), "__module__", room.__name__), room.__name__, "assay"}
            documented = {*homes, *(f"{home}.{name}" for home in homes)}
            assert any(f"::: {one}\n" in REFERENCE for one in documented), f"{room.__name__}.{name}"


EXAMPLES = [path for path in sorted((ROOT / "assay").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_of_docstrings_run(path: Path) -> None:
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


def test_what_the_errors_page_says_is_what_there_is() -> None:
    from assay import _errors

    kinds = [value for value in vars(_errors).values() if isinstance(value, type)]
    assert all(issubclass(kind, assay.AssayError) and kind.__doc__ for kind in kinds)


def test_the_model_card_says_what_the_training_log_says() -> None:
    log = json.loads((ROOT / "assay" / "models" / "default" / "training.json").read_text(encoding="utf-8"))
    page = (DOCS / "explanation" / "model-card.md").read_text(encoding="utf-8")
    for name in ("parameters", "steps", "tokens"):
        assert f"{log[name]:,}" in page, name
    for name in ("bits_per_char", "bits_per_token", "chars_per_token"):
        assert f"| {log[f'validation_{name}']} |" in page, name
    for name in ("weights_sha256", "tokenizer_sha256"):
        assert log[name] in page, name
    for name in ("layers", "width", "ffn", "batch", "context", "dropout", "seed"):
        assert re.search(rf"\b{re.escape(str(log['settings'][name]))}\b", page), name


# --- the site -----------------------------------------------------------------------------------------------------


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet: it hides warnings from --strict as well, and the build would pass whatever is broken.
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the docs extra has it: pip install 'assay[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def test_a_broken_site_would_not_build(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra has it: pip install 'assay[docs]'")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: Broken\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "gone.md" in done.stderr


def test_the_site_builds_without_warnings(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) == len(list(DOCS.rglob("*.md"))) + 1  # and 404.html


def test_what_a_program_prints_is_wrapped(site: Path) -> None:
    """The style needs the language in the markup; without it the sentence that reads the p-value is cut off."""
    home = (site / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<div class="[^"]*\blanguage-text\b', home)
    assert re.search(
        r"\.language-text code \{\s*white-space: pre-wrap;", (site / "site.css").read_text(encoding="utf-8")
    )


def test_page_one_installs_and_reads_a_pvalue() -> None:
    home = (DOCS / "index.md").read_text(encoding="utf-8")
    parts = ("Assay tests where text came from", "make demo", "README.md:ten-lines", "is the p-value.")
    places = [home.index(part) for part in parts]
    assert places == sorted(places)


def test_every_scheme_has_its_null_law_on_one_page() -> None:
    from assay.watermark.schemes import _HOMES

    page = (DOCS / "explanation" / "tests-and-null-laws.md").read_text(encoding="utf-8")
    table = page.split("## Scheme by scheme")[1].split("\n## ")[0]
    listed = {name.strip() for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for name in row.split(",")}
    assert listed - {"scheme", "---"} == _HOMES.keys() - {"ed25519"}


def test_pages_of_the_site_fetch_nothing_from_elsewhere(site: Path) -> None:
    loading = re.compile(
        r"<(?:script|img|iframe|link|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", re.IGNORECASE
    )
    for page in site.rglob("*.html"):
        assert not loading.findall(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name
    assert loading.findall('<script async src="https://example.org/x.js">')


def test_the_reference_is_filled_from_docstrings(site: Path) -> None:
    page = (site / "reference" / "detection" / "index.html").read_text(encoding="utf-8")
    assert "Test whether a text carries the mark of a key." in page
    # The site's own template: several parameters described together, without the first one's default for all.
    assert not re.search(r"top_k</code></b>[^<]*<[^>]*>[^<]*1\.0", page)
    commands = (site / "reference" / "command-line" / "index.html").read_text(encoding="utf-8")
    for command in (
        "demo",
        "detect",
        "report",
        "verify",
        "keys new",
        "keys rotate",
        "keys revoke",
        "keys export-public",
    ):
        assert f"assay {command}" in commands
