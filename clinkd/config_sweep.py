"""The section of the configuration that says what a sweep tries, and how; see ``config``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from clinkd.config_model import Section

METRICS = ("score", "vg", "roc", "rc", "mia", "likelihood")


class ParameterSpace(Section):
    """One dimension of a sweep."""

    kind: Literal["uniform", "loguniform", "quniform", "choice", "int"] = Field(
        description="how values are drawn: evenly, in the logarithm, in steps, from a list, or integers"
    )
    low: float | None = Field(None, description="smallest value, of all but choice")
    high: float | None = Field(None, description="largest value, of all but choice")
    step: float | None = Field(None, gt=0, description="of quniform, and of int where it is not 1")
    values: list[Any] | None = Field(None, description="of choice: the values to choose from")
    when: dict[str, Any] = Field(
        {}, description="keys that stand before this one, each with the value (or list of values) for which "
        "this dimension is there; else its key stays as the configuration has it"
    )  # fmt: skip

    @model_validator(mode="after")
    def _complete(self) -> ParameterSpace:
        if self.kind == "choice":
            if not self.values:
                raise ValueError("a choice needs values: [...]")
        elif self.low is None or self.high is None or self.low >= self.high:
            raise ValueError(f"{self.kind} needs low < high")
        if self.kind == "loguniform" and self.low is not None and self.low <= 0:
            raise ValueError("loguniform needs low > 0")
        if self.kind == "quniform" and self.step is None:
            raise ValueError("quniform needs a step")
        return self


class SweepSection(Section):
    """Ray Tune with Optuna over any keys of this configuration."""

    trials: int = Field(4, ge=1, description="students to train; those that a scheduler ends early count")
    metric: str | list[str] = Field(
        "score", description="what to maximise on the validation split: vg (Recall@0.5), roc (recall), rc "
        "and mia (ROUGE-L), score (mean of vg and roc), likelihood (of a true answer's token: quick, "
        "and tells models apart long before they answer well); several: their Pareto front"
    )  # fmt: skip
    sampler: Literal["tpe", "gp", "nsga2", "random", "grid"] = Field(
        "tpe", description="Optuna's; gp: a Gaussian process, which wants fewer trials where a few numbers "
        "are swept; grid: every combination of choices, ints and quniforms"
    )  # fmt: skip
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = Field(
        "none", description="asha, hyperband: trials that fall behind at a rung end there; pbt: they go on "
        "from a better one's weights with its settings perturbed"
    )  # fmt: skip
    grace: int = Field(
        100, ge=1, description="training steps before the first rung; between two looks of pbt"
    )
    reduction: int = Field(3, ge=2, description="of the trials at a rung one in so many goes on")
    questions: int = Field(400, ge=1, description="of the validation split, asked at each rung")
    storage: str | None = Field(
        None, description="URL of an Optuna RDB (postgresql://...); none: an SQLite file beside the sweep"
    )
    warm_start: str | None = Field(
        None, description="a former sweep's folder, or the URL of its storage: its trials count as this one's"
    )
    concurrent: int | None = Field(None, ge=1, description="trials at one time; none: as many as have room")
    test: bool = Field(
        False, description="a trial answers the test split too at its end; for comparisons, not for choosing"
    )
    retries: int = Field(1, ge=0, description="times a trial that failed goes on from its last checkpoint")
    space: dict[str, ParameterSpace] = Field({}, description="dotted keys of this configuration")

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        unknown = [name for name in names if name not in METRICS]
        if unknown or not names:
            raise ValueError(f"unknown metric {', '.join(unknown) or '(none)'}; known: {', '.join(METRICS)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> SweepSection:
        if self.scheduler != "none" and len(self.metrics) > 1:
            raise ValueError(f"scheduler {self.scheduler} needs one metric: trials are compared by it")
        if self.sampler == "grid":
            endless = [key for key, space in self.space.items() if space.kind in ("uniform", "loguniform")]
            if endless or any(space.when for space in self.space.values()):
                raise ValueError(f"sampler grid needs choices, ints or quniforms without when: {endless}")
        return self

    @property
    def population(self) -> bool:
        """Whether trials clone each other (Population Based Training)."""
        return self.scheduler == "pbt"

    @property
    def metrics(self) -> list[str]:
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)
