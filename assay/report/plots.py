"""The report's pictures, as SVG that stands inside a page: no metadata, no style attributes, no ids that clash.

matplotlib draws with marker colours; each becomes a class of the page's style sheet, so that pictures follow the
reader's light or dark setting and the page needs no inline style. Nothing that comes from a document enters a picture.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from assay.conformal.evaluation import rolling_share
from assay.conformal.plots import Colours, draw_intervals, draw_rolling_coverage, draw_set_sizes
from assay.report.records import SHORT_TOKENS, Histogram, LabelledSource, LengthBucket, MonitoredSource

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _RULE, _ACCENT, _BAND, _MARK = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_CLASSES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _ACCENT: "accent", _BAND: "band", _MARK: "mark"}
_COLOURS = Colours(truth=_INK, forecast=_ACCENT, band=_BAND, missed=_MARK, quiet=_MUTED)
_WIDTH, _DPI = 720, 72
_SETTINGS = {
    "svg.hashsalt": "assay.report",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 14,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


def pvalue_histogram(histogram: Histogram, *, title: str, description: str) -> str:
    """Bars of the p-values, the uniform line, and the band in which uniform p-values stay, where there is one.

    `title` and `description` are what a screen reader says in place of the picture.
    """

    def draw(axes: Axes) -> None:
        bins = len(histogram.counts)
        expected = sum(histogram.counts) / bins
        width = 1 / bins
        left = [i * width for i in range(bins)]
        top = 1.08 * max(*histogram.counts, histogram.band_high or 0, 1)
        if histogram.band_low is not None and histogram.band_high is not None:
            axes.axhspan(histogram.band_low, histogram.band_high, facecolor=_BAND, edgecolor="none")
        axes.bar(left, histogram.counts, width=0.86 * width, align="edge", color=_ACCENT)
        axes.axhline(expected, color=_INK, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(0, top)
        axes.set_xlabel("p-value")
        axes.set_ylabel("documents")
        axes.locator_params(axis="y", integer=True, nbins=5)

    return _svg(draw, height=250, top=8, name="pvalues", title=title, description=description)


def flagged_by_length(lengths: tuple[LengthBucket, ...], *, title: str, description: str) -> str:
    """Share flagged per length bucket with its 95 % interval; empty buckets stay empty."""

    def draw(axes: Axes) -> None:
        filled = [(place, one) for place, one in enumerate(lengths) if one.documents]
        places = [place for place, _ in filled]
        axes.vlines(places, [100 * one.low for _, one in filled], [100 * one.high for _, one in filled], color=_ACCENT)
        axes.collections[0].set_linewidth(2.2)
        axes.scatter(places, [100 * one.flagged / one.documents for _, one in filled], s=62, color=_ACCENT, zorder=3)
        border = next(place for place, one in enumerate(lengths) if one.shortest == SHORT_TOKENS) - 0.5
        axes.axvline(border, color=_MUTED, linewidth=1.2, linestyle=(0, (2, 3)))
        axes.text(border - 0.08, 106, f"under {SHORT_TOKENS} tokens", ha="right", color=_MUTED, fontsize=13)
        axes.set_xlim(-0.6, len(lengths) - 0.4)
        axes.set_ylim(-3, 104)
        axes.set_xticks(range(len(lengths)), [bucket_label(one) for one in lengths], fontsize=12)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xlabel("length of the document in tokens")
        axes.set_ylabel("flagged, %")

    return _svg(draw, height=296, top=28, name="lengths", title=title, description=description)


def monitored(source: MonitoredSource, *, name: str, title: str, description: str) -> str:
    """A source's scores over time with their intervals, misses and alarm; scores are numbered from 1."""

    def draw(axes: Axes) -> None:
        first = source.first + 1
        draw_intervals(
            axes,
            np.arange(first, first + len(source.scores)),
            np.array(source.scores),
            np.array(source.point),
            np.column_stack([source.lower, source.upper]),
            np.array(source.missed),
            None if source.alarm is None else source.alarm + 1,
            _COLOURS,
        )
        axes.set_xlim(*_ends(first, first + len(source.scores) - 1))
        axes.set_xlabel("number of the score, in the order of time")
        axes.set_ylabel("score")

    return _svg(draw, height=280, top=8, name=name, title=title, description=description)


