"""A sweep on a terminal while it runs, read from its study: from any machine that reaches the database."""

from __future__ import annotations

import sys
import time
from typing import Any

from clinkd.config import RunConfig
from clinkd.tune.space import trials_wanted
from clinkd.tune.study import NoStudy, open_study, own_trials
from clinkd.tune.summary import rows_of, table

SHOWN = 12


def watch(config: RunConfig, interval: float = 2.0) -> None:
    """Shows the sweep until all its trials have ended, or Ctrl-C; on a terminal it waits for one to begin.

    Raises:
        NoStudy: no such sweep, and nobody at a terminal to wait for it.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        print(view(open_study(config, create=False), config))
        return
    study = _awaited(config, console, interval)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(view(study, config), refresh=True)
            if ended(study) >= trials_wanted(config):
                return
            time.sleep(interval)


def _awaited(config: RunConfig, console: Any, interval: float) -> Any:
    with console.status(f"sweep {config.run.name} has not begun; waiting for it (Ctrl-C to stop)"):
        while True:
            try:
                return open_study(config, create=False)
            except NoStudy:
                time.sleep(interval)


def ended(study: Any) -> int:
    return sum(trial.state.is_finished() for trial in own_trials(study))


def view(study: Any, config: RunConfig) -> str:
    """Counts, what runs now, and the best trials, as text."""
    rows = rows_of(study, config)
    counts = [
        f"{sum(row['state'] == state for row in rows)} {word}"
        for state, word in (
            ("complete", "done"),
            ("pruned", "ended early"),
            ("fail", "failed"),
            ("running", "running"),
        )
    ]
    lines = [f"sweep {config.run.name}: {trials_wanted(config)} trials: {', '.join(counts)}"]
    for row in rows:
        if row["state"] == "running":
            last = list(row["rungs"].items())[-1:]
            at = (
                f"step {last[0][0]}, {config.sweep.metrics[0]} {last[0][1]:.4g}"
                if last
                else "before its first rung"
            )
            lines.append(f"  trial {row['trial']}: {at}")
    over = [row for row in rows if row["state"] != "running"][:SHOWN]
    return "\n".join(lines + (["", table(over, config.sweep.metrics)] if over else []))
