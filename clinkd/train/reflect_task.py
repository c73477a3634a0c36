"""What the rounds of reflection train on, and the exercises that make a corrector of a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinkd.data.correction import correction_prompt, elaborated
from clinkd.data.records import sample_id
from clinkd.distill.teacher_cache import TeacherCache
from clinkd.model.chat import encode
from clinkd.model.guided import GuidedModel
from clinkd.train.distill_task import CACHED, loss_against
from clinkd.train.ledger import Group
from clinkd.train.tasks import AnswerLoss, SupervisedTask, VqaSpec


@dataclass(frozen=True)
class Feedback:
    """What a round learns from; travels to the workers by value.

    Attributes:
        chosen: target text by sample, for what the student had wrong.
        share: of the groups in a batch that are about these.
        right: samples that the student had right, and replay: the share of groups that are about them.
        soft: folder of the corrector's states along the true answers, its distribution being the target;
            None: the chosen text is. method: divergence and temperature of ``distill_loss`` then.
    """

    chosen: Mapping[str, str]
    share: float
    right: Sequence[str] = ()
    replay: float = 0.0
    soft: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)


class ReflectLossModule(AnswerLoss):
    """Cross-entropy, and at the answer tokens of soft rows the divergence from the corrector in its place."""

    corrector_head: Tensor | None

    def __init__(
        self, model: GuidedModel, chunk_size: int, zero3: bool, coordinate_weight: float, cache: TeacherCache,
        method: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(model, chunk_size, zero3, coordinate_weight)
        self.register_buffer("corrector_head", cache.head, persistent=False)
        self.method, self.vocabulary = dict(method), cache.form.vocabulary

    def forward(  # type: ignore[override]
        self,
        labels: Tensor,
        soft_rows: Tensor,
        coordinates: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """``soft_rows`` [B] bool; of their answer tokens ``inputs`` has what the cache says (``CACHED``)."""
        said = {name: inputs.pop(name) for name in CACHED if name in inputs}
        hidden, targets = self.hidden(labels, **inputs)
        answered = labels[:, 1:] != -100
        soft = soft_rows[:, None].expand_as(answered)[answered]
        ce = loss = self.cross_entropy(hidden[~soft], targets[~soft])
        if coordinates is not None:
            heavy = coordinates[:, 1:][answered] & ~soft
            loss = ce + (self.coordinate_weight - 1) * self.cross_entropy(hidden[heavy], targets[heavy])
        kd = 0 * ce
        if said:
            kd = loss_against(
                said, hidden[soft], self.model.lm_head.weight, targets[soft], self.corrector_head,
                self.vocabulary, a=1.0, chunk_size=self.chunk_size, **self.method,
            ).kd  # fmt: skip
        return {"loss": loss + kd, "ce": ce, "kd": kd}


class ReflectTask(SupervisedTask):
    """The full training data with shares of feedback and of replay.

    A group of the ledger is, with probability ``share``, replaced by one that feedback is about, and with
    probability ``replay`` by one of what was right. Either brings as many turns as the group it replaces: its
    own first, then others of the same record, which keep a batch at its size and what is known of the image
    beside what was not.
    """

    def __init__(
        self, rows: Any, scratch: Path, spec: VqaSpec, feedback: Feedback, zero_stage: int = 0
    ) -> None:
        super().__init__(rows, scratch, spec, zero_stage)
        self.feedback = feedback
        at = {record: index for index, record in enumerate(self.ids)}
        self.groups, self.right = self._groups(at, feedback.chosen), self._groups(at, feedback.right)
        self.share = feedback.share if self.groups else 0.0
        self.replay = feedback.replay if self.right else 0.0
        self.cache = None if feedback.soft is None else TeacherCache(Path(feedback.soft), scratch)

    @staticmethod
    def _groups(at: Mapping[str, int], samples: Any) -> list[Group]:
        turns: dict[int, list[int]] = {}
        for name in sorted(samples):
            record, _, turn = name.rpartition("#")
            turns.setdefault(at[record], []).append(int(turn))
        return [(record, tuple(found)) for record, found in sorted(turns.items())]

    def build(self) -> nn.Module:
        if self.cache is None:
            return super().build()
        return ReflectLossModule(
            self.load(), self.spec.chunk_size, self.zero3, self.spec.coordinate_weight, self.cache,
            self.feedback.method,
        )  # fmt: skip

    def answer(self, record: int, turn: int) -> str:
        name = sample_id(self.ids[record], turn)
        if self.cache is None and name in self.feedback.chosen:
            return self.feedback.chosen[name]
        return super().answer(record, turn)

    def batch(self, groups: list[Group], step: int, total: int) -> tuple[dict[str, Any], int]:
        # Seeded by what the ledger dealt, so a resumed run draws the same.
        rng = np.random.default_rng([step, *(record for record, _ in groups)])
        mixed = [self._instead(group, rng) for group in groups]
        inputs, tokens = super().batch(mixed, step, total)
        if self.cache is not None:
            names = self.names(mixed)
            soft = [name in self.cache for name in names]
            inputs["soft_rows"] = torch.tensor(soft)
            if any(soft):
                inputs |= self.cache.read([name for name in names if name in self.cache])
        return inputs, tokens

    def _instead(self, group: Group, rng: np.random.Generator) -> Group:
        drawn = rng.random()
        if drawn < self.share:
            groups = self.groups
        elif drawn < self.share + self.replay:
            groups = self.right
        else:
            return group
        record, turns = groups[int(rng.integers(len(groups)))]
        others = [turn for turn in range(len(self.table.turns(record))) if turn not in turns]
        ordered = [*rng.permutation(turns).tolist(), *rng.permutation(others).tolist()]
        return record, tuple(ordered[: len(group[1])])


EXERCISES = 0.5
"""Share of a corrector's turns that stand as exercises; the others keep it able to look."""


class ExerciseTask(SupervisedTask):
    """The true answers; half of the turns stand as an exercise in correcting.

    An exercise shows the truth and an answer to another image's question of the same task, as the corrector
    will be shown them, and asks for the truth with where it is (``elaborated``).
    """

    def __init__(self, rows: Any, scratch: Path, spec: VqaSpec, seed: int, zero_stage: int = 0) -> None:
        super().__init__(rows, scratch, spec, zero_stage)
        self.seed = seed

    def row(self, record: int, turn: int, step: int, total: int) -> tuple[Sequence[int], Sequence[int]]:
        rng = np.random.default_rng([self.seed, step, record, turn])
        if rng.random() >= EXERCISES:
            return self.encoded(record, turn)
        asked = self.table.turns(record)[turn]
        wrong = self._another(asked["task"], int(rng.integers(len(self.ids))))
        target = elaborated(asked["task"], asked["answer"])
        if wrong is None or target is None:
            return self.encoded(record, turn)
        prompt = correction_prompt(asked["question"], asked["answer"], wrong)
        tokens = (self.images.grids(record).prod(-1) // self.processor.merge_size**2).tolist()
        return encode(self.tokenizer, prompt, target, tokens)

    def _another(self, task: str, record: int) -> str | None:
        """An answer to a question of ``task`` about ``record``; None where there is none."""
        return next((str(turn["answer"]) for turn in self.table.turns(record) if turn["task"] == task), None)
