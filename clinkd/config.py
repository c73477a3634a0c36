"""One configuration for everything: frozen, checked whole, YAML with dotted overrides on the command line.

Decisions:
- Unknown keys are refused; *all* errors of a file are listed at once, with path and nearest known key.
- A section knows which stage it matters to: fingerprints are taken from sections, never from the whole file.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from clinkd.config_model import LoraSection as LoraSection
from clinkd.config_model import ModelSection, Section, TeacherSection
from clinkd.config_model import TinySection as TinySection
from clinkd.config_model import VisionSection as VisionSection
from clinkd.config_sweep import ParameterSpace as ParameterSpace
from clinkd.config_sweep import SweepSection
from clinkd.config_train import DistillSection, OptimSection, ReflectSection
from clinkd.reading import ConfigError, merge, read_value, read_yaml


class RunSection(Section):
    """Where a run lives."""

    name: str = Field(
        "tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="folder of the run under root"
    )
    root: str = Field("runs", description="folder that holds all runs and the artifacts they share")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")
    student_seed: int | None = Field(
        None,
        ge=0,
        description="of the student's new weights and its samples' order; none: seed. Several "
        "students of one teacher, on one split, differ in it alone",
    )


class DataSection(Section):
    """Where images and questions come from."""

    source: str = Field(
        "phantoms",
        description="'phantoms', a Med-GRIT JSON/JSONL file or a folder of them, an SA-Med2D folder, or what "
        "prepare wrote; a path or URI (s3://)",
    )
    images: str | None = Field(
        None, description="folder of the images when source is a JSON file (default: images/ beside it)"
    )
    endpoint_url: str | None = Field(None, description="S3 other than Amazon's (or AWS_ENDPOINT_URL)")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="share of the cases kept for evaluation")
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="share kept to choose by while training (rounds of reflection)"
    )
    phantoms: int = Field(2000, ge=8, description="number of phantom images, when source is 'phantoms'")
    phantom_size: int = Field(112, ge=56, le=1024, description="pixels a side of a phantom")
    max_pixels: int = Field(50_000_000, ge=1, description="larger images are quarantined")
    records_per_shard: int = Field(
        512, ge=1, description="images, with all that is asked about them, in a file"
    )


class FeedSection(Section):
    """How training samples reach the workers, in every stage that trains."""

    pack_tokens: int | None = Field(
        None,
        ge=64,
        description="samples share sequences of at most so many tokens, counted by batch_size; none: a "
        "sequence each, padded",
    )
    conversations: bool = Field(
        False, description="all turns of a record as one conversation, not each turn for itself"
    )
    window_mib: int = Field(
        64, ge=1, description="MiB of images that are read and shuffled together; a row group at least"
    )
    tasks: int | None = Field(
        None,
        ge=0,
        description="Ray Data tasks that decode and pack at one time for each training worker; 0: the worker "
        "does it; none: 2 beside GPUs, 0 on CPUs",
    )


class RopeSection(Section):
    """Guided rotary positions (design: lambda = gap between modalities, alpha = step of the vision grid)."""

    lambda_h: float = Field(
        2.0, gt=0, description="gap between text and image on the axis of rows; 1 is M-RoPE's"
    )
    lambda_w: float = Field(2.0, gt=0, description="gap between text and image on the axis of columns")
    alpha_h: float = Field(1.0, gt=0, description="step from one row of patches to the next")
    alpha_w: float = Field(1.0, gt=0, description="step from one column of patches to the next")
    gamma: float = Field(0.0, ge=0, description="strength of the Med-CLIP guidance; 0 switches it off")
    mode: Literal["none", "pair", "patch"] = Field(
        "pair",
        description="what gamma guides: pair: images that do not fit their question stand further from its "
        "text; patch: rows and columns that the question is about are stretched; none: nothing",
    )


class GuideSection(Section):
    """The Med-CLIP guide that scores (image, question) pairs and patches."""

    path: str | None = Field(
        None,
        description="folder of an encoder to score with: CLIP, SigLIP, or an open_clip checkpoint such as "
        "BiomedCLIP; none: the guide that is trained here on (region, phrase) pairs",
    )

    steps: int = Field(400, ge=1, description="optimiser steps of the guide that is trained here")
    batch_size: int = Field(16, ge=1, description="images per step over all workers")
    lr: float = Field(2e-3, gt=0, description="highest learning rate of the guide")
    muon_lr: float | None = Field(
        0.02,
        gt=0,
        description="highest learning rate of Muon, which trains the guide's matrices; none: AdamW alone",
    )


class EvaluateSection(Section):
    """Answers to the test split, and their scores."""

    batch_size: int = Field(64, ge=1, description="questions that a model actor answers at one time")
    max_new_tokens: int = Field(64, ge=1, description="of an answer; it is cut there")
    limit: int | None = Field(None, ge=1, description="most test samples; none: all")
    text_metrics: bool = Field(True, description="BLEU, METEOR, ROUGE-L, CIDEr for rc and mia (needs a JRE)")
    spice_jars: str | None = Field(None, description="folder with the CoreNLP 3.6.0 jars for SPICE")


class ComputeSection(Section):
    """Ray, workers and DeepSpeed."""

    workers: int = Field(2, ge=1, description="processes that train, one for each GPU where there are any")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray keeps for each of them")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each of them; 0: it trains on CPUs")
    address: str | None = Field(
        None, description="Ray address; none: the cluster of the job, or one started here"
    )
    actors: int = Field(2, ge=1, description="model actors of Ray Data stages (guide, label, predict)")
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO: 1 shards optimiser states, 2 gradients too, 3 parameters too",
    )
    teacher_zero_stage: int | None = Field(
        None,
        ge=0,
        le=3,
        description="of the stage teacher, and of a teacher beside its student; none: zero_stage",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="that training computes in; bf16 on GPUs")
    deepspeed: str | None = Field(None, description="DeepSpeed JSON whose keys are laid under ours")
    gradient_checkpointing: bool = Field(
        False, description="keep fewer activations and compute them again: less memory, more time"
    )
    cpu_offload: bool = Field(False, description="optimiser states in the workers' main memory")
    offload_parameters: bool = Field(
        False, description="parameters too, in the stages that train under ZeRO-3; needs cpu_offload"
    )
    overlap_comm: bool | None = Field(
        None,
        description="reduce gradients while the backward pass goes on; none: as compute.deepspeed says, else "
        "on GPUs",
    )
    bucket_size: int | None = Field(
        None,
        ge=1,
        description="gradients reduced, and parameters gathered, at a time, in elements; none: as "
        "compute.deepspeed says, else by the model's width",
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    checkpoint_store: str | None = Field(
        None,
        description="a bucket or folder that checkpoints are copied to while training goes on, and come back "
        "from where the run's own folder has none",
    )
    max_failures: int = Field(2, ge=0, description="worker failures to recover from, of a run's stages")
    max_preemptions: int = Field(
        -1, ge=-1, description="nodes taken away to recover from, counted apart; -1: any number"
    )
    min_workers: int | None = Field(
        None, ge=1, description="go on with as few when nodes are taken away; none: wait for all workers"
    )
    grace: float = Field(
        60, gt=0, description="seconds that a checkpoint may take after SIGTERM or Ctrl-C, before all ends"
    )

    @property
    def gpus_per_actor(self) -> float:
        """What Ray keeps for a model actor of the GPUs that train by turns with it; it uses one at most."""
        return min(1.0, self.workers * self.gpus_per_worker / self.actors)

    @model_validator(mode="after")
    def _elastic(self) -> ComputeSection:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than workers ({self.workers})")
        return self

    @model_validator(mode="after")
    def _offloaded(self) -> ComputeSection:
        if self.offload_parameters and 3 not in (self.zero_stage, self.teacher_zero_stage):
            raise ValueError("offload_parameters needs zero_stage: 3 or teacher_zero_stage: 3")
        if self.offload_parameters and not self.cpu_offload:
            raise ValueError("offload_parameters needs cpu_offload: true")
        return self


class WatchSection(Section):
    """What training does about what goes wrong without an error; warnings are lines of events.jsonl."""

    nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="of a step whose loss or gradients are not finite: leave it out, or end"
    )
    patience: int = Field(5, ge=1, description="steps left out in a row, after which training ends")
    explosion: float = Field(20, gt=1, description="times its median that a loss is said to explode at")
    on_explosion: Literal["note", "rollback", "stop"] = Field(
        "note", description="of a loss that explodes; rollback: to the last checkpoint, past those steps"
    )
    slow_step: float = Field(10, gt=1, description="times the median that a step is said to be slow at")
    samples: bool = Field(
        False, description="whether each rank keeps which samples every step was dealt, in samples-RANK.jsonl"
    )


class SinksSection(Section):
    """Where a run's numbers go beside metrics.jsonl; numbers and settings only, no texts and no names."""

    tensorboard: bool = Field(False, description="event files in runs/NAME/tensorboard")
    mlflow: str | None = Field(
        None, description="tracking URI (http://, sqlite:///) or a folder; experiment 'clinkd'"
    )
    wandb: str | None = Field(
        None, description="Weights & Biases project; WANDB_MODE=offline keeps it in runs/NAME/wandb"
    )


