"""A sweep's space is held against the schema before anything starts."""

import optuna
import pytest

from clinkd.config import ConfigError, RunConfig, with_values
from clinkd.tune.space import check_space, suggest
from clinkd.tune.sweep import concurrent_trials, trial_config


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


def test_a_sweep_that_does_not_fit_is_refused_with_the_numbers() -> None:
    assert concurrent_trials(RunConfig(), 5) == 2
    with pytest.raises(ConfigError, match="wants 2 CPUs, the cluster has 1"):
        concurrent_trials(RunConfig(), 1)
