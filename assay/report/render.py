"""The report as one HTML page that needs nothing else and runs nothing.

Everything that comes from documents passes through `visible` and jinja's escaping. The page's own policy admits one
style sheet, by its hash, and nothing else: no script, no picture, no connection.
"""

from __future__ import annotations

import base64
import hashlib
import math
import unicodedata
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from assay.conformal.evaluation import rolling_share
from assay.detection.result import format_evalue, format_pvalue
from assay.report import plots
from assay.report.records import Document, Excerpt, Histogram, LabelledSource, LengthBucket, MonitoredSource
from assay.report.wording import percent, words_of

if TYPE_CHECKING:
    from jinja2 import Template

    from assay.report.report import Report

_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MOST_SOURCES = 30
MOST_INPUTS = 50
# Scores in each window of the rolling coverage: half of a short series, and no picture where that says nothing.
_ROLLING, _FEWEST_ROLLING = 50, 10


class Level(NamedTuple):
    """One level of shading: tokens whose tail probability is at most `tail`."""

    tail: float
    name: str
    words: str


LEVELS = (
    Level(0.25, "dotted", "1 in 4 or less"),
    Level(0.05, "line", "1 in 20 or less"),
    Level(0.01, "thick line", "1 in 100 or less"),
    Level(0.001, "double line", "1 in 1000 or less"),
)


def page(report: Report) -> str:
    """The whole page; equal reports give equal pages on one installation."""
    css = _resource("report.css")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return _template().render(
        report=report,
        template=words_of(report.calibrations).template,
        schema=report.SCHEMA,
        counts=report.counts,
        css=Markup(css),  # noqa: S704 - the package's own file
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        pvalue_plot=_pvalue_plot(report.histogram),
        length_plot=_length_plot(report.lengths),
        levels=LEVELS,
        # Correcting for several keys or tests leaves p-values of unmarked documents larger than uniform ones.
        cautious=len(report.keys) > 1 or not set(report.tests) <= {"gumbel-sum"},
        excerpts=[_excerpt(document, document.excerpt) for document in report.documents if document.excerpt],
        monitored=[_monitored(place, one) for place, one in enumerate(report.monitoring, 1)],
        labelled=[_labelled(place, one) for place, one in enumerate(report.labelling, 1)],
        most_sources=MOST_SOURCES,
        most_inputs=MOST_INPUTS,
    )


def visible(text: str, *, keep: str = "") -> Markup:
    """The text escaped for HTML, with every character that a reader could not see written out.

    Control characters, direction overrides, other format characters and lone surrogates appear as such as [U+202E];
    joiners stay, because scripts need them.

    Parameters
    ----------
    text
        Anything, including what a stranger wrote.
    keep
        Characters to leave as they are, such as newlines where the page preserves them.
    """
    if text.isascii() and text.isprintable():
        return escape(text)
    return Markup("").join(_visible_character(character, keep) for character in text)


def _visible_character(character: str, keep: str) -> Markup:
    code = ord(character)
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
    # Variation selectors are marks, not format characters, and can carry hidden data; FE0F only picks emoji style.
    selector = 0xFE00 <= code <= 0xFE0E or 0xE0100 <= code <= 0xE01EF
    if (hidden or selector) and character not in keep and character not in "\u200c\u200d":
        return Markup('<span class="ctrl">[U+{}]</span>').format(f"{code:04X}")
    return escape(character)


def pvalue_html(log_pvalue: float) -> Markup:
    """A probability for people, such as 0.012 or 3.1 × 10⁻⁷."""
    return _scientific(format_pvalue(log_pvalue))


def evalue_html(log_evalue: float) -> Markup:
    """An e-value for people."""
    if math.log(1e3) <= log_evalue < math.log(1e5):
        return escape(f"{math.exp(log_evalue):,.0f}")
    text = format_evalue(log_evalue)
    return Markup("∞") if text == "inf" else _scientific(text)


def _scientific(text: str) -> Markup:
    mantissa, found, exponent = text.partition("e")
    if not found:
        return escape(mantissa)
    return Markup("{}&#8239;&times;&#8239;10<sup>{}</sup>").format(mantissa, str(int(exponent)).replace("-", "\u2212"))


def _date(made: str) -> str:
    """The time of the report for people."""
    when = datetime.fromisoformat(made).astimezone(UTC)
    # Not strftime: the page's language is English whatever the machine's is.
    return f"{when.day} {_MONTHS[when.month - 1]} {when.year}, {when:%H:%M} UTC"


def _share(share: float) -> str:
    """A share in a table: one decimal, never rounded to 0 or to 100."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def _place(share: float) -> str:
    """A share as a place on the 128 units of an interval's picture."""
    return f"{4 + 120 * share:.1f}"


