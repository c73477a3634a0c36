"""A first configuration for a user's case, written with the schema's own words as comments.

Decisions:
- Only what the case decides is written; everything else has its default, and stands in ``docs/config.md``.
- Comments are the fields' descriptions, so they cannot say another thing than the schema does.
- What is written is checked as any configuration before a file is touched.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clinkd.config import ConfigError, check_config
from clinkd.config_schema import SCHEMA_FILE, keys, schema_text, sections
from clinkd.ops.llamafactory import Translation
from clinkd.reading import read_value, read_yaml

CONFIG_FILE = "config.yaml"
WIDTH = 110

# As configs/qwen2_vl_2b.yaml has it: the released recipe.
RECIPE: dict[str, Any] = {
    "optim.epochs": 3, "optim.batch_size": 2, "optim.accumulation": 8, "optim.lr": 5e-5,
    "optim.schedule": "cosine", "distill.chunk_size": 64, "evaluate.batch_size": 32,
    "evaluate.max_new_tokens": 256, "rope.gamma": 0.0,
}  # fmt: skip
# As configs/tiny.yaml has it: models that are made here and trained on CPUs.
TINY: dict[str, Any] = {
    "model.vision.hidden": 96, "model.vision.layers": 3, "model.vision.heads": 2, "model.vision.patch": 14,
    "model.vision.image_size": 112, "model.init": "new_layers", "model.tiny.hidden": 128,
    "model.tiny.layers": 3, "model.tiny.heads": 8, "model.tiny.mlp": 96, "teacher.tiny.hidden": 128,
    "teacher.tiny.layers": 3, "teacher.tiny.heads": 8, "teacher.tiny.mlp": 192, "rope.gamma": 0.25,
    "rope.mode": "pair", "guide.steps": 800, "guide.batch_size": 32, "guide.lr": 4e-3, "guide.muon_lr": 0.03,
    "sft.steps": 700, "sft.batch_size": 5, "sft.questions_per_image": 5, "sft.lr": 2e-3,
    "sft.schedule": "wsd", "sft.vision_lr": 0.1, "sft.coordinate_weight": 4, "distill.share": 0.4,
    "distill.unlabelled_share": 0.1, "distill.start_quantile": 0.2, "distill.a": 2, "distill.temperature": 1,
    "distill.optim.steps": 400, "distill.optim.batch_size": 5, "distill.optim.questions_per_image": 5,
    "distill.optim.lr": 3e-3, "distill.optim.schedule": "wsd", "distill.optim.vision_lr": 0.1,
    "reflect.share": 0.1, "reflect.samples": 400, "reflect.budget": 200, "reflect.optim.steps": 150,
    "reflect.optim.batch_size": 5, "reflect.optim.questions_per_image": 5, "reflect.optim.lr": 1e-3,
    "reflect.optim.vision_lr": 0.1, "reflect.optim.coordinate_weight": 4,
}  # fmt: skip
# Plain M-RoPE and the true answers alone, so that what comes out is what plain transformers runs.
FINETUNE: dict[str, Any] = {
    "rope.lambda_h": 1.0, "rope.lambda_w": 1.0, "rope.mode": "none", "distill.a": 0.0,
    "distill.unlabelled_share": 0.0, "distill.start_quantile": 0.0, "reflect.rounds": 0,
}  # fmt: skip
SWEEP: dict[str, Any] = {
    "sweep.trials": 16, "sweep.scheduler": "asha", "sweep.metric": "score",
    "sweep.space": {
        "distill.a": {"kind": "loguniform", "low": 0.1, "high": 3.0},
        "distill.temperature": {"kind": "uniform", "low": 0.3, "high": 3.0},
    },
}  # fmt: skip
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe": (
        "distillation, then rounds of reflection; guided positions where rope.gamma is above 0",
        {"reflect.rounds": 1},
    ),
    "distill": ("a student of a teacher, without rounds of reflection", {"reflect.rounds": 0}),
    "finetune": ("one checkpoint on true answers alone, with adapters, plain M-RoPE", FINETUNE),
    "sweep": ("a search over the distillation, one teacher for all trials", {"reflect.rounds": 0} | SWEEP),
}


@dataclass(frozen=True)
class Case:
    """What ``clinkd init`` was told."""

    task: str = "recipe"
    name: str = "mine"
    data: str | None = None
    images: str | None = None
    model: str | None = None
    teacher: str | None = None
    gpus: int = 0
    translated: Translation | None = None


def values_of(case: Case) -> dict[str, Any]:
    """The case's keys, dotted.

    Raises:
        ConfigError: an unknown task, or a task that lacks its model.
    """
    if case.task not in TASKS:
        raise ConfigError(f"--task: {case.task}: no such task; one of {', '.join(TASKS)}")
    given = dict(case.translated.values) if case.translated else {}
    model = case.model or given.pop("model.path", None)
    if model is None and (case.task == "finetune" or case.teacher):
        raise ConfigError("--model: give the folder of a Qwen2-VL or Qwen2.5-VL checkpoint")
    found: dict[str, Any] = {"run.name": case.name, "run.seed": 0}
    if model is None:
        found |= TINY
    else:
        found |= {"model.path": model, "teacher.path": case.teacher or model} | RECIPE
        if case.task == "finetune" and case.translated is None:
            found |= {"model.lora.rank": 16, "model.lora.alpha": 32.0}
    found |= _compute(case.gpus, model is not None)
    found |= TASKS[case.task][1] | given
    if case.data is not None:
        found.pop("data.images", None)
    found |= {k: v for k, v in (("data.source", case.data), ("data.images", case.images)) if v is not None}
    order = {key.name: number for number, key in enumerate(keys())}
    placed = dict(_placed(found, bool(found.get("reflect.rounds"))))
    return dict(sorted(placed.items(), key=lambda item: order.get(item[0], len(order))))


def _compute(gpus: int, by_path: bool) -> dict[str, Any]:
    if gpus:
        return {
            "compute.workers": gpus, "compute.gpus_per_worker": 1, "compute.cpus_per_worker": 4,
            "compute.zero_stage": 3 if gpus > 1 else 1, "compute.precision": "bf16",
            "compute.gradient_checkpointing": True, "compute.actors": gpus,
        } | ({"model.dtype": "bfloat16"} if by_path else {})  # fmt: skip
    return {"compute.workers": 2, "compute.gpus_per_worker": 0}


def _placed(values: dict[str, Any], reflects: bool) -> Iterator[tuple[str, Any]]:
    """``optim.KEY`` at each stage that trains the student; keys of reflection only where there are rounds."""
    for key, value in values.items():
        if key.startswith("optim."):
            yield f"distill.{key}", value
            if reflects:
                yield f"reflect.{key}", value
        elif reflects or not key.startswith("reflect.") or key == "reflect.rounds":
            yield key, value


def text_of(case: Case, folder: str) -> str:
    """The file: what it is for, commands, then sections with their meaning.

    Raises:
        ConfigError: as :func:`values_of`, or values that the schema refuses (of a translated file).
    """
    values = values_of(case)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    text = "\n".join([*_head(case, folder), *_body(nested), *_tail(case)]) + "\n"
    where = "--from" if case.translated else "clinkd init"
    check_config(read_yaml(text, where), where)
    return text


def _head(case: Case, folder: str) -> list[str]:
    path = f"{folder}/{CONFIG_FILE}"
    verb = "sweep" if case.task == "sweep" else "run"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {case.task}: {TASKS[case.task][0]}.",
        f"#   clinkd config {path}",
        f"#   clinkd plan {path}",
        f"#   clinkd {verb} {path}",
        "# Comments are the schema's words; a key that is not here has its default (clinkd config --keys).",
    ]
    if case.task == "finetune":
        lines += _comment(
            "The student learns from true answers alone; no teacher is asked. distill.a above 0 makes the "
            "model itself its teacher.", ""
        )  # fmt: skip
    for note in case.translated.notes if case.translated else ():
        lines += _comment(f"Look at {note}.", "")
    return lines


def _body(nested: dict[str, Any]) -> Iterator[str]:
    known = {key.name: key.meaning for key in keys()}
    for name, said in sections().items():
        if name in nested:
            yield ""
            yield from _comment(said, "")
            yield f"{name}:"
            yield from _section(nested[name], name, known, "  ")


def _section(values: dict[str, Any], prefix: str, known: dict[str, str], indent: str) -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}.{name}"
        yield from _comment(known.get(key, ""), indent)
        if isinstance(value, dict) and key != "sweep.space":
            yield f"{indent}{name}:"
            yield from _section(value, key, known, indent + "  ")
        elif isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from (f"{indent}  {dimension}: {_written(how)}" for dimension, how in value.items())
        else:
            yield f"{indent}{name}: {_written(value)}"


def _tail(case: Case) -> Iterator[str]:
    left = list(case.translated.left) if case.translated else []
    if case.translated and case.data is not None and "data.source" in case.translated.values:
        left.append(("dataset", case.translated.values["data.source"], "--data was given"))
    if left:
        yield ""
        yield "# Lines of the LLaMA-Factory file that have no counterpart here:"
    for key, value, reason in left:
        yield from _comment(f"{key}: {_written(value)} -- {reason}", "", "#   ")


def _comment(text: str, indent: str, mark: str = "# ") -> list[str]:
    width = WIDTH - len(indent) - len(mark)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [
        f"{indent}{mark if number == 0 else '#' + ' ' * (len(mark) - 1)}{line}"
        for number, line in enumerate(lines)
    ]


def _written(value: Any) -> str:
    """A value as YAML has it on one line, so that our reader gives the same one."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    text = text.removesuffix("...\n").strip()
    if isinstance(value, str) and ("\n" in text or read_value(text) != value):  # "5e-5" is a number to it
        return json.dumps(value, ensure_ascii=False)
    return text


def name_of(folder: Path) -> str:
    """The run's name: the folder's, in the letters that a name may have."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name).lstrip("._-")[:64] or "mine"


def write(case: Case, folder: Path, force: bool) -> Path:
    """Writes the configuration and its schema into ``folder``; returns the configuration.

    Raises:
        ConfigError: as :func:`text_of`, or a file is there and ``force`` is not.
    """
    text = text_of(case, str(folder))
    path, schema = folder / CONFIG_FILE, folder / SCHEMA_FILE
    there = [str(file) for file in (path, schema) if file.exists()]
    if there and not force:
        raise ConfigError(f"init: {there[0]} is there already; --force writes over it, another DIR beside it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    schema.write_text(schema_text(), encoding="utf-8")
    return path
