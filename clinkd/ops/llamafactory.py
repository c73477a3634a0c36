"""A LLaMA-Factory training file read as keys of this configuration; what has none comes with its reason.

Decisions:
- Names are those of LLaMA-Factory 0.9 (its ``hparams``, and transformers' ``TrainingArguments`` under them).
  What the file leaves out has their defaults, not ours: a translated run should be the run that was written.
- A line is copied, computed, or left with a reason. Nothing is dropped in silence, no unknown key either.
- Optimiser settings come under ``optim.``: which stage they belong to is the caller's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clinkd.reading import ConfigError, read_yaml

Values = Mapping[str, Any]
Rule = Callable[[Any, Values], "dict[str, Any] | str"]

DEFAULTS: dict[str, Any] = {
    "finetuning_type": "lora", "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8, "weight_decay": 0.0, "warmup_ratio": 0.0, "lr_scheduler_type": "linear",
    "seed": 42, "disable_gradient_checkpointing": False,
}  # fmt: skip
"""What LLaMA-Factory and transformers take where the file says nothing and we would take something else."""

COPIED: dict[str, str] = {
    "model_name_or_path": "model.path", "learning_rate": "optim.lr", "num_train_epochs": "optim.epochs",
    "per_device_train_batch_size": "optim.batch_size", "gradient_accumulation_steps": "optim.accumulation",
    "weight_decay": "optim.weight_decay", "max_grad_norm": "optim.clip", "seed": "run.seed",
    "image_max_pixels": "model.max_pixels", "image_min_pixels": "model.min_pixels",
    "per_device_eval_batch_size": "evaluate.batch_size", "max_new_tokens": "evaluate.max_new_tokens",
}  # fmt: skip

REASONS: dict[str, str] = {
    "template": "the checkpoint's own chat template is used",
    "cutoff_len": "samples are never cut, an answer without its end teaches nothing; model.max_pixels limits "
    "an image's tokens",
    "max_samples": "all samples are used; give a smaller file with data.source, or distill.share",
    "packing": "counts samples, not tokens; give feed.pack_tokens and a batch_size of packed sequences",
    "overwrite_cache": "artifacts are addressed by content; what changed is made anew",
    "preprocessing_num_workers": "Ray Data sizes itself by the cluster",
    "dataloader_num_workers": "feed.tasks says who decodes beside a worker",
    "overwrite_output_dir": "nothing is overwritten: another run.name is another run, the same one goes on",
    "logging_steps": "every step is a line of metrics.jsonl",
    "plot_loss": "the report always draws it",
    "save_only_model": "checkpoints always hold what a resume needs; model/ holds the model alone",
    "save_total_limit": "the last two checkpoints are kept",
    "resume_from_checkpoint": "the same command goes on where it was",
    "ddp_timeout": "Ray Train ends a stage whose worker is gone",
    "eval_strategy": "rounds of reflection and a sweep's rungs look at the validation split",
    "eval_dataset": "the split is drawn from data.source, no image or patient on two sides",
    "trust_remote_code": "no code of a checkpoint's folder is ever run",
    "run_name": "a run is called by its folder, run.name",
    "freeze_multi_modal_projector": "the merger always trains",
    "video_max_pixels": "videos are refused",
    "fp16": "training runs in float32 or bfloat16 (compute.precision)",
    "quantization_bit": "quantised weights are not trained here",
    "adapter_name_or_path": "merge the adapter into its model first, and give that folder",
    "use_ray": "Ray always runs the workers",
}
REASONS |= {
    "neat_packing": REASONS["packing"], "evaluation_strategy": REASONS["eval_strategy"],
    "eval_steps": REASONS["eval_strategy"], "video_maxlen": REASONS["video_max_pixels"],
    "video_fps": REASONS["video_max_pixels"], "ray_num_workers": "give --gpus; it is compute.workers",
    "do_eval": REASONS["eval_strategy"], "do_predict": "evaluation is the last stage of every run",
}  # fmt: skip
UNKNOWN = "no counterpart that this translation knows"

_SCHEDULES = {
    "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
_KERNELS = {"auto": "auto", "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Translation:
    """``values`` by dotted key; ``left``: what has no counterpart, as (key, value, reason); ``notes``: what
    to look at before a run; ``taken``: lines that have one."""

    values: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[str, Any, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    taken: int = 0


def translate(path: Path) -> Translation:
    """Reads a LLaMA-Factory YAML.

    Raises:
        ConfigError: no such file, no YAML mapping, or one that names no model.
    """
    if not path.is_file():
        raise ConfigError(f"--from: no file {path}; give a training file of LLaMA-Factory")
    written = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if "model_name_or_path" not in written:
        raise ConfigError(
            f"--from: {path} names no model_name_or_path; is it a training file of LLaMA-Factory?"
        )
    whole = DEFAULTS | written
    if "warmup_steps" in written and "warmup_ratio" not in written:
        whole.pop("warmup_ratio")
    result = Translation()
    for key, value in whole.items():
        _one(key, value, whole, result, given=key in written)
    if not Path(str(written["model_name_or_path"])).is_dir():
        result.notes.append(
            "model.path: no folder of that name here; what a hub has is downloaded first, folders are read"
        )
    return result


def _one(key: str, value: Any, whole: Values, result: Translation, *, given: bool) -> None:
    if key in COPIED:
        found: dict[str, Any] | str = {} if value is None else {COPIED[key]: value}
    elif key in _RULES:
        try:
            found = {} if value is None else _RULES[key](value, whole)
        except (TypeError, ValueError, AttributeError):
            found = "not a value that LLaMA-Factory documents for it"
    else:
        found = REASONS.get(key, UNKNOWN)
    if isinstance(found, str):
        result.left.append((key, value, found if given else f"{found} (its default there)"))
        return
    left = found.pop("left", None)
    if left:
        result.left.append((key, *left))
    result.values |= found
    result.taken += given


def _stage(value: Any, whole: Values) -> dict[str, Any] | str:
    return (
        {}
        if value == "sft"
        else "clinkd trains on answers (sft) and by distillation; no preferences, no rewards"
    )


def _method(value: Any, whole: Values) -> dict[str, Any] | str:
    if value == "full":
        return {}
    if value != "lora":
        return "the text layers train whole or by adapters (model.lora)"
    rank = int(whole.get("lora_rank") or 8)
    found = {"model.lora.rank": rank, "model.lora.alpha": whole.get("lora_alpha") or 2 * rank}
    if whole.get("lora_dropout"):
        found["model.lora.dropout"] = whole["lora_dropout"]
    return found


def _of_lora(value: Any, whole: Values) -> dict[str, Any] | str:
    """Read with ``finetuning_type``, which LLaMA-Factory takes to be lora where it says nothing."""
    return {} if whole["finetuning_type"] == "lora" else "finetuning_type is not lora"


def _targets(value: Any, whole: Values) -> dict[str, Any] | str:
    if whole["finetuning_type"] != "lora":
        return "finetuning_type is not lora"
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(n) for n in value]
    if names == ["all"]:
        return {}
    known, others = [n for n in names if n in _TARGETS], [n for n in names if n not in _TARGETS]
    if not known:
        return f"adapters go into {', '.join(_TARGETS)} of the text layers"
    left = (
        (", ".join(others), f"adapters go into {', '.join(_TARGETS)} of the text layers") if others else None
    )
    return {"model.lora.targets": known, "left": left}


def _data(value: Any, whole: Values) -> dict[str, Any] | str:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(n) for n in value]
    folder = Path(str(whole.get("dataset_dir") or "data"))
    source = folder / _file_of(names[0], folder)
    images = str(whole.get("media_dir") or folder)
    reason = "one file or one folder of files is read; put them into one folder and give it with --data"
    left = (", ".join(names[1:]), reason) if names[1:] else None
    return {"data.source": str(source), "data.images": images, "left": left}


def _file_of(name: str, folder: Path) -> str:
    """The file of a data set, as ``dataset_info.json`` beside it has it."""
    try:
        found = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]["file_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{name}.json"
    return str(found)


def _steps(value: Any, whole: Values) -> dict[str, Any] | str:
    return {"optim.steps": value} if value > 0 else {}


def _warmup_ratio(value: Any, whole: Values) -> dict[str, Any] | str:
    return "warmup_steps goes before it" if whole.get("warmup_steps") else {"optim.warmup": value}


def _warmup_steps(value: Any, whole: Values) -> dict[str, Any] | str:
    total = whole.get("max_steps") or 0
    if not value:
        return {"optim.warmup": whole.get("warmup_ratio", 0.0)}
    if value < 1:
        return {"optim.warmup": value}
    if value < total:
        return {"optim.warmup": round(value / total, 6)}
    return "warm-up is a share of the steps (optim.warmup), which only max_steps would tell"


def _schedule(value: Any, whole: Values) -> dict[str, Any] | str:
    known = _SCHEDULES.get(str(value))
    return {"optim.schedule": known} if known else "schedules are cosine, constant and wsd; cosine stays"


def _half(value: Any, whole: Values) -> dict[str, Any] | str:
    return {"compute.precision": "bf16", "model.dtype": "bfloat16"} if value else {}


def _optimiser(value: Any, whole: Values) -> dict[str, Any] | str:
    return {} if str(value).startswith("adamw_torch") else "AdamW is the optimiser here"


def _deepspeed(value: Any, whole: Values) -> dict[str, Any] | str:
    """The ZeRO stage and what it offloads, from the file or, where it is not here, from its usual name."""
    try:
        zero = json.loads(Path(str(value)).read_text(encoding="utf-8"))["zero_optimization"]
        stage, offload = int(zero["stage"]), {key for key in zero if key.startswith("offload_")}
    except (OSError, ValueError, KeyError, TypeError):
        named = re.search(r"z(?:ero)?[_-]?([0-3])", str(value))
        if named is None:
            return "the file is not here, and its name tells no ZeRO stage; set compute.zero_stage"
        stage = int(named.group(1))
        offload = {"offload_optimizer", "offload_param"} if "offload" in str(value) else set()
    found: dict[str, Any] = {"compute.zero_stage": stage}
    if offload:
        found["compute.cpu_offload"] = True
    if "offload_param" in offload and stage == 3:
        found["compute.offload_parameters"] = True
    return found


def _output(value: Any, whole: Values) -> dict[str, Any] | str:
    path = Path(str(value))
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-")[:64] or "run"
    return {"run.root": str(path.parent), "run.name": name}


def _validation(value: Any, whole: Values) -> dict[str, Any] | str:
    return (
        {"data.validation_fraction": value} if value < 1 else "a share of the cases: data.validation_fraction"
    )


def _saves(value: Any, whole: Values) -> dict[str, Any] | str:
    return (
        {"compute.checkpoint_every": value} if value >= 1 else "a number of steps: compute.checkpoint_every"
    )


def _sinks(value: Any, whole: Values) -> dict[str, Any] | str:
    names = [value] if isinstance(value, str) else [str(name) for name in value]
    known = {"tensorboard": ("sinks.tensorboard", True), "wandb": ("sinks.wandb", "clinkd")}
    others = [name for name in names if name not in known and name != "none"]
    left = (
        (", ".join(others), "sinks are tensorboard, mlflow (give its address) and wandb") if others else None
    )
    return dict(known[name] for name in names if name in known) | {"left": left}


_RULES: dict[str, Rule] = {
    "stage": _stage, "finetuning_type": _method, "lora_rank": _of_lora, "lora_alpha": _of_lora,
    "lora_dropout": _of_lora, "lora_target": _targets, "dataset": _data, "max_steps": _steps,
    "warmup_ratio": _warmup_ratio, "warmup_steps": _warmup_steps, "lr_scheduler_type": _schedule,
    "bf16": _half, "pure_bf16": _half, "optim": _optimiser, "deepspeed": _deepspeed, "output_dir": _output,
    "val_size": _validation, "save_steps": _saves, "report_to": _sinks,
    "do_train": lambda value, _: {} if value else "the file only evaluates",
    "dataset_dir": lambda _, whole: {} if "dataset" in whole else "no dataset is named",
    "media_dir": lambda _, whole: {} if "dataset" in whole else "no dataset is named",
    "disable_gradient_checkpointing": lambda value, _: {"compute.gradient_checkpointing": not value},
    "freeze_vision_tower": lambda value, _: {"model.train_vision": not value},
    "freeze_language_model": lambda value, _: "the text layers always train" if value else {},
    "flash_attn": lambda value, _: (
        {"model.attention": _KERNELS[value]} if value in _KERNELS else "kernels: see model.attention"
    ),
}  # fmt: skip
