"""Pictures of intervals and sets as SVG: intervals over time, rolling coverage, sizes of sets.

Each function returns one `<svg>` element as text, with a title and a description for screen readers, without scripts,
dates or anything fetched. The same data give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Bools, Floats
from assay.conformal.evaluation import check_intervals, covered, rolling_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _ACCENT, _BAND, _ALARM = "#1a1a1a", "#6b6b6b", "#1f5fa8", "#cfe0f3", "#b3261e"
_WIDTH, _DPI = 720, 72
_SETTINGS = {
    "svg.hashsalt": "assay.conformal",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 13,
    "text.parse_math": False,
}


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Colours of the pictures."""

    truth: str = _INK
    forecast: str = _ACCENT
    band: str = _BAND
    missed: str = _ALARM
    quiet: str = _MUTED


def draw_intervals(
    axes: Axes,
    steps: npt.NDArray[np.int64],
    truth: Floats,
    point: Floats,
    ends: Floats,
    missed: Bools,
    alarm: int | None,
    colours: Colours,
) -> None:
    """The picture of `intervals_over_time` on axes of one's own; ends have shape (n, 2), alarm is one of the steps."""
    lower, upper = ends[:, 0], ends[:, 1]
    shown = np.concatenate([truth, point, ends[np.isfinite(ends)]])
    margin = 0.05 * float(np.ptp(shown)) or 0.5
    bottom, top = float(shown.min()) - margin, float(shown.max()) + margin
    # Where one end only is infinite, the interval is open to that side and the band goes on to the edge of the picture.
    none = np.isinf(lower) & np.isinf(upper)
    low = np.where(none, np.nan, np.maximum(lower, bottom))
    high = np.where(none, np.nan, np.minimum(upper, top))
    axes.fill_between(steps, low, high, color=colours.band, linewidth=0)
    axes.plot(steps, point, color=colours.forecast, linewidth=1)
    axes.plot(steps, truth, color=colours.truth, linewidth=1)
    axes.scatter(steps[missed], truth[missed], s=16, color=colours.missed, zorder=3)
    if alarm is not None:
        axes.axvline(alarm, color=colours.missed, linewidth=1.4, linestyle=(0, (5, 3)))
    axes.set_ylim(bottom, top)


