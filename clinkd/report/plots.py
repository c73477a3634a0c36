"""The report's charts: Matplotlib to inline SVG that follows the page's colours.

Decisions:
- Figures are built without pyplot (no global state, no display) and drawn with marker colours that are then
  replaced by ``currentColor`` and the page's CSS variables, so one SVG is right in light and dark.
- Text stays text (small, searchable), never read as TeX: stage names and metric names come from outside.
- Ids are prefixed by the chart's name, since all charts share one HTML document; metadata and namespaces are
  dropped.
- Long curves are thinned to a few hundred points and shown raw and faint under their running mean.
- What falls to a fraction of where it began is shown on a logarithmic axis: the first steps would take all
  room.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinkd.report.positions import Layout
from clinkd.report.tables import number

INK = "#010203"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")  # var(--s1) … var(--s4)
MOST_POINTS = 300
MOST_CURVES = 12
MOST_SQUARES = 400
MOST_LINES = 40
WIDE = 8
"""Largest to smallest running mean from which the axis is logarithmic."""

Lines = tuple[np.ndarray, np.ndarray]
"""Something of each row, and of each column."""


@dataclass(frozen=True)
class Curve:
    """A quantity over steps, both [n]; ``dropped`` counts values that were not finite."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    dropped: int = 0


def curves(metrics: Iterable[Mapping[str, Any]], field: str) -> list[Curve]:
    """One curve of ``field`` for every stage (and round, where a line names one), in order of appearance.

    Lines without a numeric step or without the field are other kinds of line. A step written twice (a
    resumed run) counts as it was written last.
    """
    found: dict[str, dict[int, float]] = {}
    for row in metrics:
        step = number(row.get("step"))
        if step is None or not isinstance(row.get(field), (int, float)):
            continue
        label = str(row.get("stage", "run")) + (f", round {row['round']}" if "round" in row else "")
        found.setdefault(label, {})[int(step)] = float(row[field])
    made = []
    for label, points in found.items():
        steps = np.array(sorted(points))
        values = np.array([points[step] for step in steps])
        finite = np.isfinite(values)
        if finite.any():
            made.append(Curve(label, steps[finite], values[finite], int((~finite).sum())))
    return made[:MOST_CURVES]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the values at most ``window // 2`` away, [n]; centred, so that it does not lag."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    places = np.arange(len(values))
    starts, ends = np.maximum(0, places - window // 2), np.minimum(len(values), places + window // 2 + 1)
    return (total[ends] - total[starts]) / (ends - starts)


def chart(name: str, lines: Sequence[Curve], y_label: str) -> str:
    """Curves over steps as an SVG element; first, last and lowest values are in its accessible name."""
    figure, axes = new_figure(4.2, 2.5)
    means = [running_mean(line.values, max(1, len(line.values) // 20)) for line in lines]
    if min(line.values.min() for line in lines) > 0 and _spread(means) > WIDE:
        _logarithmic(axes)
    for index, (line, mean) in enumerate(zip(lines, means, strict=True)):
        colour = SERIES[index % len(SERIES)]
        keep = np.unique(np.linspace(0, len(mean) - 1, MOST_POINTS).astype(int))
        if len(line.values) > 20:
            axes.plot(line.steps[keep], line.values[keep], color=colour, linewidth=0.8, alpha=0.3)
        marker = "o" if len(keep) == 1 else ""
        axes.plot(line.steps[keep], mean[keep], color=colour, linewidth=1.8, marker=marker, label=line.label)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    said = "; ".join(
        f"{line.label}: from {line.values[0]:.3g} to {line.values[-1]:.3g}, lowest {line.values.min():.3g}"
        for line in lines
    )
    return to_svg(figure, name, f"{y_label} over steps. {said}")


def _spread(means: Sequence[np.ndarray]) -> float:
    return float(max(mean.max() for mean in means) / min(mean.min() for mean in means))


def _logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5: powers would be read as TeX."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def position_map(
    name: str, layout: Layout, merged: tuple[int, int], window: tuple[float, float], said: str
) -> str:
    """Height (down) against width position: dots are text, squares patches, triangles text after them.

    An image of many patches is drawn as the mesh of its ``merged`` rows and columns: a square for each would
    make the page heavy and the squares one.
    """
    figure, axes = new_figure(3.1, 3.1)
    low, high = window
    point = 2.4 * 72 / (high - low + 2)  # of a position's unit on paper, about
    many = merged[0] * merged[1] > MOST_SQUARES
    if many:
        _, heights, widths = layout.vision.reshape(3, *merged)
        _mesh(axes, heights[:, 0], widths[0], SERIES[1])
    for part, colour, marker in (
        (layout.before, SERIES[0], "o"),
        (layout.vision[:, : 0 if many else None], SERIES[1], "s"),
        (layout.after, SERIES[2], "^"),
    ):
        seen = part[:, (part[1:].min(0) >= low) & (part[1:].max(0) <= high)]
        side = min(4.0, max(1.0, 0.65 * point))
        axes.scatter(seen[2], seen[1], s=side**2, c=colour, marker=marker, linewidths=0)
    axes.set_xlim(low - 1, high + 1)
    axes.set_ylim(high + 1, low - 1)
    axes.set_aspect("equal")
    axes.set_xlabel("width position")
    axes.set_ylabel("height position")
    return to_svg(figure, name, said)


def spacing(name: str, even: Lines, guided: Lines, means: Lines, said: str) -> str:
    """Two meshes on one scale, each line a row or a column.

    In the guided one, steps that are larger than even ones are shaded (the more they grew, the stronger), and
    bars at its edges are the lines' ``means``.

    Args:
        even, guided: places of the rows and of the columns, from 0.
        means: each row's and column's mean relevance in [0, 1].
    """
    tall, wide = (max(float(lines[axis][-1]) for lines in (even, guided)) or 1.0 for axis in (0, 1))
    margin = 0.03 * max(tall, wide)
    bar = 0.35 * max(tall, wide)  # of relevance 1
    room = 2 * margin + bar * max(float(rho.max()) for rho in means)
    widths = wide + 2 * margin, wide + margin + room
    height = (tall + margin + room) * 4.0 / sum(widths)
    figure, panels = new_figure(4.0, min(4.0, max(0.8, height)) + 0.3, widths)
    for axes, lines, title in zip(panels, (even, guided), ("even spacing", "patch guidance"), strict=True):
        _mesh(axes, *lines, SERIES[1])
        axes.set_title(title, fontsize=11)
        axes.set_xlim(-margin if axes is panels[0] else -room, wide + margin)
        axes.set_ylim(tall + margin, -room)
        axes.set_aspect("equal")
        axes.axis("off")
    _stretched(panels[1], even, guided)
    thick = min(4.0, 90 / max(map(len, guided)))
    for places, rho, draw in ((guided[0], means[0], "hlines"), (guided[1], means[1], "vlines")):
        keep = slice(None, None, thinning(len(places)))
        ends = -margin - bar * rho[keep]
        getattr(panels[1], draw)(places[keep], -margin, ends, colors=SERIES[3], linewidth=thick)
    return to_svg(figure, name, said)


def _stretched(axes: Any, even: Lines, guided: Lines) -> None:
    """Bands where a step grew; where a row's and a column's cross, both colours lie on each other."""
    rows, columns = guided
    for axis, draw, (start, end) in (
        (0, axes.fill_between, (columns[0], columns[-1])),
        (1, axes.fill_betweenx, (rows[0], rows[-1])),
    ):
        keep = slice(None, None, thinning(len(guided[axis])))
        growth = np.diff(guided[axis][keep]) / np.diff(even[axis][keep]) - 1
        for place, step, more in zip(guided[axis][keep], np.diff(guided[axis][keep]), growth, strict=False):
            if more > 0.005:
                alpha = round(min(0.6, float(more)), 2)
                draw([start, end], place, place + step, color=SERIES[1], alpha=alpha, linewidth=0)


def thinning(lines: int) -> int:
    """Of so many rows or columns one in this many is drawn."""
    return -(-lines // MOST_LINES)


def _mesh(axes: Any, rows: np.ndarray, columns: np.ndarray, colour: str) -> None:
    """Lines through the rows and columns."""
    across, down = rows[:: thinning(len(rows))], columns[:: thinning(len(columns))]
    width = min(1.2, 60 / max(len(across), len(down)))
    axes.hlines(across, columns[0], columns[-1], colors=colour, linewidth=width)
    axes.vlines(down, rows[0], rows[-1], colors=colour, linewidth=width)


def new_figure(width: float, height: float, panels: Sequence[float] = (1,)) -> tuple[Any, Any]:
    """A figure and its axes, or an array of them where ``panels`` gives the widths of several."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "text.parse_math": False,
        "font.size": 10,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.12,
    }
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        return figure, figure.subplots(1, len(panels), width_ratios=panels)


def to_svg(figure: Any, name: str, said: str) -> str:
    from html import escape

    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = (
        re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", text.split(">", 1)[0])
        + ">"
        + text.split(">", 1)[1]
    )
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = text.replace(INK, "currentColor")
    for index, colour in enumerate(SERIES, 1):
        text = text.replace(colour, f"var(--s{index})")
    return text.replace("<svg", f'<svg class="chart" role="img" aria-label="{escape(said)}"', 1)
