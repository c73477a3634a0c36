"""A sweep as one HTML page: the best, importance, curves, parallel coordinates, Pareto front, all trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clinkd.report import sweep_plots
from clinkd.report.html import environment, put, signed_script

MOST_ROWS = 500
STATES = ("complete", "pruned", "fail")


def build_sweep(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    facts: Mapping[str, Any],
    shares: Mapping[str, float],
    out: Path,
) -> Path:
    """Writes the page and returns ``out``.

    Args:
        rows, facts: as ``tune.summary`` gives them. shares: importance by key; empty: not known yet.
    """
    charts = [("How the best came about", sweep_plots.history(rows, metric)) for metric in metrics]
    if any(len(row["rungs"]) > 1 for row in rows):
        charts.append(("Score at the rungs", sweep_plots.learning(rows, metrics[0])))
    if shares:
        charts.append(("Importance", sweep_plots.importance(shares)))
    if len(metrics) > 1:
        charts.append(("Pareto front", sweep_plots.front(rows, metrics)))
    script, digest = signed_script()
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    page = environment(autoescape=True).get_template("sweep.html.j2").render(
        name=name, metrics=metrics, keys=keys, rows=rows[:MOST_ROWS], left_out=max(0, len(rows) - MOST_ROWS),
        charts=[(title, Markup(chart)) for title, chart in charts],
        wide=Markup(sweep_plots.parallel(rows, metrics[0])), facts=facts,
        states={state: sum(row["state"] == state for row in rows) for state in STATES},
        best=next((row for row in rows if row["state"] == "complete"), None),
        script=script, script_hash=digest,
    )  # fmt: skip
    return put(out, page)
