"""What stage distill trains on: turns with what the cache says of the teacher at their answer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from clinkd.data.records import sample_id
from clinkd.data.shards import DataError
from clinkd.distill.curriculum import admitted_margin
from clinkd.distill.losses import DistillLoss, distill_loss, distill_loss_topk
from clinkd.distill.summary import tail_at
from clinkd.distill.teacher_cache import TeacherCache
from clinkd.model.guided import GuidedModel
from clinkd.train.flops import Work
from clinkd.train.ledger import Group
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

    A turn under the admitted margin waits for a later epoch; of a group in which all wait, the one of
    which the teacher is surest stays. A turn whose pseudo-label was refused never comes; where a batch
    has no other, the surest turn of all stands in, so that no rank is ever without work.

    Raises:
        DataError: every pseudo-label was refused, and there is no truth.
    """

    def __init__(
        self, rows: Any, scratch: Path, spec: VqaSpec, distill: DistillSpec, zero_stage: int = 0
    ) -> None:
        super().__init__(rows, scratch, spec, zero_stage)
        self.distill, self.cache = distill, TeacherCache(Path(distill.cache), scratch)
        margins = self.cache.margins
        if not margins:
            raise DataError("label: nothing to learn from, every pseudo-label was refused (see its counts)")
        self.margins = np.array(list(margins.values()))
        record, _, turn = max(margins, key=lambda name: margins[name]).rpartition("#")
        self.surest: Group = (self.ids.index(record), (int(turn),))

    def build(self) -> nn.Module:
        return DistillLossModule(
            self.load(), self.spec.chunk_size, self.cache.head, self.distill.options, zero3=self.zero3,
            vocabulary=self.cache.form.vocabulary,
        )  # fmt: skip

    def answer(self, record: int, turn: int) -> str:
        return str(self.cache.answers[sample_id(self.ids[record], turn)])

    def bar(self, step: int, total: int) -> float:
        """The smallest margin that is admitted."""
        return admitted_margin(
            step, total, self.margins, self.distill.start_quantile, self.distill.end_quantile
        )

    def facts(self, step: int, total: int) -> dict[str, float]:
        """Where the curriculum stands: its bar, and the share of the cache's samples at or above it."""
        bar = self.bar(step, total)
        return {"admitted_margin": bar, "admitted_share": float((self.margins >= bar).mean())}

    def batch(self, groups: list[Group], step: int, total: int) -> tuple[dict[str, Any], int]:
        admitted = self.admitted(groups, step, total)
        inputs, tokens = super().batch(admitted, step, total)
        return inputs | self.cache.read(self.names(admitted)), tokens

    def admitted(self, groups: list[Group], step: int, total: int) -> list[Group]:
        """What of some groups is learned from in a step."""
        bar = self.bar(step, total)
        found = [(record, self._admit(record, turns, bar)) for record, turns in groups]
        return [group for group in found if group[1]] or [self.surest]

    def _admit(self, record: int, turns: tuple[int, ...], bar: float) -> tuple[int, ...]:
        names = {turn: sample_id(self.ids[record], turn) for turn in turns}
        margins = {turn: self.cache.margins[name] for turn, name in names.items() if name in self.cache}
        if not margins:
            return ()
        kept = tuple(turn for turn, margin in margins.items() if margin >= bar)
        return kept or (max(margins, key=lambda turn: margins[turn]),)
