"""Distillation from a teacher that is there: on the cache's answers, and on the student's own.

Decisions:
- A share ``on_policy`` of the steps (lambda of GKD: Agarwal et al. 2024, arXiv:2306.13649) learns from
  answers that the student samples as it is in that step; the others from the cache's, of which only the
  states are not read. Admission by margin holds for both: it is about the question.
- Such a step has no truth, so no cross-entropy: its loss is a * KD / (1 + a). A token's divergence then
  weighs in both kinds of steps the same, and ``on_policy`` moves where it is looked at, not how much.
- Which steps sample follows from (seed, step): all ranks agree, and so does a resumed run. What is sampled
  follows from them and the groups that the sampler dealt.
- Sampled are token ids, and learned from as they are: a text would come back as other tokens. Tokens that
  stand for images are not sampled; the forward pass would look for their patches.
- Both models see one batch, so they have to share tokens and patches.
- Under ZeRO-3 the student is gathered whole on every rank while it samples, its hooks set aside: answers of
  different lengths are different numbers of forward passes, in which no rank may wait for another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinkd.config import ConfigError
from clinkd.data.feed import Arrays
from clinkd.data.sampler import Batch
from clinkd.distill.losses import distill_loss
from clinkd.distill.online import OnlineTeacher
from clinkd.model.chat import collate
from clinkd.model.generate import generate_ids
from clinkd.model.guided import GuidedModel
from clinkd.model.pixels import load_processor
from clinkd.train.distill_task import DistillSpec, DistillTask
from clinkd.train.feed import FeedSpec
from clinkd.train.flops import Work
from clinkd.train.tasks import AnswerLoss, SupervisedTask, VqaSpec

SEEN = ("labels", "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_index")
"""What the teacher gets of a batch: not the guide's scores, its positions are its own."""


@dataclass(frozen=True)
class OnlineSpec:
    """The teacher beside the student, and how the student samples; travels by value."""

    teacher: str  # Hugging Face folder
    dtype: str = "float32"
    zero_stage: int = 0  # 3: sharded over the ranks; else a copy on each
    on_policy: float = 0.0
    temperature: float = 1.0
    max_new_tokens: int = 32
    seed: int = 0


class OnlineLoss(AnswerLoss):
    """(a * KD + CE) / (1 + a), or a * KD / (1 + a) of sampled answers; sums over answer tokens."""

    def __init__(
        self, model: GuidedModel, chunk_size: int, options: Mapping[str, Any], zero3: bool = False
    ) -> None:
        super().__init__(model, chunk_size, zero3)
        self.options = dict(options)

    def forward(  # type: ignore[override]
        self, labels: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, sampled: bool, **inputs: Any
    ) -> dict[str, Tensor]:
        """``teacher_hidden`` [N, Ht] at the answer tokens, ``teacher_head`` [Vt, Ht].

        Sampled, there is no ``ce``, and ``sampled`` counts the tokens: 1 in a step's line of the metrics.
        """
        hidden, targets = self.hidden(labels, **inputs)
        found = distill_loss(
            hidden, self.model.lm_head.weight, targets, teacher_hidden, teacher_head,
            chunk_size=self.chunk_size, normalizer=1.0, **self.options,
        )  # fmt: skip
        if not sampled:
            return {"loss": found.total, "kd": found.kd, "ce": found.ce}
        share = self.options["a"] / (1 + self.options["a"])
        count = torch.tensor(float(len(targets)), device=targets.device)
        return {"loss": share * found.kd, "kd": found.kd, "sampled": count}

    def own_work(self, arguments: Mapping[str, Any], tokens: int) -> list[Work]:
        """The teacher's head over the answer tokens; the teacher itself runs before the step."""
        return [Work(tokens, arguments["teacher_head"].numel(), trained=0, reached=False)]


