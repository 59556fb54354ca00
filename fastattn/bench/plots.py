"""Speed over sequence length or context, a curve per peer under the line of the roof."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fastattn.bench.report import READ, Report, Row, peers
from fastattn.testing.cases.peers import OURS, label
from fastattn.testing.roof import Roof

# Ours, then the peers in order: colours that the colour-blind can tell apart, on white and on black.
_COLOURS = ("#0a84d6", "#e8710a", "#12a67c", "#d45fa0", "#b8860b", "#8a7cf0", "#7f8c8d")
_MARKERS = "os^vDXP"
_INK = {False: "#1c1e21", True: "#e6e6e6"}  # dark or not
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastattn",  # the same file for the same data
}


def figures(report: Report) -> dict[str, list[Row]]:
    """By title: the rows that have a place in that figure, where they make a curve."""
    titles = dict.fromkeys(row.curve.figure for row in report.rows if row.curve is not None)
    found = {
        title: [row for row in report.rows if row.curve and row.curve.figure == title and row.seconds]
        for title in titles
    }
    return {title: rows for title, rows in found.items() if len({r.curve.x for r in rows if r.curve}) > 1}


def write(report: Report, folder: Path) -> Iterator[Path]:
    """One PNG per figure; yields their paths."""
    folder.mkdir(exist_ok=True)
    for title, rows in figures(report).items():
        types = list(dict.fromkeys(row.dtype for row in rows))
        with matplotlib.rc_context(_style(dark=False)):
            figure = Figure(figsize=(4.8 * len(types), 3.8), layout="constrained")
            for axes, dtype in zip(figure.subplots(1, len(types), squeeze=False)[0], types, strict=True):
                _draw(axes, [row for row in rows if row.dtype == dtype], report.roof)
            figure.suptitle(title)
            _legend(figure)
            path = folder / (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".png")
            figure.savefig(path, dpi=160)
        yield path


def svgs(rows: list[Row], top: Roof | None, dark: bool) -> Iterator[bytes]:
    """The panels of a figure, one per type, for a page of that colour."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        buffer = io.BytesIO()
        with matplotlib.rc_context(_style(dark)):
            figure = Figure(figsize=(5.2, 3.6), layout="constrained")
            _draw(figure.subplots(), [row for row in rows if row.dtype == dtype], top)
            _legend(figure)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        yield buffer.getvalue()


def _style(dark: bool) -> Any:
    ink = _INK[dark]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {**_STYLE, **dict.fromkeys(inked, ink)}


def _draw(axes: Axes, rows: list[Row], top: Roof | None) -> None:
    """One type: the curves, their spread, and the roof."""
    placed = sorted(((row.curve, row) for row in rows if row.curve is not None), key=lambda pair: pair[0].x)
    curve, first = placed[0]
    for i, peer in enumerate([OURS, *peers(rows)]):
        points = [(at.x, row.speed_of(peer), row.seconds[peer]) for at, row in placed if peer in row.seconds]
        if not points:
            continue
        x, speeds, _ = zip(*points, strict=True)
        # The spread of the speed is the other way round than that of the time.
        low = [speed * t.median / t.p80 for _, speed, t in points]
        high = [speed * t.median / t.p20 for _, speed, t in points]
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        width = 2.4 if peer == OURS else 1.4
        axes.plot(x, speeds, color=colour, linewidth=width, marker=marker, markersize=4, label=label(peer))
    _draw_roof(axes, [(at.x, row) for at, row in placed], top)
    axes.set_xscale("log", base=2)
    axes.set_xticks([at.x for at, _ in placed])
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:.0f}" if x < 10_000 else f"{x / 1024:.0f}k")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel(curve.axis)
    axes.set_ylabel(first.unit)
    axes.set_title(first.dtype, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.2)


def _legend(figure: Figure) -> None:
    """One for all panels, below them."""
    named = {
        name: line
        for axes in figure.axes
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )


def _draw_roof(axes: Axes, placed: list[tuple[int, Row]], top: Roof | None) -> None:
    """A line at the FMA peak, or the plain reads that took turns."""
    style: dict[str, Any] = {"color": matplotlib.rcParams["text.color"], "linewidth": 1, "dashes": (4, 3)}
    first = placed[0][1]
    if first.is_bandwidth_bound:
        reads = [(x, row.speed_of(READ)) for x, row in placed if READ in row.seconds]
        axes.plot([x for x, _ in reads], [y for _, y in reads], label="roof: a plain read", **style)
    elif top is not None:
        axes.axhline(top.gflops(first.dtype), label="roof: FMA peak", **style)
