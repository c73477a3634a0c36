"""A sweep: many (distill, evaluate) over one shared guide, teacher and cache, by Ray Tune with Optuna; where
the space holds keys of reflection, a trial reflects too.

Decisions:
- What trials share is built before the first of them, by the stages themselves; a trial finds it in the
  artifact store, so the teacher is asked once however many trials there are.
- A trial is a run like any other, under the name ``<run>-trials/<values' digest>``: killed and started
  again, it finds its own artifacts.
- The study is an SQLite file beside the run, written live; Ray Tune keeps its own state in the same
  folder, and the same command goes on with both.
- As many trials run at one time as the cluster has room for whole ones; none, and the sweep says so at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clinkd.config import ConfigError, RunConfig, check_config, with_values
from clinkd.stages import outcome, pipeline, training
from clinkd.stages.base import Run, open_run, write_whole
from clinkd.stages.reflection import reflect
from clinkd.tune.space import check_space, suggest


def sweep(config: RunConfig) -> list[dict[str, Any]]:
    """Runs the sweep and returns its trials, best first: ``trial``, values by key, ``vg``, ``roc``,
    ``score``.

    Raises:
        ConfigError: the space does not fit the schema, or not one trial fits the cluster.
    """
    check_space(config)
    with open_run(config) as run:
        pipeline.share(run)
        if _reflects(config.sweep.space, config):
            training.corrector(run)
        run.dismiss()  # trials bring their own workers
        run.connect()
        rows = _tune(run)
        write_whole(run.folder / "sweep.json", json.dumps(rows, indent=1))
        return rows


def concurrent_trials(config: RunConfig, cpus: float, data_cpus: float = 0.0) -> int:
    """Whole trials that fit ``cpus`` at one time with ``data_cpus`` left for Ray Data; one fits always.

    Raises:
        ConfigError: not even one does.
    """
    wanted = config.compute.workers * config.compute.cpus_per_worker
    if wanted > cpus:
        raise ConfigError(
            f"compute.workers: a trial wants {wanted:g} CPUs, the cluster has {cpus:g}; lower compute.workers"
        )
    return max(1, int((cpus - data_cpus) // wanted))


def run_trial(values: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """One trial: distills and evaluates a student with these values; runs in a process of Ray Tune's."""
    config = trial_config(values, check_config(base, "sweep"))
    reflects = _reflects(values, config)
    with open_run(config, stream=open(os.devnull, "w")) as run:
        pipeline.share(run)
        training.distill(run)
        if reflects:
            reflect(run)
        outcome.evaluate(run, "reflect" if reflects else "distill")
        result = json.loads((run.folder / "eval.json").read_text())
    vg, roc = result["vg"]["mean"]["recall_at_50"], result["roc"]["mean"]["recall"]
    return {"vg": vg, "roc": roc, "score": (vg + roc) / 2}


def _reflects(keys: Iterable[str], config: RunConfig) -> bool:
    """Whether a trial reflects: it takes minutes, so only where its keys ask for it."""
    return config.reflect.rounds > 0 and any(key.startswith("reflect.") for key in keys)


def trial_config(values: dict[str, Any], base: RunConfig) -> RunConfig:
    """The configuration of a trial, named by a digest of its values."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    fixed = {"run.name": f"{base.run.name}-trial-{digest}", "evaluate.text_metrics": False}
    return with_values(base, values | fixed)


def _tune(run: Run) -> list[dict[str, Any]]:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints tables at verbose=0 too
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    from clinkd import cluster

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, options = run.config, run.config.sweep
    base = config.model_dump() | {
        "run": config.run.model_dump() | {"root": str(Path(config.run.root).resolve())}
    }

    def trainable(values: dict[str, Any]) -> None:
        tune.report(run_trial(values, base))

    folder = (run.folder / "sweep").resolve()
    folder.mkdir(exist_ok=True)
    search = OptunaSearch(
        partial(suggest, space=options.space), metric=options.metric, mode="max",
        sampler=optuna.samplers.TPESampler(seed=config.run.seed), study_name=config.run.name,
        storage=optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db"),
    )  # fmt: skip
    limited = tune.with_resources(trainable, {"cpu": 0.01})
    experiment = folder / "tune"
    if tune.Tuner.can_restore(str(experiment)):
        tuner = tune.Tuner.restore(str(experiment), limited, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            limited,
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=options.trials, metric=options.metric, mode="max",
                max_concurrent_trials=concurrent_trials(
                    config, cluster.usable_cpus(), cluster.data_cpus()
                ),
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
        )  # fmt: skip
    run.progress.start("sweep", options.trials)
    with _count_trials(run, f"sqlite:///{folder}/study.db"):
        results = tuner.fit()
    rows = [_row(results[number]) for number in range(len(results))]
    rows.sort(key=lambda row: (-(row["score"] if row["score"] is not None else -1), row["trial"]))
    run.progress.update(len(rows), record=False)
    run.progress.finish()
    return rows


@contextlib.contextmanager
def _count_trials(run: Run, storage: str) -> Iterator[None]:
    """Shows the study's finished trials and the best score while Ray Tune works.

    Read from the study: a callback of Ray Tune's would be pickled, and a progress view cannot be.
    """
    import optuna

    stopped = threading.Event()

    def look() -> None:
        shown = 0
        while not stopped.wait(2.0):
            with contextlib.suppress(KeyError):  # the study is made with the first trial
                study = optuna.load_study(study_name=run.config.run.name, storage=storage)
                ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
                scores = [trial.value for trial in ended if trial.value is not None]
                if len(ended) > shown:
                    shown = len(ended)
                    best = f", best {run.config.sweep.metric} {max(scores):.4g}" if scores else ""
                    run.progress.say(f"sweep: {shown} of {run.config.sweep.trials} trials{best}")
                    run.progress.update(shown, record=False)

    watcher = threading.Thread(target=look, name="count trials", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()


def _row(result: Any) -> dict[str, Any]:
    metrics = result.metrics or {}
    found = {key: metrics.get(key) for key in ("vg", "roc", "score")}
    error = str(result.error).splitlines()[0] if result.error else None
    return {"trial": metrics.get("trial_id", "?"), **(result.config or {}), **found, "error": error}


def table(rows: list[dict[str, Any]]) -> str:
    """The trials as lines of text, best first."""
    keys = [key for key in rows[0] if key != "error"] if rows else []
    lines = ["  ".join(f"{key.split('.')[-1]:>11}" for key in keys)]
    for row in rows:
        cells = [f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        lines.append(
            "  ".join(f"{cell[-11:]:>11}" for cell in cells) + (f"  {row['error']}" if row["error"] else "")
        )
    return "\n".join(lines)
