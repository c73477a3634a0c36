"""A sweep's space: what the YAML says, as Optuna distributions, checked before anything starts."""

from __future__ import annotations

from typing import Any

from clinkd.config import ConfigError, ParameterSpace, RunConfig, with_values


def check_space(config: RunConfig) -> None:
    """Tries both ends of every dimension against the schema.

    Raises:
        ConfigError: an empty space, an unknown key, or a bound that the key does not take.
    """
    if not config.sweep.space:
        raise ConfigError("sweep.space: empty; name keys to vary, as configs/sweeps/tiny.yaml does")
    for key, dimension in config.sweep.space.items():
        for value in ends(dimension):
            with_values(config, {key: value}, f"sweep.space.{key}")


def ends(dimension: ParameterSpace) -> list[Any]:
    """The values that bound a dimension; of a choice, all of them."""
    if dimension.kind == "choice":
        return list(dimension.values or [])
    bounds = [dimension.low, dimension.high]
    return [int(value) for value in bounds if value is not None] if dimension.kind == "int" else bounds


def suggest(trial: Any, space: dict[str, ParameterSpace]) -> None:
    """Optuna's define-by-run form of the space."""
    for key, dimension in space.items():
        if dimension.kind == "choice":
            trial.suggest_categorical(key, dimension.values)
        elif dimension.kind == "int":
            trial.suggest_int(key, *ends(dimension))
        else:
            trial.suggest_float(key, dimension.low, dimension.high, log=dimension.kind == "loguniform")