class RunConfig(Section):
    """The whole configuration of a run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    feed: FeedSection = FeedSection()
    model: ModelSection = ModelSection()
    teacher: TeacherSection = TeacherSection()
    rope: RopeSection = RopeSection()
    guide: GuideSection = GuideSection()
    sft: OptimSection = Field(OptimSection(), description="Supervised training of the teacher.")
    distill: DistillSection = DistillSection()
    reflect: ReflectSection = ReflectSection()
    evaluate: EvaluateSection = EvaluateSection()
    compute: ComputeSection = ComputeSection()
    watch: WatchSection = WatchSection()
    sinks: SinksSection = SinksSection()
    sweep: SweepSection = SweepSection()

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> RunConfig:
        zero = self.compute.zero_stage
        teacher = zero if self.compute.teacher_zero_stage is None else self.compute.teacher_zero_stage
        sections = {
            "sft": (self.sft, teacher), "distill.optim": (self.distill.optim, zero),
            "reflect.optim": (self.reflect.optim, zero), "reflect.exercises": (self.reflect.exercises, zero),
        }  # fmt: skip
        for name, (optim, stage) in sections.items():
            if optim is not None and optim.muon_lr is not None and stage > 0:
                raise ValueError(
                    f"{name}.muon_lr={optim.muon_lr:g}: ZeRO stage {stage} cuts matrices apart. "
                    "Set compute.zero_stage=0, or muon_lr=null"
                )
        return self

    @model_validator(mode="after")
    def _online_sees_single_answers(self) -> RunConfig:
        if self.distill.teacher == "online" and (self.feed.pack_tokens or self.feed.conversations):
            key = "pack_tokens" if self.feed.pack_tokens else "conversations"
            raise ValueError(
                f"feed.{key}: distill.teacher=online samples an answer to each question by itself; take "
                f"distill.teacher=cache, or leave feed.{key} out"
            )
        return self

    @property
    def student_seed(self) -> int:
        return self.run.seed if self.run.student_seed is None else self.run.student_seed


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file and lays ``a.b=c`` overrides over it.

    A file may name another one to start from with ``base: FILE`` (relative to itself).

    Raises:
        ConfigError: with one line per mistake: the key's path, what is wrong, what is known.
    """
    values = _read_with_base(Path(path), ())
    for override in overrides or []:
        _lay_over(values, override)
    return check_config(values, str(path))


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; the examples are in configs/")
    values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    base = values.pop("base", None)
    if base is None:
        return values
    target = (path.parent / str(base)).resolve()
    if target in seen:
        raise ConfigError(f"{path}: base {base} leads back to itself")
    return merge(_read_with_base(target, (*seen, path.resolve())), values)


def check_config(values: dict[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, where) for item in error.errors())) from None


def with_values(config: RunConfig, changes: dict[str, Any], where: str = "sweep") -> RunConfig:
    """``config`` with dotted keys changed, checked again."""
    values = config.model_dump()
    for key, value in changes.items():
        _set(values, key, value)
    return check_config(values, where)


def _lay_over(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written section.key=value")
    _set(values, key, read_value(text))


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values[parent] = {} if values.get(parent) is None else values[parent]
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {parent} is not a section")
        values = inner
    values[last] = value


def _explain(item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_beside(item["loc"])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: {path}: unknown key; {hint}"
    got = json.dumps(item["input"], default=str)
    return f"{where}: {path}: {item['msg']} (got {got[:80]})"


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = next((kind for kind in get_args(field.annotation) if hasattr(kind, "model_fields")),
                     field.annotation)  # fmt: skip
    return list(getattr(model, "model_fields", {}))


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
