"""Which samples a step sees: a pure function of seed, data and position, whoever asks and however often.

Decisions:
- The unit is a *group*: one record with up to ``per_group`` of its turns, which share the record's image. In
  an epoch every turn of every record is in exactly one group.
- Groups of all epochs form one endless sequence; a step of W workers with B groups each takes the next W*B.
  A checkpoint therefore needs one number, the groups consumed, and another number of workers may resume it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Group = tuple[int, tuple[int, ...]]
"""(record index, turn numbers)."""


@dataclass
class Ledger:
    """The order of groups over all epochs.

    Args:
        turns: turns of each record, [records] integers of at least 1.
        per_group: most turns that share one image in a group.
        seed: of the order; epochs differ by (seed, epoch).
    """

    turns: Sequence[int]
    per_group: int
    seed: int
    _epochs: dict[int, list[Group]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.turns) or min(self.turns) < 1 or self.per_group < 1:
            raise ValueError(
                "a ledger needs records with at least one turn each, and per_group of at least 1"
            )

    @property
    def groups_per_epoch(self) -> int:
        return sum(math.ceil(count / self.per_group) for count in self.turns)

    def epoch(self, number: int) -> list[Group]:
        """All groups of an epoch in their order."""
        if number not in self._epochs:
            self._epochs = {number: self._draw(number)}  # only the newest is kept
        return self._epochs[number]

    def _draw(self, number: int) -> list[Group]:
        rng = np.random.default_rng([self.seed, number])
        groups: list[Group] = []
        for record, count in enumerate(self.turns):
            shuffled = rng.permutation(count).tolist()
            groups += [
                (record, tuple(shuffled[at : at + self.per_group])) for at in range(0, count, self.per_group)
            ]
        return [groups[index] for index in rng.permutation(len(groups))]

    def take(self, start: int, count: int) -> list[Group]:
        """Groups ``start`` .. ``start + count`` of the endless sequence."""
        size = self.groups_per_epoch
        return [self.epoch(at // size)[at % size] for at in range(start, start + count)]

    def share(self, consumed: int, place: int, batch: int) -> list[Group]:
        """Micro-batch ``place`` of the step that begins after ``consumed`` groups, whichever rank has it."""
        return self.take(consumed + place * batch, batch)
