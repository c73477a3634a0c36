"""A sweep's space, as Optuna distributions, checked before anything starts; and what a trial of it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice, product
from typing import Any

from clinkd.config import ConfigError, ParameterSpace, RunConfig, with_values

MOST_CORNERS = 512


def check_space(config: RunConfig) -> None:
    """Tries both ends of every dimension against the schema, then the ends of all together.

    Raises:
        ConfigError: an empty space, an unknown key, a bound that the key does not take, ends that contradict
            each other, a ``when`` that names no dimension before its own or a value it never has.
    """
    space = config.sweep.space
    if not space:
        raise ConfigError("sweep.space: empty; name keys to vary, as configs/sweeps/tiny.yaml does")
    before: list[str] = []
    for key, dimension in space.items():
        if key.split(".")[0] in ("sweep", "run"):
            raise ConfigError(f"sweep.space.{key}: a trial's own settings can be varied, not the sweep's")
        for value in ends(dimension):
            with_values(config, {key: value}, f"sweep.space.{key}")
        for other, wanted in dimension.when.items():
            _check_condition(key, other, wanted, space, before)
        before.append(key)
    for corner in _corners(space):
        with_values(config, corner, f"sweep.space: {corner}")


def _check_condition(
    key: str, other: str, wanted: Any, space: dict[str, ParameterSpace], before: list[str]
) -> None:
    where = f"sweep.space.{key}.when: {other}"
    if other not in before:
        raise ConfigError(
            f"{where} is no dimension that stands before it; these do: {', '.join(before) or '-'}"
        )
    values = space[other].values
    if values is not None and not any(value in _listed(wanted) for value in values):
        raise ConfigError(f"{where} never is {wanted!r}; its values are {values}")


def _corners(space: dict[str, ParameterSpace]) -> list[dict[str, Any]]:
    """Values at the ends of all dimensions together, without those that a ``when`` leaves out."""
    sides = [ends(dimension) for dimension in space.values()]
    found: dict[str, dict[str, Any]] = {}
    for values in islice(product(*sides), MOST_CORNERS):
        chosen: dict[str, Any] = {}
        for (key, dimension), value in zip(space.items(), values, strict=True):
            if applies(dimension, chosen):
                chosen[key] = value
        found[repr(chosen)] = chosen
    return list(found.values())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def applies(dimension: ParameterSpace, chosen: dict[str, Any]) -> bool:
    """Whether a dimension is there, given the values of those before it."""
    return all(
        other in chosen and chosen[other] in _listed(wanted) for other, wanted in dimension.when.items()
    )


def ends(dimension: ParameterSpace) -> list[Any]:
    """The values that bound a dimension; of a choice, all of them."""
    if dimension.kind == "choice":
        return list(dimension.values or [])
    bounds = [dimension.low, dimension.high]
    return [int(value) for value in bounds if value is not None] if dimension.kind == "int" else bounds


def suggest(trial: Any, space: dict[str, ParameterSpace]) -> dict[str, Any]:
    """The values of a trial, drawn by its study's sampler in the order of the space (define by run)."""
    chosen: dict[str, Any] = {}
    for key, dimension in space.items():
        if not applies(dimension, chosen):
            continue
        if dimension.kind == "choice":
            chosen[key] = trial.suggest_categorical(key, dimension.values)
        elif dimension.kind == "int":
            low, high = ends(dimension)
            chosen[key] = trial.suggest_int(key, low, high, step=int(dimension.step or 1))
        else:
            step = dimension.step if dimension.kind == "quniform" else None
            chosen[key] = trial.suggest_float(
                key, dimension.low, dimension.high, step=step, log=dimension.kind == "loguniform"
            )
    return chosen


def grid(space: dict[str, ParameterSpace]) -> dict[str, list[Any]]:
    """All values of every dimension, for Optuna's grid."""
    return {key: _values(dimension) for key, dimension in space.items()}


def _values(dimension: ParameterSpace) -> list[Any]:
    if dimension.kind == "choice":
        return list(dimension.values or [])
    assert dimension.low is not None and dimension.high is not None
    step = dimension.step or 1
    count = int((dimension.high - dimension.low) / step + 1e-9) + 1
    values = [dimension.low + number * step for number in range(count)]
    return [int(value) for value in values] if dimension.kind == "int" else values


def trials_wanted(config: RunConfig) -> int:
    """Trials of the whole sweep; a grid has only so many."""
    if config.sweep.sampler != "grid":
        return config.sweep.trials
    combinations = 1
    for values in grid(config.sweep.space).values():
        combinations *= len(values)
    return min(config.sweep.trials, combinations)


def trial_config(values: dict[str, Any], base: RunConfig) -> RunConfig:
    """The configuration of a trial, named by a digest of its values."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    fixed = {
        "run.name": f"{base.run.name}-trial-{digest}", "evaluate.text_metrics": False,
        "sinks.tensorboard": False, "sweep": {},
    }  # fmt: skip
    return with_values(base, values | fixed)


def reflects(keys: Iterable[str], config: RunConfig) -> bool:
    """Whether a trial reflects: it takes minutes, so only where its keys ask for it."""
    return config.reflect.rounds > 0 and any(key.startswith("reflect.") for key in keys)


def rungs(base: RunConfig, total: int) -> list[int]:
    """Training steps after which a trial is scored; the last is the end."""
    options = base.sweep
    if options.scheduler == "none":
        return [total]
    found, step = [], options.grace
    while step < total:
        found.append(step)
        step = step + options.grace if options.population else step * options.reduction
    return [*found, total]
