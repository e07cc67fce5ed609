"""The report's plots: as SVG for HTML, which takes the page's colours, and as PNG."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .collect import Series
from .experiment import Method
from .summary import Summary, band

# Okabe and Ito's colours, as far as they stand out from white and from black; after them, other
# dashes and markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56A0D3", "#8A6FD1", "#888888")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*"
_PAGE = "#010203"  # stands for the page's own text colour
_COLORED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


@dataclass(frozen=True)
class Plot:
    """A plot in both forms.

    Attributes:
        name: of the file, without its ending.
        title: what it shows, in a line.
        alt: what can be seen, for those who cannot.
        svg: an element for HTML, without any id that another one has.
        png: a file's content, on white.
    """

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


class Point:
    """A method in the plot of AP against time.

    Args:
        ap: over the seeds, in percent.
        milliseconds: lower quartile, median and upper quartile for an image.
    """

    def __init__(self, method: Method, ap: Summary, milliseconds: Sequence[float]) -> None:
        self.method = method
        self.ap = ap
        self.low, self.median, self.high = milliseconds


def plot_curves(metric: str, series: Series, methods: Sequence[Method]) -> Plot | None:
    """One metric over the iterations: mean and band (lowest to highest) of every method.

    Returns:
        None where no run has more than one point.
    """
    if not any(len(x) > 1 for runs in series.values() for x, _ in runs):
        return None
    curves = {m.name: band(series[m.name]) for m in methods if m.name in series}

    def draw(axes: Axes) -> None:
        for number, method in enumerate(methods):
            if method.name not in curves:
                continue
            curve, style = curves[method.name], _style(number)
            few = len(curve.x) < 25
            axes.plot(
                curve.x, curve.mean, label=method.label, color=style["color"],
                linestyle=style["linestyle"], marker=style["marker"] if few else None, markersize=4,
            )  # fmt: skip
            axes.fill_between(
                curve.x, curve.low, curve.high, color=style["color"], alpha=0.22, linewidth=0
            )
        axes.set_xlabel("iteration")
        axes.set_ylabel("total loss" if metric == "total_loss" else f"{metric} in percent")
        axes.set_ylim(bottom=0)
        _legend(axes, len(curves))

    what = "Total loss" if metric == "total_loss" else metric
    ends = ", ".join(
        f"{m.label} {curves[m.name].mean[-1]:.3g} at {curves[m.name].x[-1]:.0f}"
        for m in methods
        if m.name in curves and len(curves[m.name].x)
    )
    name = "curve_" + re.sub(r"\W+", "_", metric)
    title = f"{what} over the iterations"
    alt = f"{title}, mean and range over the seeds; at the end: {ends}."
    return _make(name, title, alt, draw)


def plot_tradeoff(points: Sequence[Point], metric: str, setting: str) -> Plot | None:
    """AP against time for an image, as the paper's Figure 1; None without points.

    Args:
        setting: how times were measured, in a few words.
    """
    if not points:
        return None

    def draw(axes: Axes) -> None:
        for number, point in enumerate(points):
            style = _style(number)
            spread = point.ap.deviation if point.ap.number > 1 else 0.0
            axes.errorbar(
                [point.median], [point.ap.mean], yerr=[[spread], [spread]],
                xerr=[[point.median - point.low], [point.high - point.median]],
                color=style["color"], marker=style["marker"], markersize=8, capsize=3,
                linestyle="none", label=point.method.label,
            )  # fmt: skip
        axes.margins(0.18)
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        axes.set_xlabel(f"milliseconds for an image ({setting})")
        axes.set_ylabel(f"{metric} in percent")
        _legend(axes, len(points))

    listed = ", ".join(f"{p.method.label} {p.ap.mean:.1f} at {p.median:.3g} ms" for p in points)
    title = f"{metric} against time for an image"
    return _make("ap_against_time", title, f"{title}: {listed}.", draw)


def _style(number: int) -> dict[str, str]:
    turn, place = divmod(number, len(_COLORS))
    return {
        "color": _COLORS[place],
        "linestyle": _DASHES[(turn + (place % 2)) % len(_DASHES)],
        "marker": _MARKERS[(place + 3 * turn) % len(_MARKERS)],
    }


def _legend(axes: Axes, entries: int) -> None:
    axes.grid(color=matplotlib.rcParams["axes.edgecolor"], alpha=0.15)
    figure = axes.get_figure()
    assert figure is not None
    columns = 1 if entries > 4 and _longest_label(axes) > 26 else 2
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _longest_label(axes: Axes) -> int:
    return max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)


def _make(name: str, title: str, alt: str, draw: Callable[[Axes], None]) -> Plot:
    page = dict.fromkeys(_COLORED, _PAGE)
    svg = _render(draw, "svg", {**page, "svg.fonttype": "none", "svg.hashsalt": name})
    png = _render(draw, "png", {})
    return Plot(name, title, alt, _inline(svg.decode(), name, alt), png)


def _render(draw: Callable[[Axes], None], kind: str, settings: Mapping[str, object]) -> bytes:
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **settings}):
        figure = Figure(figsize=(5.0, 4.1), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        target = io.BytesIO()
        # Without metadata: what a plot shows decides its bytes, and there is no date in it.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else None
        figure.savefig(target, format=kind, dpi=110, transparent=kind == "svg", metadata=nothing)
    return target.getvalue()


_numbers = itertools.count()


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: own ids, the page's colours, a width that fits."""
    prefix = f"p{next(_numbers)}-"
    svg = svg[svg.index("<svg") :].replace(_PAGE, "currentColor")
    svg = re.sub(r'(\bid=")', rf"\1{prefix}", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    title = f"{prefix}title"
    opening = f'<svg role="img" aria-labelledby="{title}"'
    svg = svg.replace("<svg", opening, 1)
    at = svg.index(">") + 1
    return f'{svg[:at]}<title id="{title}">{html.escape(alt)}</title>{svg[at:]}'