def _pvalue_plot(histogram: Histogram) -> Markup:
    tested = sum(histogram.counts)
    first = histogram.counts[0]
    step = 1 / len(histogram.counts)
    band = ""
    if histogram.band_level is not None:
        band = f"By chance each bar would have between {histogram.band_low:,} and {histogram.band_high:,} documents. "
    words = (
        f"Bar chart of {tested:,} p-values in {len(histogram.counts)} bins. {first:,} lie below {step:g}, where "
        f"{tested * step:,.0f} would lie by chance. {band}Bars from left to right: "
        f"{', '.join(map(str, histogram.counts))}."
    )
    svg = plots.pvalue_histogram(histogram, title="p-values of the tested documents", description=words)
    return Markup(svg)  # noqa: S704 - drawn from numbers alone


def _length_plot(lengths: tuple[LengthBucket, ...]) -> Markup:
    filled = [one for one in lengths if one.documents]
    words = " ".join(f"{plots.bucket_label(one)} tokens: {one.flagged} of {one.documents} flagged." for one in filled)
    svg = plots.flagged_by_length(
        lengths, title="Share flagged by length", description=f"{words} The table below gives the intervals."
    )
    return Markup(svg)  # noqa: S704 - drawn from numbers alone


def _monitored(place: int, source: MonitoredSource) -> dict[str, Any]:
    shown, last = len(source.scores), source.first + len(source.scores)
    part = f"Scores {source.first + 1:,} to {last:,} of {source.n_scores:,}"
    alarm = "No alarm is raised." if source.alarm is None else f"An alarm is raised at score {source.alarm + 1:,}."
    words = (
        f"Line chart of {shown:,} scores in the order of time, each with the interval forecast for it. "
        f"{sum(source.missed):,} of them lie outside their intervals. {alarm}"
    )
    # The name of the source stays out of the picture: nothing that strangers wrote enters one.
    svg = plots.monitored(source, name=f"monitor-{place}", title=f"Monitored source {place}", description=words)
    rolling = None
    window = min(_ROLLING, shown // 2)
    if window >= _FEWEST_ROLLING:
        shares = rolling_share(~np.array(source.missed)[:, None], window)
        words = (
            f"Line chart of the share of scores inside their intervals, over {window} scores at a time. It lies "
            f"between {percent(float(shares.min()))} and {percent(float(shares.max()))}; the target is "
            f"{percent(1 - source.alpha)}. {alarm}"
        )
        drawn = plots.rolling_coverage(
            source, window=window, name=f"rolling-{place}", title=f"Coverage of source {place}", description=words
        )
        rolling = {"plot": Markup(drawn), "window": window}  # noqa: S704 - drawn from numbers alone
    return {"record": source, "part": part, "plot": Markup(svg), "rolling": rolling}  # noqa: S704 - numbers alone


def _labelled(place: int, source: LabelledSource) -> dict[str, Any]:
    bars = ", ".join(f"{left}: {count:,}" for left, count in enumerate(source.sizes))
    words = f"Bar chart: steps by how many of {len(source.states)} states remain possible. {bars}."
    svg = plots.set_sizes(source, name=f"sets-{place}", title=f"Labelled source {place}", description=words)
    return {"record": source, "plot": Markup(svg)}  # noqa: S704 - drawn from numbers alone


def _excerpt(document: Document, excerpt: Excerpt) -> dict[str, Any]:
    counted = [tail for tail in excerpt.log_tail if tail is not None]
    high = sum(tail <= math.log(LEVELS[0].tail) for tail in counted)
    shown = len(excerpt.pieces)
    part, where = f"All {shown:,} tokens", "By chance it would be"
    if shown < document.n_tokens:
        first, last = excerpt.start + 1, excerpt.start + shown
        part = f"Tokens {first:,} to {last:,} of {document.n_tokens:,}, the part with most evidence"
        where = "In a part picked blindly it would by chance be"
    caption = Markup(
        "{}; {} counted. {} of these have a score that one in four unmarked tokens reaches. {} about {}. "
        'Whole document: <span class="nowrap">p-value {}</span>.'
    )
    numbers = (f"{len(counted):,}", f"{high:,}", where, f"{LEVELS[0].tail * len(counted):,.0f}")
    return {
        "doc_id": document.doc_id,
        "caption": caption.format(part, *numbers, pvalue_html(document.log_pvalue)),
        "tokens": [_token(piece, tail) for piece, tail in zip(excerpt.pieces, excerpt.log_tail, strict=True)],
    }


def _token(piece: str, tail: float | None) -> dict[str, Any]:
    # A token without text of its own is a further byte of the character before it.
    shown = visible(piece, keep="\n\t") if piece else Markup('<span class="ctrl">·</span>')
    if tail is None:
        return {"piece": shown, "level": 0, "title": "not counted"}
    level = sum(tail <= math.log(one.tail) for one in LEVELS)
    return {"piece": shown, "level": level or None, "title": f"probability {format_pvalue(tail)}"}


def _resource(name: str) -> str:
    return resources.files("assay.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        visible=visible,
        pvalue=pvalue_html,
        evalue=evalue_html,
        percent=percent,
        share=_share,
        place=_place,
        date=_date,
        ln=math.log,
        count=lambda number: f"{number:,}",
        bucket_label=plots.bucket_label,
    )
    return environment.get_template("report.html.j2")
