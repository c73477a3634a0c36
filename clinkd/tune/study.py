"""The sweep's memory: an Optuna study in a database, from which everything else follows.

Decisions:
- The study is the one truth: a trial that it holds as finished stays, one that it holds as running is given
  out again under its number and values, and goes on from its own checkpoints. Ray Tune's own notes are not
  needed to go on, so a driver may be killed at any moment.
- The sampler is seeded anew for every trial, by the sweep's seed and the trial's number: what is drawn
  follows from the trials before it alone, killed or not. With several trials at one time, which of them are
  known when another is drawn is a matter of timing; grid and random search do not care.
- Early stopping is Optuna's pruners', which read the values at the rungs from the study: ASHA is its
  ``SuccessiveHalvingPruner`` (Li et al., 2020), HyperBand its ``HyperbandPruner`` (Li et al., 2018).
- Names, values and numbers alone go into the study, and of an error only its type: a database may be shared.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from clinkd.config import ConfigError, RunConfig
from clinkd.tune.space import grid, suggest, trials_wanted

SETTINGS, METRICS, FOREIGN, WANTED = "settings", "metrics", "warm_start", "trials"


def storage_url(config: RunConfig) -> str:
    """Where the study lies: the given database, or an SQLite file in the sweep's folder."""
    return config.sweep.storage or sqlite_url(sweep_folder(config))


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder.resolve()}/study.db"


def sweep_folder(config: RunConfig) -> Path:
    return Path(config.run.root) / config.run.name / "sweep"


def settings_digest(config: RunConfig) -> str:
    """Of all that makes two sweeps one: space, sampler, stopping, and what every trial starts from."""
    values = config.model_dump(exclude={"run": {"root"}, "compute": True, "watch": True, "sinks": True})
    for key in ("trials", "storage", "warm_start", "concurrent", "retries"):
        del values["sweep"][key]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class NoStudy(ConfigError):
    """The study that is looked for has not begun."""


def open_study(config: RunConfig, *, create: bool = True) -> Any:
    """The sweep's ``optuna.Study``, made if need be.

    Raises:
        NoStudy: it is only looked for (``create=False``) and has not begun.
        ConfigError: no database there, or the study was begun with other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url, name = storage_url(config), config.run.name
    # Optuna writes its version where that is missing, whoever opens: one who only looks would do it in the
    # middle of a sweep's beginning, which then fails.
    if not create and not _has_begun(url, name):
        raise NoStudy(f"{_without_password(url)}: no study of the name {name} there; `clinkd sweep` makes it")
    try:
        storage = optuna.storages.RDBStorage(
            url, skip_table_creation=not create, skip_compatibility_check=not create
        )
        if not create:
            return optuna.load_study(study_name=name, storage=storage)
        study = optuna.create_study(
            study_name=name, storage=storage, load_if_exists=True, pruner=_pruner(config),
            directions=["maximize"] * len(config.sweep.metrics),
        )  # fmt: skip
    except Exception as error:  # SQLAlchemy's and the drivers' own
        raise ConfigError(f"sweep.storage: {_without_password(url)}: {_first_line(error)}") from None
    begun = study.user_attrs.get(SETTINGS)
    if begun is None:
        study.set_user_attr(SETTINGS, settings_digest(config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(config.sweep.metrics)
        if config.sweep.warm_start:
            _warm_start(study, config)
    elif begun != settings_digest(config):
        raise ConfigError(
            f"run.name: a sweep {name} was begun with another space or other settings; give "
            f"run.name=another, or put {sweep_folder(config)} away"
        )
    return study


def _has_begun(url: str, name: str) -> bool:
    """Whether the study's own row is there, which comes last; true too of a server that does not answer."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(url)
        try:
            with engine.connect() as connection:
                if not sqlalchemy.inspect(connection).has_table("studies"):
                    return False
                names = sqlalchemy.table("studies", sqlalchemy.column("study_name"))
                return name in connection.scalars(sqlalchemy.select(names.c.study_name))
        finally:
            engine.dispose()
    except Exception:  # a driver that is not installed is none of SQLAlchemy's own errors
        return not url.startswith("sqlite")  # whose file is not there yet


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    try:
        return str(make_url(url))
    except Exception:
        return "(not a URL)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pruner(config: RunConfig) -> Any:
    from optuna import pruners

    options = config.sweep
    if options.scheduler == "asha":
        return pruners.SuccessiveHalvingPruner(
            min_resource=options.grace, reduction_factor=options.reduction, bootstrap_count=0
        )
    if options.scheduler == "hyperband":
        return pruners.HyperbandPruner(
            min_resource=options.grace, max_resource=config.distill.optim.steps or "auto",
            reduction_factor=options.reduction,
        )  # fmt: skip
    return pruners.NopPruner()


