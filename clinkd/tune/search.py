"""What Ray Tune asks: a searcher that hands out the study's trials, and a scheduler that lets it prune them.

Both are pickled with Ray Tune's notes; the study itself is not: it stays with the driver.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from clinkd.config import ParameterSpace, RunConfig
from clinkd.tune.board import Board
from clinkd.tune.space import ends
from clinkd.tune.study import Asker, sweep_folder

CLONES = "clones.jsonl"


class StudySearch(Searcher):  # type: ignore[misc]
    """Trials of an Optuna study, by Ray Tune's trial id."""

    def __init__(self, asker: Asker, board: Board | None = None) -> None:
        super().__init__(metric=asker.config.sweep.metrics[0], mode="max")
        self.asker, self.board = asker, board
        self.trials: dict[str, Any] = {}
        self.numbers: dict[str, int] = {}  # of trials that are no more as well
        self.pruned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("asker", "trials", "board")}

    def suggest(self, trial_id: str) -> Any:
        found = self.asker.ask()
        if found is None:
            return Searcher.FINISHED
        self.trials[trial_id], values = found
        self.numbers[trial_id] = self.trials[trial_id].number
        return {"values": values, "number": self.trials[trial_id].number}

    def all_at_once(self) -> list[dict[str, Any]]:
        """Every trial, under its number in the place of an id, until Ray Tune gives one."""
        found = self.asker.everyone()
        self.trials |= {str(trial.number): trial for trial, _ in found}
        return [{"values": values, "number": trial.number} for trial, values in found]

    def look(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Notes a rung; whether the trial is to go on."""
        trial, names = self.trials[trial_id], self.asker.config.sweep.metrics
        if self.asker.config.sweep.population:
            self._note_clone(result)
        known = self.asker.study.get_trials(deepcopy=False)[trial.number]
        if known.state.is_finished():  # of a population that is played again
            return True
        trial.set_user_attr("step", result["step"])
        if result["done"] and result.get("model"):
            trial.set_user_attr("model", result["model"])
        if self.asker.config.sweep.population:
            trial.set_user_attr("settings", json.loads(result["settings"]))
        if self.board is not None and result["step"] not in known.intermediate_values:
            self.board.rung(trial.number, {name: result[name] for name in names}, result["step"])
        if len(names) > 1:  # Optuna prunes by one number only
            return True
        if result["step"] not in known.intermediate_values:
            trial.report(result[names[0]], result["step"])
        if result["done"] or not trial.should_prune():
            return True
        self.pruned.add(trial_id)
        return False

    def _note_clone(self, result: dict[str, Any]) -> None:
        """A line of clones.jsonl: what a trial went on from, and the learning rate of its next step."""
        if result["cloned"]:
            with (sweep_folder(self.asker.config) / CLONES).open("a") as file:
                file.write(result["cloned"] + "\n")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass  # the scheduler looked, before

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        from optuna.trial import TrialState

        if result and result.get("done"):  # of the end Ray Tune tells no scheduler
            self.look(trial_id, result)
        trial, config = self.trials.pop(trial_id), self.asker.config
        if self.asker.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            return
        if self.board is not None and result:
            values = trial.user_attrs.get("values", trial.params)
            self.board.ended(trial.number, values, {name: result[name] for name in config.sweep.metrics})
        if error or not result:
            self.asker.study.tell(trial, state=TrialState.FAIL)
        elif trial_id in self.pruned:
            self.asker.study.tell(trial, state=TrialState.PRUNED)
            if result.get("draft"):  # nobody goes on with it
                shutil.rmtree(result["draft"], ignore_errors=True)
        else:
            self.asker.study.tell(trial, [result[name] for name in config.sweep.metrics])

    def failed(self, trial_id: str, error: BaseException | None) -> None:
        """Notes the type of a trial's error; its text may name data."""
        if trial_id in self.trials:
            cause: Any = getattr(error, "cause", None)
            if not isinstance(cause, BaseException):  # Ray keeps the text alone of what cannot be pickled
                cause = error
            self.trials[trial_id].set_user_attr("error", type(cause).__name__)

    def save(self, checkpoint_path: str) -> None:
        pass  # the study is the driver's memory


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """Stops a trial where the study's pruner says so."""

    def __init__(self, search: StudySearch) -> None:
        super().__init__()
        self.search = search

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "search"}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self.search.look(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.search.failed(trial.trial_id, trial.get_error())


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population based training (Jaderberg et al., 2017) whose rungs the study sees.

    What it draws follows from the seed, the trial and the step, so that it can be played again.

    Args:
        members: of the population; none goes on before all of them are there.
    """

    def __init__(self, search: StudySearch, seed: int, members: int, **options: Any) -> None:
        super().__init__(**options)
        self.search, self.seed, self.members = search, seed, members

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "search"}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        number = trial.config["trial"]["number"]
        self.search.trials[trial.trial_id] = self.search.trials.pop(str(number))
        self.search.numbers[trial.trial_id] = number
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.search.look(trial.trial_id, result)
        if len(self._trial_state) < self.members:
            # Ray Tune adds them one after the other, and what is played again is there at once: alone, it
            # would not wait.
            self._save_trial_state(self._trial_state[trial], result["step"], result, trial)
            return str(TrialScheduler.PAUSE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _checkpoint_or_exploit(self, trial: Any, *others: Any) -> None:
        step = self._trial_state[trial].last_train_time
        with drawn_by(f"{self.seed} {self.search.numbers[trial.trial_id]} {step}"):
            super()._checkpoint_or_exploit(trial, *others)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
        """The other's values, perturbed; who it is stays its own."""
        config, how = super()._get_new_config(trial, trial_to_clone)
        config["trial"]["number"] = self.search.numbers[trial.trial_id]
        return config, how

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.search.on_trial_complete(trial.trial_id, result)
        super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.search.failed(trial.trial_id, trial.get_error())
        self.search.on_trial_complete(trial.trial_id, None, error=True)
        super().on_trial_error(tune_controller, trial)


@contextlib.contextmanager
def drawn_by(seed: str) -> Iterator[None]:
    """Ray Tune draws from Python's and numpy's own generators: seeded, and afterwards as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def population(search: StudySearch, config: RunConfig) -> Population:
    """The scheduler of a sweep by population based training."""
    space = config.sweep.space

    def into_bounds(values: dict[str, Any]) -> dict[str, Any]:
        """Perturbed values, put back into the space."""
        trial = values["trial"]
        own = {key: _into(value, space[key]) for key, value in trial["values"].items()}
        return values | {"trial": trial | {"values": own}}

    return Population(
        search,
        config.run.seed,
        search.asker.wanted,
        time_attr="step",
        metric=config.sweep.metrics[0],
        mode="max",
        perturbation_interval=config.sweep.grace,
        hyperparam_mutations={
            "trial": {"values": {key: _drawn(dimension) for key, dimension in space.items()}}
        },
        custom_explore_fn=into_bounds,
        synch=True,
    )


def _drawn(dimension: ParameterSpace) -> Any:
    """Ray Tune's form of a dimension, for values that are drawn anew."""
    from ray import tune

    if dimension.kind == "choice":
        return list(dimension.values or [])
    low, high = ends(dimension)
    if dimension.kind == "int":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if dimension.kind == "loguniform" else tune.uniform(low, high)


def _into(value: Any, dimension: ParameterSpace) -> Any:
    if dimension.kind == "choice":
        return value
    low, high = ends(dimension)
    value = min(max(value, low), high)
    if dimension.step:
        value = low + round((value - low) / dimension.step) * dimension.step
    return int(value) if dimension.kind == "int" else value
