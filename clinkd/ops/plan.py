"""What a run will do and cost, before anything runs: steps, memory, hours, price, disk, and what is wrong.

Decisions:
- A plan is a dictionary of numbers in bytes, hours and dollars; ``show`` makes text of it.
- What follows from the configuration alone is said as a fact, what follows from the data with where its
  numbers come from, what nobody knows before (utilisation, failures, prices) as a band or as assumed.
- ``--calibrate`` puts measurements in the place of estimates; both stay in the plan, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinkd.config import RunConfig
from clinkd.ops import cost, lint, trials
from clinkd.reflect.rounds import generations
from clinkd.stages.online import asks_teacher
from clinkd.tune.space import trials_wanted

if TYPE_CHECKING:
    from clinkd.ops.calibrate import Measured
    from clinkd.ops.stages import Outlook, Stage

RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Options:
    """What the configuration does not say.

    Args:
        gpu: one of ``cost.GPUS``. price: US dollars for an hour of one; None: the table's.
        mtbf: hours between failures of the job (on spot capacity, between preemptions).
        records, questions: of the training split, where the plan cannot see them.
        cluster: what there is to run on.
        folder: that would be sent as ``--working-dir``; None: not looked at.
    """

    gpu: str = "h100"
    price: float | None = None
    mtbf: float | None = None
    records: int | None = None
    questions: int | None = None
    cluster: lint.Cluster = field(default_factory=lint.Cluster)
    folder: Path | None = None


def plan(
    config: RunConfig, options: Options | None = None, measured: Mapping[str, Measured] | None = None
) -> dict[str, Any]:
    """The plan of a run.

    Args:
        measured: by stage, what ``calibrate`` found.

    Raises:
        ConfigError: an unknown accelerator, or a model whose size nothing tells.
    """
    from clinkd.ops.stages import Outlook
    from clinkd.ops.workload import workload_of

    options, measured = options or Options(), measured or {}
    card = cost.accelerator(options.gpu, options.price)
    load = workload_of(config, options.records, options.questions)
    look = Outlook(config, load)
    gpu, devices = look.gpu, look.devices
    rows = [_stage(look, stage, card, measured.get(_kind(stage.name))) for stage in look.stages()]
    rows += list(_asking(look, card))
    found: dict[str, Any] = {
        "run": config.run.name,
        "device": options.gpu if gpu else "cpu",
        "devices": devices,
        "capacity": card.memory if gpu else None,
        "price_an_hour": card.price * devices if gpu else None,
        "models": _models(look),
        "data": asdict(load),
        "stages": rows,
        "hours": _sum(row["hours"] for row in rows),
        "price": _sum(row["price"] for row in rows) if gpu else None,
        "zero": _zero_table(look, card.memory) if gpu else [],
        "disk": _disk(look),
        "node": _node(look),
        "checkpoints": _checkpoints(look, rows, options.mtbf),
        "reflection": list(_reflection(config)),
        "sweep": list(trials.told(look, rows, card)),
    }
    found["warnings"] = list(_warnings(look, found, options))
    return found


def _kind(name: str) -> str:
    """Rounds of reflection are all measured by the first."""
    return "reflect" if name.startswith("reflect") else name


def _models(look: Outlook) -> list[dict[str, Any]]:
    """Both models, as they are trained."""
    from clinkd.ops.subject import Subject

    def facts(role: str, subject: Subject, trains: bool) -> dict[str, Any]:
        return {"role": role, "parameters": subject.parameters,
                "trained": subject.trained if trains else 0, "where": subject.source.where}  # fmt: skip

    trains = look.config.teacher.path is None
    return [facts("teacher", look.teacher, trains), facts("student", look.student, True)]


def _stage(look: Outlook, stage: Stage, card: cost.Accelerator, found: Measured | None) -> dict[str, Any]:
    steps, work = look.steps(stage), look.step_flops(stage)
    peak, devices = look.peak(card), look.devices
    images = look.per_step(stage)
    row: dict[str, Any] = {
        "name": stage.name, "steps": steps, "given": stage.optim.steps is not None,
        "epochs": stage.optim.epochs, "images_a_step": images,
        "questions_a_step": images * stage.optim.questions_per_image, "zero_stage": stage.zero,
        "flops_a_step": work, "memory": look.memory(stage), "hours": look.hours(work * steps, card),
        "measured": None,
    }  # fmt: skip
    row["total"] = sum(row["memory"].values())
    if found is not None:
        known = found.seconds * steps / 3600
        later = look.host_images(stage, steps) - look.host_images(stage, found.steps)
        row["hours"] = [known, known]
        row["measured"] = asdict(found) | {
            "mfu": work / found.seconds / (peak * devices),
            "grown_at_end": found.grown + (0 if look.gpu else max(0.0, later)),
        }
    row["price"] = [each * devices * card.price for each in row["hours"]] if look.gpu else None
    return row


def _asking(look: Outlook, card: cost.Accelerator) -> Iterator[dict[str, Any]]:
    """Stages that ask models: what they read, at least; writing answers is bound by memory, not by FLOPs."""
    config, load = look.config, look.workload
    tested = round((load.all_records - load.records) * load.turns)
    if config.data.validation_fraction:
        share = config.data.test_fraction / (config.data.test_fraction + config.data.validation_fraction)
        tested = round(tested * share)
    asked = generations(config.reflect, config.reflect.validation)
    students = asked["student"] * config.reflect.rounds
    correctors = asked["corrector"] * config.reflect.rounds
    for name, subject, count in (
        ("label", look.teacher, round(_asked(look))),
        ("reflect: student", look.student, students),
        ("reflect: corrector", look.teacher, correctors),
        ("evaluate", look.student, min(tested, config.evaluate.limit or tested)),
    ):
        if not count:
            continue
        work = look.answer_flops(subject, count)
        band = look.hours(work, card)
        yield {
            "name": name, "answers": count, "flops": work, "hours": band, "asks": True,
            "price": [each * look.devices * card.price for each in band] if look.gpu else None,
        }  # fmt: skip


def _sum(pairs: Any) -> list[float]:
    found = list(pairs)
    return [sum(pair[0] for pair in found), sum(pair[1] for pair in found)]


def _zero_table(look: Outlook, capacity: float) -> list[dict[str, Any]]:
    """For each model that trains: bytes by ZeRO stage and GPUs, and what to take."""
    from clinkd.ops.memory import RESERVE, choose

    tables, seen = [], set()
    for stage in look.stages():
        if _kind(stage.name) in seen or (stage.name != "teacher" and "distill" in seen):
            continue
        seen.add(_kind(stage.name))
        needs = {
            (zero, ranks): sum(look.memory(stage, zero, ranks).values())
            for zero in (0, 1, 2, 3)
            for ranks in RANKS
        }
        rows = [
            {"zero_stage": zero, "bytes": {str(ranks): needs[zero, ranks] for ranks in RANKS}}
            for zero in (0, 1, 2, 3)
        ]
        here = {key: need for key, need in needs.items() if key[1] == look.config.compute.workers}
        if not here:
            workers = look.config.compute.workers
            here = {(zero, workers): sum(look.memory(stage, zero, workers).values()) for zero in range(4)}
        tables.append(
            {"stage": stage.name, "rows": rows, "best": choose(needs, capacity),
             "best_here": choose(here, capacity), "usable": capacity - RESERVE}
        )  # fmt: skip
    return tables


def _disk(look: Outlook) -> dict[str, float]:
    """Bytes that a run leaves or needs on the way."""
    config, load = look.config, look.workload
    stages = list(look.stages())
    states = [
        cost.checkpoint_bytes(stage.subject.parameters, stage.subject.trained, look.element)
        for stage in stages
    ]
    element = 2 if config.model.dtype == "bfloat16" else 4
    models = [element * stage.subject.parameters for stage in stages]
    asked = _asked(look)
    found = {
        "shards": load.all_records * load.image_bytes,
        "teacher_cache": asked * load.answer * _token_bytes(look) + (asked and _head_bytes(look, element)),
        "models": float(sum(models) + models[-1]),  # each stage's, and the run's own copy
        # Of a stage at work; they go with it.
        "checkpoints": cost.KEPT * max(states),
    }
    if config.sweep.space:
        found["trials"] = trials_wanted(config) * (models[-1] + cost.KEPT * states[-1])
    return found | {"total": sum(found.values())}


def _node(look: Outlook) -> dict[str, float]:
    """Bytes of a node's main memory that is not a process's own, and of what its workers keep beside GPUs.

    All workers are counted as if they were on one node.
    """
    config, load = look.config, look.workload
    asked, workers = _asked(look), config.compute.workers
    found = {"mapped_teacher_cache": asked * load.answer * _token_bytes(look)}
    stages = list(look.stages())
    if look.gpu:
        kept = max(look.host_images(stage, look.steps(stage)) for stage in stages)
        tasks = 2 if config.feed.tasks is None else config.feed.tasks
        found["making_batches"] = workers * max(1, tasks) * kept
    if config.compute.cpu_offload:
        found["offloaded"] = max(12.0 * stage.subject.trained for stage in stages)
    return found


def _asked(look: Outlook) -> float:
    """Training questions about which the teacher is asked."""
    options, load = look.config.distill, look.workload
    return load.records * load.turns * options.share if asks_teacher(options) else 0.0


def _token_bytes(look: Outlook) -> int:
    from clinkd.distill.forms import Form

    cache = look.config.distill.cache
    vocabulary, width = look.teacher.head
    form = Form(cache.form, cache.k, vocabulary) if cache.form == "topk" else Form(cache.form)
    return form.token_bytes(width)


def _head_bytes(look: Outlook, element: int) -> float:
    vocabulary, width = look.teacher.head
    return 0.0 if look.config.distill.cache.form == "topk" else float(element * vocabulary * width)


def _checkpoints(look: Outlook, rows: list[dict[str, Any]], given: float | None) -> list[dict[str, Any]]:
    """For each stage, how far apart checkpoints best are."""
    every, found = look.config.compute.checkpoint_every, []
    mtbf = cost.job_mtbf(look.devices, given)
    trained = {row["name"]: row for row in rows if not row.get("asks")}
    for stage in look.stages():
        row = trained[stage.name]
        size = cost.checkpoint_bytes(stage.subject.parameters, stage.subject.trained, look.element)
        seconds = 3600 * sum(row["hours"]) / 2 / row["steps"]
        best = cost.interval(size / cost.WRITE, mtbf)
        found.append(
            {"stage": stage.name, "bytes": size, "write_seconds": size / cost.WRITE, "mtbf_hours": mtbf,
             "best_seconds": best, "best_steps": max(1, round(best / seconds)), "every_steps": every,
             "every_seconds": every * seconds, "step_seconds": seconds}
        )  # fmt: skip
    return found


def _warnings(look: Outlook, found: Mapping[str, Any], options: Options) -> Iterator[str]:
    config = look.config
    yield from lint.precision(config)
    yield from lint.placement(config, options.cluster)
    if options.folder is not None:
        yield from lint.working_dir(options.folder)
    best = {table["stage"]: table["best_here"] for table in found["zero"]}
    for stage, entry in zip(look.stages(), found["checkpoints"], strict=True):
        yield from lint.starving(stage.name, look.groups(stage), look.per_step(stage))
        yield from lint.checkpoints(
            stage.name,
            entry["every_steps"],
            entry["step_seconds"],
            entry["mtbf_hours"],
            entry["best_seconds"],
        )
        yield from lint.writing(
            stage.name, entry["every_steps"], entry["step_seconds"], entry["write_seconds"],
            entry["best_seconds"], look.steps(stage),
        )  # fmt: skip
        if found["capacity"] is not None:
            from clinkd.ops.memory import RESERVE

            row = next(row for row in found["stages"] if row["name"] == stage.name)
            better = _remedy(best.get(stage.name), found["zero"], stage.name)
            yield from lint.memory(stage.name, row["total"] + RESERVE, found["capacity"], better)
            choice = best.get(stage.name)
            if choice is not None and choice[0] == 2 and stage.zero == 3:
                key = "teacher_zero_stage" if stage.name == "teacher" else "zero_stage"
                yield (
                    f"compute.{key}: 3 gathers weights in every pass, and ZeRO-2 fits {stage.name} on "
                    f"{choice[1]} GPUs; set it to 2"
                )


def _remedy(here: Any, tables: list[dict[str, Any]], name: str) -> str | None:
    """What would fit, in words."""
    if here is not None:
        return f"ZeRO-{here[0]} fits: set compute.zero_stage={here[0]}"
    best = next((table["best"] for table in tables if table["stage"] == name), None)
    if best is None:
        return None
    return f"ZeRO-{best[0]} on {best[1]} GPUs fits: set compute.zero_stage and compute.workers"


def _reflection(config: RunConfig) -> Iterator[str]:
    options = config.reflect
    if not options.rounds:
        return
    asked = generations(options, options.validation)
    yield (
        f"reflection: a round generates at most {asked['student']:,} answers of the student "
        f"({options.samples:,} before, {options.samples:,} after, {options.validation:,} of the validation "
        f"split) and {asked['corrector']:,} candidates of the corrector "
        f"({options.candidates} for each of {min(options.budget, options.samples):,} misses)"
    )
    yield f"reflection: at most {asked['whole']:,} answers in {options.rounds} rounds"
