"""What a sweep came to: its trials, the best of them as a configuration, and what sharing saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clinkd.config import RunConfig, to_yaml, with_values
from clinkd.stages.base import Run, write_whole
from clinkd.tune.space import reflects, trial_config
from clinkd.tune.study import own_trials

SHARED = ("prepare", "guide", "teacher", "label")
BEFORE = ("data.", "guide.", "model.vision", "teacher.", "sft.", "distill.cache")
"""Keys whose values change what is shared: their trials build it themselves."""


def rows_of(study: Any, config: RunConfig) -> list[dict[str, Any]]:
    """Trials, best first: ``trial``, ``state``, ``values``, scores by name, ``step``, ``seconds``, ``error``,
    ``rungs`` ({step: score}), ``front`` (on the Pareto front), ``model`` (the folder of a student that is at
    its end) and, of a population, ``settings`` (all values that made it, each ``from`` a step on).
    """
    names = config.sweep.metrics
    front = {trial.number for trial in study.best_trials} if len(names) > 1 else set()
    rows = []
    for trial in own_trials(study):
        scores: dict[str, Any] = dict.fromkeys(names)
        if trial.values:
            scores = dict(zip(names, trial.values, strict=True))
        seconds = trial.duration.total_seconds() if trial.duration else None
        rows.append(
            {"trial": trial.number, "state": trial.state.name.lower(), **scores,
             "values": trial.user_attrs.get("values", trial.params),
             "step": trial.user_attrs.get("step"), "seconds": seconds, "error": trial.user_attrs.get("error"),
             "rungs": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
             "front": trial.number in front, "model": trial.user_attrs.get("model")}
            | {key: trial.user_attrs[key] for key in ("settings",) if key in trial.user_attrs}
        )  # fmt: skip
    order = ("complete", "pruned", "running", "fail", "waiting")
    rows.sort(
        key=lambda row: (
            order.index(row["state"]), not row["front"], -(row[names[0]] or 0.0),
            -(row["step"] or 0), row["trial"],
        )
    )  # fmt: skip
    return rows


def best_config(config: RunConfig, rows: list[dict[str, Any]]) -> RunConfig | None:
    """The best trial's configuration, for `clinkd run`; of several metrics, the best by the first."""
    finished = [row for row in rows if row["state"] == "complete"]
    if not finished:
        return None
    values = finished[0]["values"]
    changed = with_values(config, values | {"run.name": f"{config.run.name}-best"[:64], "sweep": {}})
    if config.reflect.rounds and not reflects(values, config):
        return with_values(changed, {"reflect.rounds": 0})  # as it was tried
    return changed


def write_best(best: RunConfig | None, folder: Path) -> None:
    if best is not None:
        write_whole(folder / "best.yaml", to_yaml(best))


def importances(study: Any, config: RunConfig) -> dict[str, float]:
    """How much of the first metric's spread each key explains, in [0, 1], largest first; empty where too few
    trials have ended to say (fANOVA: Hutter et al., 2014).
    """
    import optuna

    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(done) < 4 or len({trial.values[0] for trial in done}) < 2:
        return {}
    evaluator: Any
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=config.run.seed)
    except ImportError:  # scikit-learn
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(
        optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
    )


def trial_folder(config: RunConfig, row: dict[str, Any]) -> Path:
    return Path(config.run.root) / trial_config(row["values"], config).run.name


def saved(run: Run, rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What the trials shared, and what each would have paid for it alone.

    Returns:
        ``shared`` (stages with seconds), ``shared_seconds``, ``saved_seconds``, ``teacher_passes`` (the cache
        was made so often; alone it would be once a trial), ``training_steps`` and ``steps_not_taken`` (ended
        at a rung).
    """
    shared = {name: run.done[name].meta["seconds"] for name in SHARED if name in run.done}
    own = [row for row in rows if not any(key.startswith(BEFORE) for key in row["values"])]
    total = round(sum(shared.values()), 1)
    taken = sum(row["step"] or 0 for row in rows)
    pruned = sum(steps - (row["step"] or 0) for row in rows if row["state"] == "pruned")
    return {
        "shared": shared, "shared_seconds": total, "saved_seconds": round(total * max(0, len(own) - 1), 1),
        "teacher_passes": ("label" in shared) + len(rows) - len(own), "trials_that_share": len(own),
        "training_steps": taken, "steps_not_taken": pruned,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], metrics: list[str]) -> str:
    """The trials as lines of text, best first."""
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    heads = ["trial", "state", "step", *metrics, *(key.split(".")[-1] for key in keys)]
    lines = [heads]
    for row in rows:
        values = [row["trial"], row["state"], row["step"], *(row[name] for name in metrics)]
        values += [row["values"].get(key) for key in keys]
        lines.append([_cell(value) for value in values] + ([row["error"]] if row["error"] else []))
    widths = [max(len(line[at]) for line in lines if at < len(line)) for at in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(widths[at]) if at < len(widths) else cell for at, cell in enumerate(line)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def account(facts: dict[str, Any]) -> str:
    """What sharing saved, in a line or two."""
    minutes = facts["saved_seconds"] / 60
    said = (
        f"shared: {', '.join(facts['shared'])} ({facts['shared_seconds'] / 60:.1f} min), by "
        f"{facts['trials_that_share']} trials: {minutes:.1f} min saved; the teacher was asked "
        f"{'once' if facts['teacher_passes'] == 1 else str(facts['teacher_passes']) + ' times'}"
    )
    if facts["steps_not_taken"]:
        said += f"\nended early: {facts['steps_not_taken']:,} training steps not taken"
    return said