def draw_rolling_coverage(
    axes: Axes, steps: npt.NDArray[np.int64], shares: Floats, alpha: float, window: int, colours: Colours
) -> None:
    """The picture of `rolling_coverage_plot` on axes of one's own; `steps` are where the windows end."""
    error = float(np.sqrt(alpha * (1 - alpha) / window))
    axes.axhspan(max(0.0, 1 - alpha - 2 * error), min(1.0, 1 - alpha + 2 * error), color=colours.band, linewidth=0)
    axes.axhline(1 - alpha, color=colours.quiet, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.plot(steps, shares, color=colours.forecast, linewidth=1.4)
    axes.set_ylim(min(0.5, float(shares.min()) - 0.02), 1.02)


def draw_set_sizes(axes: Axes, counts: npt.NDArray[np.int64], colours: Colours) -> None:
    """The picture of `set_sizes` on axes of one's own; counts[k] sets hold k."""
    axes.bar(np.arange(len(counts)), counts, width=0.8, color=colours.forecast)
    axes.set_ylim(0, 1.08 * max(1, int(counts.max())))
    axes.locator_params(axis="both", integer=True)


def intervals_over_time(
    y: npt.ArrayLike,
    point: npt.ArrayLike,
    intervals: npt.ArrayLike,
    *,
    alarm: int | None = None,
    title: str = "Intervals over time",
) -> str:
    """The truth as a line, intervals as a band, misses as dots, and an alarm as a vertical line.

    Parameters
    ----------
    y, point
        Finite, shape (n,).
    intervals
        Shape (n, 2) or (n, 2, 1). An infinite end draws the band to the edge, two leave a gap in it.
    alarm
        Index of the alarm, if any.
    title
        What a screen reader says first.
    """
    truth, ends = check_intervals(y, intervals)
    centre = np.asarray(point, dtype=np.float64)
    if centre.shape != truth.shape or not np.isfinite(centre).all():
        raise ValueError(f"point must be finite numbers, shape {truth.shape}, got shape {centre.shape}.")
    if ends.shape[2] != 1:
        raise ValueError(f"intervals must be of one level for a picture, got {ends.shape[2]}.")
    missed = ~covered(truth, ends)[:, 0]
    steps = np.arange(len(truth))

    def draw(axes: Axes) -> None:
        draw_intervals(axes, steps, truth, centre, ends[:, :, 0], missed, alarm, Colours())
        axes.set_xlabel("step")
        axes.set_ylabel("value")

    raised = "" if alarm is None else f" An alarm is raised at step {alarm}."
    return _svg(draw, title, f"{len(truth)} steps, {int(missed.sum())} of them outside their intervals.{raised}")


def rolling_coverage_plot(
    y: npt.ArrayLike,
    intervals: npt.ArrayLike,
    alpha: float,
    *,
    window: int = 100,
    title: str = "Rolling coverage",
) -> str:
    """Coverage over each `window` consecutive steps, the target, and the band of two binomial standard errors.

    Parameters as in `rolling_coverage`, with one level; alpha in (0, 1).
    """
    shares = rolling_coverage(y, intervals, window)
    if shares.shape[1] != 1 or not 0 < alpha < 1:
        raise ValueError(f"a picture has one level alpha in (0, 1), got {shares.shape[1]} levels and alpha={alpha!r}.")

    def draw(axes: Axes) -> None:
        steps = np.arange(window - 1, window - 1 + len(shares))
        draw_rolling_coverage(axes, steps, shares[:, 0], alpha, window, Colours())
        axes.set_xlabel("step")
        axes.set_ylabel(f"coverage of the last {window}")

    return _svg(draw, title, f"Between {shares.min():.2f} and {shares.max():.2f}; the target is {1 - alpha:.2f}.")


def set_sizes(sizes: npt.ArrayLike, n_candidates: int, *, title: str = "Sizes of sets") -> str:
    """Bars: how many sets hold 0, 1, ... up to all candidates.

    Parameters
    ----------
    sizes
        Whole numbers in 0..n_candidates, shape (n,), n >= 1.
    n_candidates
        Size of the set that says nothing, 1 to 64.
    title
        What a screen reader says first.
    """
    values = np.asarray(sizes)
    if not 1 <= n_candidates <= 64:
        raise ValueError(f"n_candidates must be in 1..64 for bars that can be read, got {n_candidates}.")
    if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
        raise ValueError(f"sizes must be whole numbers, shape (n,) with n >= 1, got {values.dtype}, {values.shape}.")
    if values.min() < 0 or values.max() > n_candidates:
        raise ValueError(f"sizes must be in 0..{n_candidates}, got {values.min()} to {values.max()}.")
    counts = np.bincount(values, minlength=n_candidates + 1)

    def draw(axes: Axes) -> None:
        draw_set_sizes(axes, counts, Colours())
        axes.set_xlabel("sequences in the set")
        axes.set_ylabel("sets")

    return _svg(draw, title, f"{len(values)} sets, on average {values.mean():.2f} of {n_candidates} sequences.")


def _svg(draw: Callable[[Axes], None], title: str, description: str) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    height = 280
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI)
        # Fixed margins: a layout that measures text would depend on the installed fonts.
        axes = figure.add_axes((72 / _WIDTH, 56 / height, 1 - 92 / _WIDTH, 1 - 68 / height))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        draw(axes)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=_MUTED)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = out.getvalue()
    # From the <svg> element on: the XML head has no place inside a page.
    start = drawn.index("<svg")
    inside = drawn.index(">", start) + 1
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return drawn[start : inside - 1] + ' role="img">' + words + drawn[inside:]
