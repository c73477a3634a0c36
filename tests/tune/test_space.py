"""A sweep's space is held against the schema before anything starts."""

import optuna
import pytest

from clinkd.config import ConfigError, RunConfig, with_values
from clinkd.tune.space import check_space, grid, suggest, trial_config
from clinkd.tune.sweep import concurrent_trials


def config(space: dict) -> RunConfig:
    return with_values(RunConfig(), {"sweep.space": space})


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        check_space(RunConfig())


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"rope.lamda_h": {"kind": "uniform", "low": 1, "high": 2}}, "did you mean lambda_h"),
        ({"rope.lambda_h": {"kind": "uniform", "low": -1, "high": 2}}, "rope.lambda_h"),
        ({"distill.divergence": {"kind": "choice", "values": ["forward_kl", "l2"]}}, "distill.divergence"),
    ],
)
def test_what_the_schema_does_not_take_is_refused(space: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_space(config(space))


@pytest.mark.parametrize(
    "dimension", [{"kind": "uniform", "low": 2, "high": 1}, {"kind": "choice"}, {"kind": "int", "low": 1}]
)
def test_a_conflicting_dimension_is_refused(dimension: dict) -> None:
    with pytest.raises(ConfigError):
        config({"distill.a": dimension})


def test_suggested_values_lie_in_the_space_and_make_a_configuration() -> None:
    space = {
        "rope.gamma": {"kind": "uniform", "low": 0, "high": 1},
        "distill.a": {"kind": "loguniform", "low": 0.1, "high": 2},
        "reflect.candidates": {"kind": "int", "low": 1, "high": 3},
        "distill.divergence": {"kind": "choice", "values": ["forward_kl", "jsd"]},
    }
    base = config(space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        suggest(trial, base.sweep.space)
        changed = trial_config(trial.params, base)
        assert 0 <= changed.rope.gamma <= 1 and 0.1 <= changed.distill.a <= 2
        assert changed.run.name.startswith("tiny-trial-")
    assert trial_config(trial.params, base).run.name == changed.run.name


def test_a_dimension_with_a_condition_is_there_only_where_it_holds() -> None:
    space = {
        "distill.divergence": {"kind": "choice", "values": ["forward_kl", "jsd"]},
        "distill.jsd_beta": {"kind": "quniform", "low": 0.1, "high": 0.9, "step": 0.2,
                             "when": {"distill.divergence": "jsd"}},
    }  # fmt: skip
    base = config(space)
    check_space(base)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [suggest(study.ask(), base.sweep.space) for _ in range(12)]
    assert {len(values) for values in found} == {1, 2}
    for values in found:
        assert ("distill.jsd_beta" in values) == (values["distill.divergence"] == "jsd")
        assert round(values.get("distill.jsd_beta", 0.1), 6) in (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"distill.divergence": "reverse_kl"}, "never is 'reverse_kl'"),
        ({"distill.temperature": 1.0}, "no dimension that stands before"),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(condition: dict, said: str) -> None:
    space = {
        "distill.divergence": {"kind": "choice", "values": ["forward_kl", "jsd"]},
        "distill.jsd_beta": {"kind": "uniform", "low": 0.1, "high": 0.9, "when": condition},
    }
    with pytest.raises(ConfigError, match=said):
        check_space(config(space))


def test_ends_that_contradict_each_other_are_refused() -> None:
    """Each end alone is fine, but a batch cannot be .9 feedback and .4 replay."""
    space = {
        "reflect.share": {"kind": "uniform", "low": 0.1, "high": 0.9},
        "reflect.replay": {"kind": "uniform", "low": 0.0, "high": 0.4},
    }
    with pytest.raises(ConfigError, match="more than 1 together"):
        check_space(config(space))


def test_the_sweeps_own_settings_are_not_for_its_trials() -> None:
    with pytest.raises(ConfigError, match="not the sweep's"):
        check_space(config({"sweep.trials": {"kind": "int", "low": 1, "high": 2}}))


def test_a_grid_has_every_value_once() -> None:
    space = config({
        "reflect.candidates": {"kind": "int", "low": 1, "high": 7, "step": 3},
        "rope.gamma": {"kind": "quniform", "low": 0, "high": 1, "step": 0.5},
        "rope.mode": {"kind": "choice", "values": ["pair", "patch"]},
    }).sweep.space  # fmt: skip
    assert grid(space) == {
        "reflect.candidates": [1, 4, 7], "rope.gamma": [0, 0.5, 1], "rope.mode": ["pair", "patch"],
    }  # fmt: skip


# Where trials fit


def test_as_many_trials_run_at_one_time_as_fit_whole() -> None:
    assert concurrent_trials(RunConfig(), [{"CPU": 5}]) == 2
    assert concurrent_trials(RunConfig(), [{"CPU": 5}], data_cpus=1.1) == 1
    assert concurrent_trials(RunConfig(), [{"CPU": 2}], data_cpus=1.1) == 1  # the first fits without
    assert concurrent_trials(with_values(RunConfig(), {"sweep.concurrent": 1}), [{"CPU": 5}]) == 1


def test_workers_lie_on_one_node_each() -> None:
    config = with_values(RunConfig(), {"compute.cpus_per_worker": 4})
    assert concurrent_trials(config, [{"CPU": 6}, {"CPU": 6}]) == 1
    with pytest.raises(ConfigError, match="2 workers of 4 CPU, the cluster has 9 CPUs"):
        concurrent_trials(config, [{"CPU": 3}, {"CPU": 6}])


def test_gpus_that_are_not_there_are_refused_with_the_numbers() -> None:
    config = with_values(RunConfig(), {"compute.gpus_per_worker": 1})
    assert concurrent_trials(config, [{"CPU": 64, "GPU": 4}]) == 2
    with pytest.raises(ConfigError, match="1 GPU, the cluster has 8 CPUs and 1 GPUs on 1 node"):
        concurrent_trials(config, [{"CPU": 8, "GPU": 1}])
