"""The charts of a sweep: how the best came about, curves, importance, parallel coordinates, Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clinkd.report.plots import INK, SERIES, new_figure, to_svg

Rows = Sequence[Mapping[str, Any]]
MOST_TRIALS = 200


def history(rows: Rows, metric: str) -> str:
    """Scores in the order of the trials, and the best so far."""
    done = sorted((row for row in rows if row[metric] is not None), key=lambda row: row["trial"])
    numbers = np.array([row["trial"] for row in done])
    values = np.array([row[metric] for row in done], dtype=float)
    figure, axes = new_figure(4.2, 2.5)
    early = np.array([row["state"] == "pruned" for row in done], dtype=bool)
    axes.scatter(numbers[~early], values[~early], s=14, color=SERIES[0], linewidths=0, label="trial")
    if early.any():
        axes.scatter(numbers[early], values[early], s=14, facecolors="none", edgecolors=SERIES[0],
                     linewidths=0.8, label="ended early")  # fmt: skip
    if len(values):
        best = np.maximum.accumulate(values)
        axes.step(numbers, best, where="post", color=SERIES[1], linewidth=1.8, label="best so far")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    top = f"best {values.max():.3g} of {len(values)} trials" if len(values) else "no trial has ended"
    return to_svg(figure, f"history-{metric}", f"{metric} by trial: {top}")


def learning(rows: Rows, metric: str) -> str:
    """Scores at the rungs of every trial; the best in colour."""
    figure, axes = new_figure(4.2, 2.5)
    drawn = [row for row in rows if row["rungs"]][:MOST_TRIALS]
    for place, row in reversed(list(enumerate(drawn))):
        steps = [int(step) for step in row["rungs"]]
        strong = place == 0
        axes.plot(
            steps, list(row["rungs"].values()), color=SERIES[1] if strong else INK, marker="o", markersize=3,
            linewidth=1.8 if strong else 0.8, alpha=1 if strong else 0.25,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    ended = sum(row["state"] == "pruned" for row in rows)
    return to_svg(figure, "rungs", f"{metric} at the rungs of {len(drawn)} trials; {ended} ended early")


def importance(shares: Mapping[str, float]) -> str:
    """How much of the score's spread each key explains."""
    names = list(shares)[::-1]
    figure, axes = new_figure(4.2, 0.6 + 0.28 * max(1, len(names)))
    axes.barh(names, [shares[name] for name in names], color=SERIES[0], height=0.6)
    axes.set_xlabel("share of the score's spread")
    said = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    return to_svg(figure, "importance", f"Importance: {said}")


def parallel(rows: Rows, metric: str) -> str:
    """One line a trial over all keys, each scaled to its own range; the better, the stronger."""
    done = [row for row in rows if row[metric] is not None][:MOST_TRIALS]
    keys = list(dict.fromkeys(key for row in done for key in row["values"]))
    figure, axes = new_figure(8.6, 3.0)
    columns = [*keys, metric]
    scaled = {key: _scaled([row["values"].get(key) for row in done]) for key in keys}
    scaled[metric], ticks = _scaled([row[metric] for row in done]), range(len(columns))
    for place in reversed(range(len(done))):
        strength = scaled[metric][0][place]
        heights = [scaled[key][0][place] for key in columns]
        axes.plot(
            ticks, heights, color=SERIES[1] if place == 0 else SERIES[0], linewidth=2.2 if place == 0 else 1,
            alpha=1 if place == 0 else 0.1 + 0.5 * float(np.nan_to_num(strength)),
        )  # fmt: skip
    axes.set_xticks(list(ticks), [key.split(".")[-1] for key in columns], rotation=20, ha="right", fontsize=8)
    axes.set_yticks([])
    for place, key in enumerate(columns):
        low, high = scaled[key][1]
        axes.text(place, -0.07, low, ha="center", va="top", fontsize=7)
        axes.text(place, 1.05, high, ha="center", va="bottom", fontsize=7)
        axes.axvline(place, color=INK, linewidth=0.5, alpha=0.4)
    axes.set_ylim(-0.2, 1.2)
    axes.grid(False)
    return to_svg(figure, "parallel", f"Parallel coordinates of {len(done)} trials over {', '.join(columns)}")


def _scaled(values: list[Any]) -> tuple[np.ndarray, tuple[str, str]]:
    """Heights in [0, 1] (NaN: not there), and what stands at both ends; words by their order."""
    known = [value for value in values if value is not None]
    if not known:
        return np.full(len(values), np.nan), ("", "")
    if any(isinstance(value, (str, bool, list)) for value in known):
        names = sorted({str(value) for value in known})
        places = {name: at / max(1, len(names) - 1) for at, name in enumerate(names)}
        heights = [np.nan if value is None else places[str(value)] for value in values]
        return np.array(heights), (names[0], names[-1])
    low, high = min(known), max(known)
    span = (high - low) or 1
    heights = [np.nan if value is None else (value - low) / span for value in values]
    return np.array(heights), (f"{low:.3g}", f"{high:.3g}")


def front(rows: Rows, metrics: Sequence[str]) -> str:
    """The trials by the first two metrics; those that no other beats in all are joined."""
    first, second = metrics[:2]
    done = [row for row in rows if row[first] is not None and row[second] is not None]
    figure, axes = new_figure(4.2, 3.0)
    for on_front, colour in ((False, SERIES[0]), (True, SERIES[1])):
        chosen = [row for row in done if row["front"] == on_front]
        axes.scatter(
            [row[first] for row in chosen], [row[second] for row in chosen], s=22, color=colour, linewidths=0,
            label="on the front" if on_front else "beaten in all",
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel(first)
    axes.set_ylabel(second)
    count = sum(row["front"] for row in done)
    return to_svg(figure, "front", f"{second} against {first}: {count} of {len(done)} trials on the front")