def _warm_start(study: Any, config: RunConfig) -> None:
    """Takes over the finished trials of a former study whose values lie in this one's space."""
    import optuna

    source = str(config.sweep.warm_start)
    folder = Path(source)
    candidates = [folder / "sweep", folder] if "://" not in source else []
    found = [part for part in candidates if (part / "study.db").is_file()]
    if "://" not in source and not found:
        raise ConfigError(f"sweep.warm_start: {source} holds no sweep/study.db; give a former sweep's folder")
    url = sqlite_url(found[0]) if found else source
    taken = 0
    for summary in optuna.get_all_study_summaries(url):
        former = optuna.load_study(study_name=summary.study_name, storage=url)
        if former.metric_names != config.sweep.metrics:
            continue
        for trial in former.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            fixed = optuna.trial.FixedTrial(trial.params)
            try:
                with warnings.catch_warnings():  # it says of a value outside, and lets it pass
                    warnings.simplefilter("error")
                    suggest(fixed, config.sweep.space)
            except (ValueError, UserWarning):
                continue
            copy = optuna.trial.create_trial(
                params={key: trial.params[key] for key in fixed.distributions},
                distributions=fixed.distributions,
                values=trial.values,
                user_attrs={FOREIGN: True},
            )
            study.add_trial(copy)
            taken += 1
    if not taken:
        raise ConfigError(
            f"sweep.warm_start: {source} holds no finished trial of this space by {config.sweep.metrics}"
        )


def sampler(config: RunConfig, number: int) -> Any:
    """Optuna's sampler for the trial of this number."""
    from optuna import samplers

    digest = hashlib.sha256(f"{config.run.seed} {number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    kind = config.sweep.sampler
    if kind in ("random", "grid"):
        return samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, config.sweep.trials // 4)))
    first = min(10, 1 + config.sweep.trials // 3)  # drawn at random
    if kind == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=first)
    # A trial that is still running counts as a poor one, so that two at one time are not drawn alike. Each
    # key by itself: a few trials do not show how keys depend on each other (benchmarks/search.py).
    return samplers.TPESampler(
        seed=seed, constant_liar=True, n_startup_trials=first, multivariate=False
    )  # fmt: skip


def combinations(config: RunConfig) -> list[dict[str, Any]]:
    """All values of the space with each other, in an order that is the seed's.

    Optuna's own grid sampler ends the optimisation itself, which only its own loop may be told.
    """
    sides = grid(config.sweep.space)
    found = [dict(zip(sides, values, strict=True)) for values in product(*sides.values())]
    random.Random(config.run.seed).shuffle(found)
    return found


class Asker:
    """Gives out trials, first those that were running when the last driver ended.

    ``fixed``: values to try in the place of what the sampler draws, in their order.
    """

    def __init__(
        self, config: RunConfig, study: Any, fixed: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        from optuna.trial import TrialState

        self.config, self.study, self.fixed = config, study, fixed
        own = own_trials(study)
        self._left_over = [trial for trial in own if trial.state == TrialState.RUNNING]
        self._grid = combinations(config) if config.sweep.sampler == "grid" else []
        self._given = sum(trial.state.is_finished() for trial in own)
        study.set_user_attr(WANTED, self.wanted)

    @property
    def wanted(self) -> int:
        """Trials in all, of an ablation its arms and seeds; who looks on finds it in the study."""
        return len(self.fixed) if self.fixed is not None else trials_wanted(self.config)

    def ask(self) -> tuple[Any, dict[str, Any]] | None:
        """(``optuna.trial.Trial``, values); None: there are no more."""
        import optuna
        from optuna.trial import TrialState

        if self._given >= self.wanted and not self._left_over:
            return None
        self._given += 1
        if self._left_over:
            trial = optuna.trial.Trial(self.study, self._left_over.pop(0)._trial_id)
        else:
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = sampler(self.config, number)
            if self._grid and not any(trial.state == TrialState.WAITING for trial in own_trials(self.study)):
                self.study.enqueue_trial(self._grid[number % len(self._grid)])
            trial = self.study.ask()
        if self.fixed is not None:
            values = dict(self.fixed[trial.number])
            trial.set_user_attr("values", values)
            return trial, values
        return trial, suggest(trial, self.config.sweep.space)

    def everyone(self) -> list[tuple[Any, dict[str, Any]]]:
        """All trials by their number, those that have ended too: what a population is played again with."""
        import optuna

        found = [
            (trial, suggest(optuna.trial.FixedTrial(trial.params), self.config.sweep.space))
            for trial in own_trials(self.study) if trial.state.is_finished()
        ]  # fmt: skip
        while asked := self.ask():
            found.append(asked)
        return sorted(found, key=lambda pair: pair[0].number)


def own_trials(study: Any) -> list[Any]:
    """The study's trials without those of a former one."""
    return [trial for trial in study.get_trials(deepcopy=False) if FOREIGN not in trial.user_attrs]
