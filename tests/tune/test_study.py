"""The study outlives its driver: the same trials come out however often it was cut off."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest

from clinkd.config import ConfigError, RunConfig, with_values
from clinkd.tune.search import StudyScheduler, StudySearch, _into
from clinkd.tune.space import trials_wanted
from clinkd.tune.study import Asker, NoStudy, open_study, own_trials, storage_url, sweep_folder
from clinkd.tune.summary import best_config, importances, rows_of, table
from clinkd.tune.watch import view

SPACE = {
    "distill.a": {"kind": "loguniform", "low": 0.1, "high": 2},
    "rope.gamma": {"kind": "uniform", "low": 0, "high": 1},
    "rope.mode": {"kind": "choice", "values": ["pair", "patch"]},
}
RUNGS = (100, 300, 900)


def config(root: Path, **sweep: Any) -> RunConfig:
    values = {"trials": 12, "space": SPACE} | sweep
    base = {"run.root": str(root), "run.name": "s"}
    (root / "s" / "sweep").mkdir(parents=True, exist_ok=True)
    return with_values(RunConfig(), base | {f"sweep.{key}": value for key, value in values.items()})


def score(values: dict[str, Any], step: int) -> float:
    """A made-up score, best at gamma .7 and a .5, that grows with the step."""
    return (1 - (values["rope.gamma"] - 0.7) ** 2 - abs(values["distill.a"] - 0.5) / 4) * step / RUNGS[-1]


def drive(made: RunConfig, stop_after: int | None = None) -> list[tuple[Any, ...]]:
    """Trials one after the other as Ray Tune would have them; cut off in the middle of one at ``stop_after``
    rungs.
    """
    study = open_study(made)
    search = StudySearch(Asker(made, study))
    scheduler, seen, name = StudyScheduler(search), 0, 0
    while isinstance(suggested := search.suggest(f"t{name}"), dict):
        trial, result = f"t{name}", {}
        for step in RUNGS:
            found = score(suggested["values"], step)
            metrics = {metric: found * (1 - 0.1 * at) for at, metric in enumerate(made.sweep.metrics)}
            result = metrics | {"step": step, "done": step == RUNGS[-1]}
            seen += 1
            if not search.look(trial, result) or seen == stop_after:
                break
        if seen == stop_after:
            return outcome(made)
        search.on_trial_complete(trial, result)
        name += 1
    assert scheduler.search is search
    return outcome(made)


def outcome(made: RunConfig) -> list[tuple[Any, ...]]:
    trials = own_trials(open_study(made))
    return [(trial.number, trial.state.name, trial.values, trial.params) for trial in trials]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "nsga2"])
@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband"])
def test_cut_off_twice_it_comes_out_the_same(tmp_path: Path, sampler: str, scheduler: str) -> None:
    options = {"sampler": sampler, "scheduler": scheduler, "grace": 100}
    whole = drive(config(tmp_path / "whole", **options))
    cut = config(tmp_path / "cut", **options)
    drive(cut, stop_after=5)
    assert sum(state == "RUNNING" for _, state, *_ in outcome(cut)) == 1
    drive(cut, stop_after=4)
    assert drive(cut) == whole
    assert len(whole) == 12 and {state for _, state, *_ in whole} <= {"COMPLETE", "PRUNED"}
    if scheduler == "asha":
        assert any(state == "PRUNED" for _, state, *_ in whole)
    assert drive(cut) == whole  # and once more there is nothing to do


def test_several_metrics_give_a_front(tmp_path: Path) -> None:
    made = config(tmp_path, metric=["vg", "roc"], sampler="nsga2")
    drive(made)
    rows = rows_of(open_study(made), made)
    assert any(row["front"] for row in rows) and all(row["roc"] is not None for row in rows)
    with pytest.raises(ConfigError, match="needs one metric"):
        config(tmp_path, metric=["vg", "roc"], scheduler="asha")


def test_a_grid_ends_with_its_last_combination(tmp_path: Path) -> None:
    space = {
        "rope.mode": {"kind": "choice", "values": ["pair", "patch"]},
        "distill.a": {"kind": "choice", "values": [0.5, 1.0]},
        "rope.gamma": {"kind": "quniform", "low": 0, "high": 1, "step": 0.5},
    }
    made = config(tmp_path, sampler="grid", space=space, trials=50)
    assert trials_wanted(made) == 12
    found = [tuple(params.values()) for *_, params in drive(made)]
    assert len(found) == len(set(found)) == 12
    with pytest.raises(ConfigError, match="sampler grid"):
        config(tmp_path, sampler="grid")


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path) -> None:
    drive(config(tmp_path))
    with pytest.raises(ConfigError, match="begun with another space or other settings"):
        open_study(with_values(config(tmp_path), {"distill.optim.lr": 0.5}))
    assert len(drive(config(tmp_path, trials=14))) == 14  # more trials are no other sweep


def test_a_former_study_is_a_warm_start(tmp_path: Path) -> None:
    former = config(tmp_path / "former")
    drive(former)
    narrow = SPACE | {"rope.gamma": {"kind": "uniform", "low": 0.5, "high": 1}}
    made = config(tmp_path / "new", space=narrow, trials=3, warm_start=str(tmp_path / "former" / "s"))
    assert len(drive(made)) == 3
    everything = open_study(made).get_trials()
    taken = [trial for trial in everything if "warm_start" in trial.user_attrs]
    inside = [trial for *_, trial in outcome(former) if trial["rope.gamma"] >= 0.5]
    assert [trial.params for trial in taken] == inside and len(everything) == 3 + len(inside) > 3
    with pytest.raises(ConfigError, match=r"holds no sweep/study\.db"):
        open_study(config(tmp_path / "third", warm_start=str(tmp_path / "nowhere")))


def test_a_database_that_is_not_there_is_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_study(config(tmp_path, storage="postgresql://me:secret@127.0.0.1:1/optuna"))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_trial_is_marked_and_its_text_stays_here(tmp_path: Path) -> None:
    made = config(tmp_path, trials=2)
    search = StudySearch(Asker(made, open_study(made)))
    assert search.suggest("a")["number"] == 0
    search.failed("a", ValueError("record patient-17 cannot be decoded"))
    search.on_trial_complete("a", None, error=True)
    row = rows_of(open_study(made), made)[0]
    assert (row["state"], row["error"]) == ("fail", "ValueError")
    assert b"patient-17" not in (tmp_path / "s" / "sweep" / "study.db").read_bytes()
    assert best_config(made, [row]) is None


def test_the_best_is_a_configuration_that_runs(tmp_path: Path) -> None:
    made = config(tmp_path)
    drive(made)
    study = open_study(made)
    rows = rows_of(study, made)
    best = best_config(made, rows)
    assert best is not None and best.run.name == "s-best" and not best.sweep.space
    assert best.rope.gamma == rows[0]["values"]["rope.gamma"]
    assert best.reflect.rounds == 0  # the trials did not reflect
    shares = importances(study, made)
    assert set(shares) == set(SPACE) and sum(shares.values()) == pytest.approx(1)
    text = table(rows, made.sweep.metrics)
    assert len(text.splitlines()) == 13 and "gamma" in text.splitlines()[0]


def test_who_looks_on_sees_what_runs_and_what_ended(tmp_path: Path) -> None:
    made = config(tmp_path)
    drive(made, stop_after=4)
    said = view(open_study(made), made).splitlines()
    assert said[0] == "sweep s: 12 trials: 1 done, 0 ended early, 0 failed, 1 running"
    assert said[1].startswith("  trial 1: step 100, score ")


def test_who_looks_before_it_begins_is_told_so_and_makes_no_tables(tmp_path: Path) -> None:
    made = config(tmp_path)
    folder = sweep_folder(made)
    folder.rmdir()
    with pytest.raises(NoStudy, match="clinkd sweep"):
        open_study(made, create=False)
    folder.mkdir()
    (folder / "study.db").touch()  # it is beginning this moment
    with pytest.raises(NoStudy):
        open_study(made, create=False)
    assert (folder / "study.db").stat().st_size == 0
    open_study(with_values(made, {"run.name": "other", "sweep.storage": storage_url(made)}))
    with pytest.raises(NoStudy):
        open_study(made, create=False)


def test_who_looks_while_it_begins_sees_nothing_or_the_study_and_stops_nobody(tmp_path: Path) -> None:
    for number in range(4):
        made, looks = config(tmp_path / str(number)), 0
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(open_study, made)
            while not begun.done():
                with suppress(NoStudy):
                    assert own_trials(open_study(made, create=False)) == []
                looks += 1
            assert own_trials(begun.result()) == own_trials(open_study(made, create=False)) == []
        assert looks > 1


def test_who_looks_at_a_server_that_does_not_answer_is_not_told_to_wait(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_study(config(tmp_path, storage="postgresql://me:secret@127.0.0.1:1/optuna"), create=False)
    assert not isinstance(caught.value, NoStudy) and "secret" not in str(caught.value)


def test_perturbed_values_are_put_back_into_the_space() -> None:
    space = config_space({
        "a": {"kind": "int", "low": 1, "high": 4},
        "b": {"kind": "quniform", "low": 0, "high": 1, "step": 0.25},
        "c": {"kind": "loguniform", "low": 0.1, "high": 1}, "d": {"kind": "choice", "values": ["x"]},
    })  # fmt: skip
    assert [_into(value, space[key]) for key, value in (("a", 4.8), ("a", 0.8), ("a", 2.4))] == [4, 1, 2]
    assert [_into(value, space["b"]) for value in (1.2, 0.3, -0.1)] == [1, 0.25, 0]
    assert _into(1.2, space["c"]) == 1 and _into("x", space["d"]) == "x"


def config_space(space: dict[str, Any]) -> Any:
    from clinkd.config import ParameterSpace

    return {key: ParameterSpace(**value) for key, value in space.items()}


def test_optuna_itself_reads_what_we_wrote(tmp_path: Path) -> None:
    """As optuna-dashboard does: by the database alone."""
    made = config(tmp_path, scheduler="asha", grace=100)
    drive(made)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/s/sweep/study.db")
    assert study.metric_names == ["score"] and study.best_trial.params
    pruned = study.get_trials(states=[optuna.trial.TrialState.PRUNED])
    assert pruned and all(trial.intermediate_values for trial in pruned)
