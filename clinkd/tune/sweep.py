"""A sweep: many (distill, evaluate) over one shared guide, teacher and cache, by Ray Tune with Optuna; where
the space holds keys of reflection, a trial reflects too.

Decisions:
- What trials share is built before the first of them, by the stages themselves; a trial finds it in the
  artifact store, so the teacher is asked once however many trials there are. What a trial's values change it
  builds itself.
- Ray Tune places trials and hears of their rungs; what to try and when to stop is the study's (study.py).
- As many trials run at one time as the cluster has room for whole ones; none, and the sweep says so at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd import cluster, metrics
from clinkd.config import ConfigError, RunConfig
from clinkd.report.sweep import build_sweep
from clinkd.stages import pipeline, training
from clinkd.stages.base import Run, open_run, write_whole
from clinkd.tune.board import Board
from clinkd.tune.member import Segments
from clinkd.tune.space import check_space, reflects
from clinkd.tune.study import Asker, open_study, own_trials, sweep_folder
from clinkd.tune.summary import best_config, importances, rows_of, saved, write_best
from clinkd.tune.trainable import SweepTrial


@dataclass(frozen=True)
class Swept:
    """What a sweep came to."""

    rows: list[dict[str, Any]]  # trials, best first
    folder: Path
    facts: dict[str, Any]  # seconds, trials, what was saved


def sweep(config: RunConfig, fixed: Sequence[Mapping[str, Any]] | None = None) -> Swept:
    """Runs the sweep, or goes on with it.

    Args:
        fixed: the values of the trials, in the place of what a sampler draws.

    Raises:
        ConfigError: the space does not fit the schema, not one trial fits the cluster, or the study was begun
            with other settings.
    """
    if fixed is None:
        check_space(config)
    if config.data.validation_fraction == 0:
        raise ConfigError(
            "data.validation_fraction: a sweep chooses by the validation split; give it a share"
        )
    keys = [*config.sweep.space, *(key for values in fixed or [] for key in values)]
    with open_run(config) as run, _alone(sweep_folder(config)):
        run.connect()
        most = concurrent_trials(config, _nodes(), cluster.data_cpus())
        if config.sweep.population and config.sweep.trials > most and not cluster.started_here():
            raise ConfigError(
                f"sweep.trials: a population of {config.sweep.trials} trains side by side, the cluster has "
                f"room for {most}; lower it, or take scheduler: asha"
            )
        study = open_study(config)
        pipeline.share(run)
        if reflects(keys, config):
            training.corrector(run)
        run.dismiss()  # trials bring their own workers
        _tune(run, Asker(config, study, fixed), most)
        rows = rows_of(study, config)
        facts = saved(run, rows, training.distill_steps(run))
        write_whole(run.folder / "sweep.json", json.dumps({"trials": rows} | facts, indent=1))
        if fixed is None:
            if not config.sweep.population:  # a population's settings changed under way
                write_best(best_config(config, rows), run.folder)
            shares = importances(study, config)
            build_sweep(config.run.name, rows, config.sweep.metrics, facts, shares, run.folder / "sweep.html")
        return Swept(rows, run.folder, facts)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One driver a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "driver.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run.name: {folder.parent.name}: another process drives this sweep") from None
        yield


def concurrent_trials(config: RunConfig, nodes: list[Mapping[str, float]], data_cpus: float = 0.0) -> int:
    """Whole trials that fit the cluster at one time.

    Args:
        nodes: resources of each (``CPU``, ``GPU``); a worker lies on one of them.
        data_cpus: left for Ray Data; the first trial fits without.

    Raises:
        ConfigError: not even one does.
    """
    compute, total = config.compute, sum(node.get("CPU", 0.0) for node in nodes)
    slots = 0
    for node in nodes:
        room = node.get("CPU", 0.0) / compute.cpus_per_worker
        if compute.gpus_per_worker:
            room = min(room, node.get("GPU", 0.0) / compute.gpus_per_worker)
        slots += int(room + 1e-9)
    if slots < compute.workers:
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        wants = f"{compute.workers} workers of {compute.cpus_per_worker:g} CPU"
        wants += f" and {compute.gpus_per_worker:g} GPU" if compute.gpus_per_worker else ""
        raise ConfigError(
            f"compute.workers: a trial wants {wants}, the cluster has {total:g} CPUs and {gpus:g} GPUs on "
            f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}; lower compute.workers"
        )
    wanted = compute.workers * compute.cpus_per_worker
    fit = min(slots // compute.workers, int((total - data_cpus) / wanted + 1e-9))
    return max(1, min(fit, config.sweep.concurrent or fit))


def _nodes() -> list[Mapping[str, float]]:
    """Resources of the nodes; of a Ray that was started here, the real cores."""
    import ray

    if cluster.started_here():
        return [{"CPU": float(cluster.real_cores()), "GPU": ray.cluster_resources().get("GPU", 0.0)}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _tune(run: Run, asker: Asker, most: int) -> None:
    """Drives the trials that are left, ``most`` at one time."""
    config = run.config
    ended = sum(trial.state.is_finished() for trial in own_trials(asker.study))
    run.progress.start("sweep", asker.wanted)
    run.progress.update(ended, record=False)
    if ended < asker.wanted:
        board = Board(sweep_folder(config) / "tensorboard") if config.sinks.tensorboard else None
        notes = sweep_folder(config).resolve() / "tune"
        shutil.rmtree(notes, ignore_errors=True)  # the study is what a sweep goes on from
        tuner = _tuner(config, asker, asker.wanted - ended, most, board, notes)
        with _count_trials(run, asker):
            tuner.fit()
        if board is not None:
            board.close()
        shutil.rmtree(notes.parent / "workers", ignore_errors=True)
        if any(not trial.state.is_finished() for trial in own_trials(asker.study)):
            raise KeyboardInterrupt  # Ray Tune takes a Ctrl-C for itself and comes back as if all were done
        for trial in own_trials(asker.study):
            Segments(config, trial.number).discard()
    run.progress.update(asker.wanted, record=False)
    run.progress.finish()


def _tuner(config: RunConfig, asker: Asker, left: int, most: int, board: Board | None, notes: Path) -> Any:
    """Ray Tune over the ``left`` trials of the study; its own notes go into the folder ``notes``."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints tables at verbose=0 too
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the configuration stay true
    from ray import tune

    from clinkd.tune.search import CLONES, StudyScheduler, StudySearch, population

    base = config.model_dump()
    base["run"] |= {"root": str(Path(config.run.root).resolve())}
    trainable = tune.with_parameters(SweepTrial, base=base, local=cluster.started_here())
    search = StudySearch(asker, board)
    space: dict[str, Any] = {}
    how: dict[str, Any] = {
        "search_alg": search, "scheduler": StudyScheduler(search), "num_samples": left,
        "max_concurrent_trials": most,
    }  # fmt: skip
    if config.sweep.population:  # Ray Tune lets no searcher stand beside it: all are drawn before
        how = {"scheduler": population(search, config)}
        space = {"trial": tune.grid_search(search.all_at_once())}
        (sweep_folder(config) / CLONES).unlink(missing_ok=True)  # what was cloned before is told again
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": 0.01}),
        param_space=space,
        tune_config=tune.TuneConfig(reuse_actors=True, **how),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(notes.parent), verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.sweep.retries),
        ),
    )  # fmt: skip


