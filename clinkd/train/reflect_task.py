"""What the rounds of reflection train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinkd.data.feed import Arrays
from clinkd.data.sampler import Batch, Group
from clinkd.data.shards import DataError
from clinkd.distill.teacher_cache import TeacherCache
from clinkd.model.guided import GuidedModel
from clinkd.train.distill_task import CACHED, loss_against, take_said
from clinkd.train.feed import FeedSpec
from clinkd.train.targets import SOFT
from clinkd.train.tasks import AnswerLoss, SupervisedTask, VqaSpec


@dataclass(frozen=True)
class Feedback:
    """What a round learns from; travels to the workers by value.

    Attributes:
        wrong: samples that the student had wrong; what is to be said to them stands in ``Corrections``.
        share: of the groups in a batch that are about these.
        right: samples that the student had right, and replay: the share of groups that are about them.
        soft: folder of the corrector's states along the true answers, its distribution being the target;
            None: the chosen text is. method: divergence and temperature of ``distill_loss`` then.
    """

    wrong: Sequence[str]
    share: float
    right: Sequence[str] = ()
    replay: float = 0.0
    soft: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)


class ReflectLossModule(AnswerLoss):
    """Cross-entropy, and at answer tokens of soft turns the divergence from the corrector in its place."""

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
        soft_tokens: Tensor,
        coordinates: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """``soft_tokens`` bool [N], of the N answer tokens; of these ``inputs`` has what the cache says."""
        said = {name: inputs.pop(name) for name in CACHED if name in inputs}
        hidden, targets = self.hidden(labels, **inputs)
        answered, soft = labels[:, 1:] != -100, soft_tokens
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

    A group of the sampler is, with probability ``share``, replaced by one that feedback is about, and with
    probability ``replay`` by one of what was right. Either brings as many documents as the group it replaces:
    its own first, then others of the same record, which keep a batch at its size and what is known of the
    image beside what was not.
    """

    def __init__(self, spec: VqaSpec, source: FeedSpec, feedback: Feedback, zero_stage: int = 0) -> None:
        super().__init__(spec, source, zero_stage)
        self.feedback, self.index = feedback, source.records()
        self.groups, self.right = self._groups(feedback.wrong), self._groups(feedback.right)
        self.share = feedback.share if self.groups else 0.0
        self.replay = feedback.replay if self.right else 0.0
        self.cache = None if feedback.soft is None else TeacherCache(Path(feedback.soft))

    def _groups(self, samples: Sequence[str]) -> list[Group]:
        """The records of samples with their documents among these, in the index's order.

        Raises:
            DataError: a sample of a record that is not trained on.
        """
        names = [name.rpartition("#") for name in sorted(samples)]
        places = self.index.find([record for record, _, _ in names]).tolist()
        found: dict[int, list[int]] = {}
        for place, (record, _, turn) in zip(places, names, strict=True):
            if place < 0:
                raise DataError(f"feedback about {record}, which is no record of the training split")
            document = int(turn) if self.index.documents[place] == self.index.turns[place] else 0
            if document not in found.setdefault(place, []):
                found[place].append(document)
        return [(record, tuple(documents)) for record, documents in sorted(found.items())]

    def build(self) -> nn.Module:
        if self.cache is None:
            return super().build()
        return ReflectLossModule(
            self.load(), self.spec.chunk_size, self.zero3, self.spec.coordinate_weight, self.cache,
            self.feedback.method,
        )  # fmt: skip

    def choose(self, batch: Batch, lane: int, step: int, total: int) -> Batch:
        # Seeded by what the sampler dealt, so a resumed run draws the same.
        rng = np.random.default_rng([step, lane, *(record for record, _ in batch.groups)])
        sequences = tuple(
            tuple(self._instead(group, rng) for group in sequence) for sequence in batch.sequences
        )
        return replace(batch, sequences=sequences)

    def _instead(self, group: Group, rng: np.random.Generator) -> Group:
        drawn = rng.random()
        if drawn < self.share:
            groups = self.groups
        elif drawn < self.share + self.replay:
            groups = self.right
        else:
            return group
        record, documents = groups[int(rng.integers(len(groups)))]
        others = [one for one in range(int(self.index.documents[record])) if one not in documents]
        ordered = [*rng.permutation(documents).tolist(), *rng.permutation(others).tolist()]
        return record, tuple(ordered[: len(group[1])])

    def arguments(
        self, arrays: Arrays, batch: Batch, step: int, device: torch.device
    ) -> tuple[dict[str, Any], int]:
        if self.cache is None:
            return super().arguments(arrays, batch, step, device)
        said, soft = take_said(arrays, self.cache), torch.from_numpy(arrays.pop(SOFT).copy())
        inputs, tokens = super().arguments(arrays, batch, step, device)
        inputs["soft_tokens"] = soft.repeat_interleave(answer_spans(inputs["labels"]))
        return inputs | (said if soft.any() else {}), tokens


def answer_spans(labels: Tensor) -> Tensor:
    """The number of answer tokens of each turn of a batch [B, L], in their order."""
    answered = (labels[:, 1:] != -100).int()
    begins = answered.clone()
    begins[:, 1:] = (answered[:, 1:] - answered[:, :-1]).clamp(min=0)
    return torch.bincount(begins.flatten().cumsum(0)[answered.flatten().bool()])[1:]
