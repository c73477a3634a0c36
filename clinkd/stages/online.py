"""How stage distill comes by a teacher, and whether it wants one; see train/online_task.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clinkd.config import DistillSection
from clinkd.stages.base import Run
from clinkd.stages.models import teacher_folder

if TYPE_CHECKING:
    from clinkd.train.online_task import OnlineSpec
    from clinkd.train.tasks import VqaSpec


def asks_teacher(options: DistillSection) -> bool:
    """Whether a student follows from what a teacher says: its loss, its labels, or the order of the data."""
    return options.teacher != "cache" or bool(
        options.a or options.unlabelled_share or options.start_quantile or options.end_quantile
    )


def distill_settings(options: DistillSection) -> dict[str, Any]:
    """What of the options the student follows from; with the cache, as if there were no other teacher."""
    online = ("teacher", "on_policy", "sample_temperature", "max_new_tokens")
    unused: dict[str, Any] = dict.fromkeys(online, True) if options.teacher == "cache" else {}
    return options.model_dump(exclude={"cache": {"root"}} | unused)


def online_spec(run: Run, student: VqaSpec) -> OnlineSpec | None:
    """The teacher beside ``student``; None: the cache serves.

    Raises:
        ConfigError: see ``check_shared``.
    """
    from clinkd.train.online_task import OnlineSpec, check_shared

    options, compute = run.config.distill, run.config.compute
    if options.teacher == "cache":
        return None
    teacher = str(teacher_folder(run).resolve())
    check_shared(student, teacher)
    zero = compute.zero_stage if compute.teacher_zero_stage is None else compute.teacher_zero_stage
    return OnlineSpec(
        teacher, dtype=run.config.model.dtype, zero_stage=zero, on_policy=options.on_policy,
        temperature=options.sample_temperature, max_new_tokens=options.max_new_tokens,
        seed=run.config.run.seed,
    )  # fmt: skip