def rolling_coverage(source: MonitoredSource, *, window: int, name: str, title: str, description: str) -> str:
    """Share of each `window` scores in a row that stayed inside their intervals, in percent, above the last of them."""
    shares = rolling_share(~np.array(source.missed)[:, None], window)[:, 0]

    def draw(axes: Axes) -> None:
        last = np.arange(source.first + window, source.first + window + len(shares))
        draw_rolling_coverage(axes, last, shares, source.alpha, window, _COLOURS)
        axes.axhline(1 - source.max_miss_rate, color=_MARK, linewidth=1.2, linestyle=(0, (1, 3)))
        if source.alarm is not None:
            axes.axvline(source.alarm + 1, color=_MARK, linewidth=1.4, linestyle=(0, (5, 3)))
        # As wide as the picture of the scores above it, so that one can be read under the other.
        axes.set_xlim(*_ends(source.first + 1, source.first + len(source.scores)))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")
        axes.set_xlabel("number of the score, in the order of time")
        axes.set_ylabel(f"inside, % of {window}")

    return _svg(draw, height=220, top=8, name=name, title=title, description=description)


def set_sizes(source: LabelledSource, *, name: str, title: str, description: str) -> str:
    """For how many steps 0, 1, ... states remain possible."""

    def draw(axes: Axes) -> None:
        draw_set_sizes(axes, np.array(source.sizes), _COLOURS)
        axes.set_xlabel("states that remain possible")
        axes.set_ylabel("steps")

    return _svg(draw, height=220, top=8, name=name, title=title, description=description)


def _ends(first: int, last: int) -> tuple[float, float]:
    """Where matplotlib ends an axis whose data go from the one to the other."""
    margin = 0.05 * (last - first) or 0.5
    return first - margin, last + margin


def bucket_label(bucket: LengthBucket) -> str:
    """Such as "200-399", with an en dash, or "3200+"."""
    return f"{bucket.shortest}+" if bucket.longest is None else f"{bucket.shortest}\u2013{bucket.longest}"


def _svg(draw: Callable[[Axes], None], *, height: int, top: int, name: str, title: str, description: str) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI)
        # Fixed margins: a layout that measures text would depend on the installed fonts.
        axes = figure.add_axes((60 / _WIDTH, 58 / height, 1 - 76 / _WIDTH, 1 - (58 + top) / height))
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        draw(axes)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_RULE, linewidth=1)
        axes.tick_params(length=0, pad=8, colors=_MUTED)
        axes.xaxis.labelpad = 8
        axes.xaxis.label.set_color(_MUTED)
        axes.yaxis.label.set_color(_MUTED)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_MUTED)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), name, title, description)


def _for_page(drawn: str, name: str, title: str, description: str) -> str:
    """matplotlib's SVG as an element of the page, with the words that stand in for it."""
    root = ElementTree.fromstring(drawn.encode())  # noqa: S314 - drawn above, never read from a file
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([A-Za-z][\w-]*)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        styles = dict(part.split(":", 1) for part in attributes.pop("style", "").split(";") if ":" in part)
        classes = _apply(styles, attributes)
        if classes:
            attributes["class"] = " ".join(classes)
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        for key, value in attributes.items():
            if key == "id":
                attributes[key] = f"{name}-{value}"
            elif key in ("href", "clip-path"):
                attributes[key] = value.replace("#", f"#{name}-")
        element.attrib.clear()
        element.attrib.update(attributes)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    labels = {"title": title, "desc": description}
    for place, (tag, words) in enumerate(labels.items()):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = words
        root.insert(place, element)
    named = " ".join(f"{name}-{tag}" for tag in labels)
    root.attrib.update({"viewBox": view, "class": "plot", "role": "img", "aria-labelledby": named})
    return ElementTree.tostring(root, encoding="unicode")


def _apply(styles: dict[str, str], attributes: dict[str, str]) -> list[str]:
    """CSS declarations as classes for colours and as presentation attributes for the rest."""
    classes = []
    for raw_name, raw_value in styles.items():
        name, value = raw_name.strip(), raw_value.strip()
        if name in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{name}-{_CLASSES[value]}")
        elif name == "font":
            size = re.search(r"([\d.]+)px", value)
            attributes["font-size"] = size.group(1) if size else "14"
        elif name == "font-size":
            attributes["font-size"] = value.removesuffix("px")
        elif name != "font-family":
            attributes[name] = value
    return classes


def _local(name: str) -> str:
    return name.rpartition("}")[2]