class OnlineDistillTask(DistillTask):
    """As :class:`DistillTask`, the teacher's states worked out for each batch; see above.

    The teacher is loaded with the first batch, when the engine has placed the student.
    """

    keeps = False  # the teacher is shown the pixels

    def __init__(
        self,
        spec: VqaSpec,
        source: FeedSpec,
        distill: DistillSpec,
        online: OnlineSpec,
        zero_stage: int = 0,
    ) -> None:
        super().__init__(spec, source, distill, zero_stage)
        self.online = online

    def build(self) -> nn.Module:
        self.student = self.load()
        return OnlineLoss(self.student, self.spec.chunk_size, self.distill.options, self.zero3)

    @cached_property
    def teacher(self) -> OnlineTeacher:
        dtype = getattr(torch, self.online.dtype)
        return OnlineTeacher(self.online.teacher, self.student.device, dtype, self.online.zero_stage == 3)

    def arguments(
        self, arrays: Arrays, batch: Batch, step: int, device: torch.device
    ) -> tuple[dict[str, Any], int]:
        inputs, tokens = SupervisedTask.arguments(self, arrays, batch, step, device)
        sampled = self.samples(step)
        if sampled:
            inputs |= self._sampled(batch, inputs, step)
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
        states = self.teacher.states(**{name: inputs[name] for name in SEEN})
        return inputs | {
            "teacher_hidden": states, "teacher_head": self.teacher.head, "sampled": sampled
        }, tokens  # fmt: skip

    def samples(self, step: int) -> bool:
        """Whether a step learns from the student's own answers."""
        return bool(np.random.default_rng([self.online.seed, step]).random() < self.online.on_policy)

    def _sampled(self, batch: Batch, inputs: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """``collate`` of the batch's prompts with answers that the student samples."""
        asked = [number for record, turns in batch.groups for number in (record, *turns)]
        seed = int(np.random.default_rng([self.online.seed, step, *asked]).integers(2**63))
        prompts = prompts_of(inputs["input_ids"], inputs["labels"]) if asked else []
        scores = {name: inputs[name] for name in ("alignment", "relevance") if name in inputs}
        with whole(self.student) if self.zero3 else torch.no_grad():  # all ranks, also one without prompts
            if not prompts:
                return {}
            written = generate_ids(
                self.student, self.tokenizer, prompts, inputs["pixel_values"], inputs["image_grid_thw"],
                inputs["image_index"], max_new_tokens=self.online.max_new_tokens, do_sample=True,
                temperature=self.online.temperature, seed=seed, banned=self._banned(), **scores,
            )  # fmt: skip
        rows = [(prompt, answers[0]) for prompt, answers in zip(prompts, written, strict=True)]
        return collate(rows, self.tokenizer.pad_token_id)

    def _banned(self) -> list[int]:
        """Tokens that stand for images, and those that the teacher does not have."""
        config = self.student.config
        ids = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
        return ids + list(range(len(self.teacher.head), config.text_config.vocab_size))


def prompts_of(input_ids: Tensor, labels: Tensor) -> list[list[int]]:
    """The ids before each row's answer; [B, L] both."""
    starts = (labels != -100).int().argmax(1).tolist()
    return [row[:start] for row, start in zip(input_ids.tolist(), starts, strict=True)]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A model that ZeRO-3 took apart, whole and without its hooks; all ranks enter and leave together."""
    import deepspeed

    hooks = ("_forward_pre_hooks", "_forward_hooks")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        kept = [(part, name, getattr(part, name)) for part in model.modules() for name in hooks]
        for part, name, _ in kept:
            setattr(part, name, OrderedDict())
        try:
            yield
        finally:
            for part, name, found in kept:
                setattr(part, name, found)


def check_shared(student: VqaSpec, teacher: str) -> None:
    """Refuses a teacher that cannot be shown the student's batches.

    Raises:
        ConfigError: it has other tokens, or cuts images into other patches.
    """
    from transformers import AutoTokenizer

    folders = (student.model, teacher)
    own, his = (AutoTokenizer.from_pretrained(path).get_vocab() for path in folders)
    found = [load_processor(path, student.min_pixels, student.max_pixels) for path in folders]
    keys = ("patch_size", "temporal_patch_size", "merge_size", "size", "image_mean", "image_std")
    differ = ["tokens"] if own != his else []
    differ += [key for key in keys if getattr(found[0], key) != getattr(found[1], key)]
    if differ:
        raise ConfigError(
            f"distill.teacher: an online teacher sees the student's own batches, but {teacher} and "
            f"{student.model} differ in {', '.join(differ)}; use distill.teacher=cache"
        )