@contextlib.contextmanager
def _count_trials(run: Run, asker: Asker) -> Iterator[None]:
    """Shows the study's finished trials and the best score while Ray Tune works.

    Read from the study: a callback of Ray Tune's would be pickled, and a progress view cannot be.
    """
    stopped, study = threading.Event(), asker.study

    def look() -> None:
        shown = sum(trial.state.is_finished() for trial in own_trials(study))
        while not stopped.wait(1.0):
            trials = own_trials(study)
            ended = [trial for trial in trials if trial.state.is_finished()]
            _publish(trials, ended, asker)
            if len(ended) > shown:
                shown = len(ended)
                run.progress.say(f"sweep: {shown} of {asker.wanted} trials ended{_best(ended, run.config)}")
                run.progress.update(shown, record=False)

    watcher = threading.Thread(target=look, name="count trials", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()


def _best(ended: list[Any], config: RunConfig) -> str:
    tops = [f"{name} {value:.4g}" for name, value in _tops(ended, config).items()]
    return f", best {', '.join(tops)}" if tops else ""


def _tops(ended: list[Any], config: RunConfig) -> dict[str, float]:
    """Best value of each metric; empty where no trial has one."""
    values = [trial.values for trial in ended if trial.values]
    names = config.sweep.metrics if values else []
    return {name: max(row[at] for row in values) for at, name in enumerate(names)}


def _publish(trials: list[Any], ended: list[Any], asker: Asker) -> None:
    from optuna.trial import TrialState

    name, states = asker.config.run.name, Counter(trial.state for trial in trials)
    for state in TrialState:
        metrics.SWEEP_TRIALS.set(states[state], run=name, state=state.name.lower())
    metrics.SWEEP_WANTED.set(asker.wanted, run=name)
    for metric, value in _tops(ended, asker.config).items():
        metrics.SWEEP_BEST.set(value, run=name, metric=metric)
