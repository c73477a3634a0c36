"""Where models come from: a user's checkpoint, one made here, layers of the teacher; and how a stage
trains one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinkd.artifacts import Draft
from clinkd.config import LoraSection, RopeSection, RunConfig, TinySection
from clinkd.data.scores import FILE
from clinkd.stages.base import Run

if TYPE_CHECKING:
    from clinkd.train.tasks import VqaSpec


TOKENIZER_SAMPLES = 20_000
"""Most samples that a tokenizer is made of, evenly spread: more change nothing but the time."""


def start_model(run: Run, draft: Draft, tiny: TinySection, path: str | None, seed: int) -> Path:
    """The folder a model starts from: the user's checkpoint, or one made here from the training text."""
    if path is not None:
        return Path(path)
    from clinkd.model.presets import TinySize, write_new_model

    vision = run.config.model.vision
    size = TinySize(
        hidden=tiny.hidden, layers=tiny.layers, heads=tiny.heads, mlp=tiny.mlp, vision_hidden=vision.hidden,
        vision_layers=vision.layers, vision_heads=vision.heads, patch=vision.patch,
        image_size=vision.image_size,
    )  # fmt: skip
    folder = draft.work / "start"
    if not (folder / "config.json").is_file():
        texts = _training_text(run.done["prepare"].path)
        write_new_model(texts, size, folder, vocab_size=run.config.model.vocab_size, seed=seed)
    return folder


def _training_text(data: Path) -> Iterator[str]:
    """What the tokenizer is made of: questions, answers, and what a corrector is told."""
    from clinkd.data.boxes import to_qwen
    from clinkd.data.correction import correction_prompt
    from clinkd.data.shards import read_manifest, samples

    step = -(-read_manifest(data)["by_split"]["train"] // TOKENIZER_SAMPLES)
    for number, sample in enumerate(islice(samples(data, "train"), 0, None, step)):
        yield to_qwen(sample["question"])
        yield to_qwen(sample["answer"])
        if number % 4 == 0:
            yield correction_prompt("", "", "")


def student_start(run: Run, draft: Draft) -> Path:
    """Return the folder that the student starts from: a checkpoint, or a model made here (``model.init``)."""
    model = run.config.model
    if model.path is not None or model.init == "random":
        return start_model(run, draft, model.tiny, model.path, run.config.student_seed)
    folder = draft.work / "start"
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import load_model, save_model
        from clinkd.model.students import student_from_teacher, student_with_new_layers

        taught = teacher_folder(run)
        dtype = getattr(torch, model.dtype)
        teacher, tokenizer = load_model(taught, dtype=dtype), AutoTokenizer.from_pretrained(taught)
        size, seed = model.tiny, run.config.student_seed
        student = (
            student_from_teacher(teacher, size.layers, size.mlp)
            if model.init == "teacher_layers"
            else student_with_new_layers(teacher, tokenizer, size.layers, size.mlp, seed, _box_maps(run))
        )
        save_model(student, tokenizer, AutoImageProcessor.from_pretrained(taught, backend="pil"), folder)
    return folder


def _box_maps(run: Run) -> Any:
    from clinkd.model.guide import OWN
    from clinkd.model.tiny_guide import box_maps

    return box_maps(run.done["guide"].path / OWN)


def guidance(rope: RopeSection) -> Any:
    from clinkd.model.rope import RopeGuidance

    return RopeGuidance(**rope.model_dump())


def teacher_rope() -> RopeSection:
    """The teacher's positions: unguided, so that its cache serves every guidance a sweep tries."""
    return RopeSection(mode="none")


def teacher_folder(run: Run) -> Path:
    """The teacher's Hugging Face folder: trained here, or the user's."""
    given = run.done["teacher"].path / "model.json"
    if given.is_file():
        return Path(json.loads(given.read_text())["path"])
    return run.done["teacher"].path / "model"


def scores(run: Run, rope: RopeSection) -> str | None:
    """The file of the guide's scores where ``rope`` asks for them."""
    return str((run.done["guide"].path / FILE).resolve()) if guidance(rope).guided != "none" else None


def pixel_limits(config: RunConfig) -> dict[str, Any]:
    """The configured limits of resized images, as a stage's settings; none where the folder's hold."""
    limits = [config.model.min_pixels, config.model.max_pixels]
    return {"pixels": limits} if any(limits) else {}


def lora_settings(config: RunConfig) -> dict[str, Any]:
    """The student's adapters, as a stage's settings; none where there are none."""
    return {"lora": config.model.lora.model_dump()} if config.model.lora else {}


def vqa_spec(
    run: Run, start: Path, rope: RopeSection, *, train_vision: bool, coordinate_weight: float = 1.0,
    lora: LoraSection | None = None,
) -> VqaSpec:  # fmt: skip
    """How a stage trains the model in ``start``."""
    from clinkd.model.lora import LoraOptions
    from clinkd.train.tasks import VqaSpec

    return VqaSpec(
        model=str(start.resolve()), guidance=guidance(rope), train_vision=train_vision,
        dtype=run.config.model.dtype, chunk_size=run.config.distill.chunk_size,
        gradient_checkpointing=run.config.compute.gradient_checkpointing, scores=scores(run, rope),
        coordinate_weight=coordinate_weight,
        min_pixels=run.config.model.min_pixels, max_pixels=run.config.model.max_pixels,
        lora=LoraOptions(**lora.model_dump()) if lora else None, attention=run.config.model.attention,
        bf16=run.config.compute.precision == "bf16",
    )  # fmt: skip
