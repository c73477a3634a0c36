"""What the model is to say to each question of a batch, and what else is known of that answer.

Decisions:
- A stage differs from the next in its targets alone: the true answers, the teacher's, corrections. Which
  samples come is the sampler's matter, how they become arrays train/batches.py's.
- Targets are read where batches are made, for the whole batch at once; what travels there is a small frozen
  description of where they lie.
- What a cache says of the answer tokens goes to the rank as the bytes that were kept; ``SAID`` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clinkd.data.correction import correction_prompt, elaborated
from clinkd.distill.teacher_cache import TeacherCache

SAID = "said."
"""Before the name of a cache's column in a batch."""
SOFT = "soft_turns"
"""Of a batch: which of its turns learn from the corrector's distribution."""
Arrays = dict[str, np.ndarray]


class Turn(NamedTuple):
    """A question of a batch, as it stands in the data."""

    sample: str
    task: str
    question: str
    answer: str


class Targets(Protocol):
    """Where a stage's targets are."""

    def open(self) -> Opened:
        """Reads what is needed for any batch."""


class Opened(Protocol):
    def talk(self, turns: Sequence[Turn], step: int) -> list[tuple[str, str] | None]:
        """Question and answer of each turn in the batch of a step; None: nothing is to be said to it."""

    def arrays(self, samples: Sequence[str]) -> Arrays:
        """What goes with the batch of these turns, in its order."""


@dataclass(frozen=True)
class Truth:
    """The answers of the data."""

    def open(self) -> Truth:
        return self

    def talk(self, turns: Sequence[Turn], step: int) -> list[tuple[str, str] | None]:
        return [(turn.question, turn.answer) for turn in turns]

    def arrays(self, samples: Sequence[str]) -> Arrays:
        return {}


@dataclass(frozen=True)
class Labels:
    """What stage label kept: the answers that the student learns, and what the teacher said at their tokens.

    ``states``: whether the latter comes with a batch; an online teacher says it anew.
    """

    folder: str
    states: bool = True

    def open(self) -> _Labels:
        return _Labels(self)


class _Labels:
    def __init__(self, labels: Labels) -> None:
        self.cache, self.states = TeacherCache(Path(labels.folder)), labels.states

    def talk(self, turns: Sequence[Turn], step: int) -> list[tuple[str, str] | None]:
        places = self.cache.find([turn.sample for turn in turns]).tolist()
        return [
            (turn.question, self.cache.answer(place)) if place >= 0 else None
            for turn, place in zip(turns, places, strict=True)
        ]

    def arrays(self, samples: Sequence[str]) -> Arrays:
        return said(self.cache, samples) if self.states else {}


@dataclass(frozen=True)
class Corrections:
    """The data's answers, and in the place of what was wrong the texts of a round's feedback.

    Args:
        feedback: Parquet file with ``sample`` and ``chosen``. soft: a list as ``TeacherCache`` reads it, of
            the corrector's states along the true answers, which are the target then.
    """

    feedback: str
    soft: str | None = None

    def open(self) -> _Corrections:
        return _Corrections(self)


class _Corrections:
    def __init__(self, corrections: Corrections) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(corrections.feedback, columns=["sample", "chosen"])
        columns = (table.column(name).to_pylist() for name in ("sample", "chosen"))
        self.chosen = dict(zip(*columns, strict=True))  # at most ``reflect.budget``
        self._soft = corrections.soft

    @cached_property
    def cache(self) -> TeacherCache | None:
        return None if self._soft is None else TeacherCache(Path(self._soft))

    def talk(self, turns: Sequence[Turn], step: int) -> list[tuple[str, str] | None]:
        texts = {} if self.cache is not None else self.chosen
        return [(turn.question, texts.get(turn.sample, turn.answer)) for turn in turns]

    def arrays(self, samples: Sequence[str]) -> Arrays:
        if self.cache is None:
            return {}
        soft = self.cache.find(samples) >= 0
        kept = [sample for sample, one in zip(samples, soft.tolist(), strict=True) if one]
        return {SOFT: soft} | said(self.cache, kept)


EXERCISES = 0.5
"""Share of a corrector's turns that stand as exercises; the others keep it able to look."""


@dataclass(frozen=True)
class Exercises:
    """The true answers; half of the turns stand as an exercise in correcting.

    An exercise shows the truth and an answer to another image's question of the same task (one of the batch),
    as the corrector will be shown them, and asks for the truth with where it is (``elaborated``).
    """

    seed: int

    def open(self) -> Exercises:
        return self

    def talk(self, turns: Sequence[Turn], step: int) -> list[tuple[str, str] | None]:
        return [self._one(place, turns, step) for place in range(len(turns))]

    def _one(self, place: int, turns: Sequence[Turn], step: int) -> tuple[str, str]:
        turn = turns[place]
        plain = turn.question, turn.answer
        rng = np.random.default_rng([self.seed, step, *turn.sample.encode()])
        if rng.random() >= EXERCISES:
            return plain
        record = turn.sample.rpartition("#")[0]
        others = [
            other.answer
            for other in turns
            if other.task == turn.task and other.sample.rpartition("#")[0] != record
        ]
        target = elaborated(turn.task, turn.answer)
        if not others or target is None:
            return plain
        return correction_prompt(*plain, others[int(rng.integers(len(others)))]), target

    def arrays(self, samples: Sequence[str]) -> Arrays:
        return {}


def said(cache: TeacherCache, samples: Sequence[str]) -> Arrays:
    """What is kept of the answer tokens of samples that a cache has, as bytes."""
    places: Any = cache.find(samples).tolist()
    return {SAID + name: np.frombuffer(value, np.uint8) for name, value in cache.raw(places).items()}
