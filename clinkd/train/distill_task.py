"""What stage distill trains on: turns with what the cache says of the teacher at their answer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinkd.data.feed import Arrays
from clinkd.data.index import RecordIndex
from clinkd.data.sampler import Batch
from clinkd.data.shards import DataError
from clinkd.distill.curriculum import admitted_margin
from clinkd.distill.losses import DistillLoss, distill_loss, distill_loss_topk
from clinkd.distill.summary import tail_at
from clinkd.distill.teacher_cache import TeacherCache
from clinkd.model.guided import GuidedModel
from clinkd.train.feed import FeedSpec
from clinkd.train.flops import Work
from clinkd.train.targets import SAID
from clinkd.train.tasks import AnswerLoss, SupervisedTask, VqaSpec


def loss_against(
    said: Mapping[str, Tensor],
    hidden: Tensor,
    own: Tensor,
    targets: Tensor,
    teacher_head: Tensor | None,
    vocabulary: int | None,
    **how: Any,
) -> DistillLoss:
    """The loss at answer tokens against what a cache says of them, as ``Form.unpack`` gives it: either
    ``teacher_hidden`` [N, Ht], or the three of top-k logits; sums. ``how``: as ``distill_loss`` takes it."""
    how = {"normalizer": 1.0} | how
    if "teacher_hidden" in said:
        assert teacher_head is not None
        states = said["teacher_hidden"].to(hidden.dtype)
        return distill_loss(hidden, own, targets, states, teacher_head, **how)
    assert vocabulary is not None
    return distill_loss_topk(
        hidden, own, targets, said["top_logits"], said["top_ids"].long(),
        tail_at(said["tails"], how["temperature"]), vocabulary=vocabulary, **how,
    )  # fmt: skip


CACHED = ("teacher_hidden", "top_logits", "top_ids", "tails")
"""What of a batch's arguments a cache says."""


class DistillLossModule(AnswerLoss):
    """(a * KD + CE) / (1 + a) against what the cache says of the teacher; sums over answer tokens."""

    teacher_head: Tensor | None

    def __init__(
        self,
        model: GuidedModel,
        chunk_size: int,
        teacher_head: Tensor | None,
        options: Mapping[str, Any],
        zero3: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(model, chunk_size, zero3)
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self.options, self.vocabulary = dict(options), vocabulary

    def forward(self, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """``inputs``: the model's, and what the cache says of the answer tokens (``CACHED``)."""
        said = {name: inputs.pop(name) for name in CACHED if name in inputs}
        hidden, targets = self.hidden(labels, **inputs)
        found = loss_against(
            said, hidden, self.model.lm_head.weight, targets, self.teacher_head, self.vocabulary,
            chunk_size=self.chunk_size, **self.options,
        )  # fmt: skip
        return {"loss": found.total, "kd": found.kd, "ce": found.ce}

    def own_work(self, arguments: Mapping[str, Any], tokens: int) -> list[Work]:
        """The teacher's head over the answer tokens; a cache of logits needs none."""
        if self.teacher_head is None:
            return []
        return [Work(tokens, self.teacher_head.numel(), trained=0, reached=False)]


@dataclass(frozen=True)
class DistillSpec:
    """How a student learns from the cache; travels by value."""

    cache: str
    options: Mapping[str, Any]  # a, temperature, divergence of distill_loss
    start_quantile: float
    end_quantile: float


class DistillTask(SupervisedTask):
    """Turns with the cache's answers and what the teacher says at their tokens, admitted by its margin.

    A turn under the admitted margin waits for a later epoch, and a batch is the smaller for it; one whose
    pseudo-label was refused never comes.

    Raises:
        DataError: every pseudo-label was refused, and there is no truth.
    """

    def __init__(self, spec: VqaSpec, source: FeedSpec, distill: DistillSpec, zero_stage: int = 0) -> None:
        super().__init__(spec, source, zero_stage)
        self.distill, self.cache = distill, TeacherCache(Path(distill.cache))
        if not len(self.cache):
            raise DataError("label: nothing to learn from, every pseudo-label was refused (see its counts)")
        self.margins = self.cache.margins
        self.curriculum = Curriculum(source.records(), self.cache)

    def build(self) -> nn.Module:
        return DistillLossModule(
            self.load(), self.spec.chunk_size, self.cache.head, self.distill.options, zero3=self.zero3,
            vocabulary=self.cache.form.vocabulary,
        )  # fmt: skip

    def bar(self, step: int, total: int) -> float:
        """The smallest margin that is admitted."""
        return admitted_margin(
            step, total, self.margins, self.distill.start_quantile, self.distill.end_quantile
        )

    def facts(self, step: int, total: int) -> dict[str, float]:
        """Where the curriculum stands: its bar, and the share of the cache's samples at or above it."""
        bar = self.bar(step, total)
        return {"admitted_margin": bar, "admitted_share": float((self.margins >= bar).mean())}

    def choose(self, batch: Batch, lane: int, step: int, total: int) -> Batch:
        return self.curriculum.admit(batch, self.bar(step, total))

    def arguments(
        self, arrays: Arrays, batch: Batch, step: int, device: torch.device
    ) -> tuple[dict[str, Any], int]:
        said = take_said(arrays, self.cache)
        inputs, tokens = super().arguments(arrays, batch, step, device)
        return inputs | said, tokens


def take_said(arrays: Arrays, cache: TeacherCache) -> dict[str, Tensor]:
    """What a cache says of a batch's answer tokens, out of the batch's arrays; none where nothing came."""
    kept = {name: arrays.pop(SAID + name).tobytes() for name in cache.form.columns if SAID + name in arrays}
    return cache.unpack(kept) if kept else {}


class Curriculum:
    """Which documents of an index the teacher is how sure of.

    A conversation's margin is the mean of its turns'.
    """

    def __init__(self, index: RecordIndex, cache: TeacherCache) -> None:
        margins = np.full(int(index.starts[-1]), np.nan, np.float32)
        numbers = index.turn_numbers(cache.samples)
        known = numbers >= 0
        margins[numbers[known]] = cache.margins[known]
        self._starts = index.starts[:-1]
        if len(index.documents) and not np.array_equal(index.documents, index.turns):  # conversations
            there = ~np.isnan(margins)
            sums = np.add.reduceat(np.where(there, margins, 0), self._starts)
            counts = np.add.reduceat(there.astype(np.float32), self._starts)
            margins = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)
            self._starts = np.arange(len(index))
        self._margins = margins

    def admit(self, batch: Batch, bar: float) -> Batch:
        """What of a batch's documents has a margin of ``bar`` at least; see ``DistillTask``."""
        sequences = []
        for sequence in batch.sequences:
            found = [(record, self._admit(record, documents, bar)) for record, documents in sequence]
            if kept := tuple(group for group in found if group[1]):
                sequences.append(kept)
        return replace(batch, sequences=tuple(sequences))

    def _admit(self, record: int, documents: tuple[int, ...], bar: float) -> tuple[int, ...]:
        margins = self._margins[self._starts[record] + np.array(documents)]
        return tuple(np.array(documents)[margins >= bar].tolist())  # nothing is >= where there is no margin
