"""What of a batch the curriculum admits: by the teacher's margin, of single turns and of conversations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.index import RecordIndex
from clinkd.data.sampler import Batch
from clinkd.train.distill_task import Curriculum

TURNS = [2, 3, 1]
MARGINS = {"r0#0": 0.9, "r0#1": 0.1, "r1#0": 0.4, "r1#2": 0.3, "elsewhere#0": 1.0}  # r1#1 and r2#0: refused


def index(lengths: list[list[int]] | None = None) -> RecordIndex:
    zeros = np.zeros(3, np.int32)
    columns: dict[str, Any] = {"id": ["r0", "r1", "r2"], "shard": zeros, "group": zeros}
    columns |= {"row": np.arange(3, dtype=np.int32), "turns": np.array(TURNS, np.int32), "group_bytes": zeros}
    if lengths is not None:
        columns["lengths"] = pa.array(lengths, pa.list_(pa.int32()))
    return RecordIndex(pa.table(columns))


def curriculum(of: RecordIndex, margins: dict[str, float] = MARGINS) -> Curriculum:
    samples = pa.chunked_array([pa.array(list(margins), pa.string())])
    cache: Any = SimpleNamespace(samples=samples, margins=np.array(list(margins.values()), np.float32))
    return Curriculum(of, cache)


def admitted(of: Curriculum, bar: float, *groups: tuple[int, tuple[int, ...]]) -> list[Any]:
    return of.admit(Batch((0, 0), tuple((group,) for group in groups)), bar).groups


def test_turns_at_the_bar_or_above_come() -> None:
    made = curriculum(index())
    groups = ((0, (1, 0)), (1, (2, 0, 1)), (2, (0,)))
    assert admitted(made, 0.0, *groups) == [(0, (1, 0)), (1, (2, 0))]  # what was refused never comes
    assert admitted(made, 0.35, *groups) == [(0, (0,)), (1, (0,))]
    assert admitted(made, 0.5, *groups) == [(0, (0,))]
    assert admitted(made, 2.0, *groups) == [] == admitted(made, -1.0, (2, (0,)), (1, (1,)))


def test_of_a_sequence_what_waits_leaves_the_rest() -> None:
    batch = Batch((0, 3), (((0, (0, 1)), (2, (0,))), ((2, (0,)),)))
    found = curriculum(index()).admit(batch, 0.5)
    assert found == Batch((0, 3), (((0, (0,)),),))


def test_a_conversations_margin_is_the_mean_of_its_turns() -> None:
    made = curriculum(index(lengths=[[20], [30], [10]]))
    groups = ((0, (0,)), (1, (0,)), (2, (0,)))
    found = [admitted(made, bar, *groups) for bar in (0.34, 0.36, 0.49, 0.51)]
    assert found == [[(0, (0,)), (1, (0,))], [(0, (0,))], [(0, (0,))], []]


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_a_lower_bar_admits_no_less(one: float, other: float) -> None:
    made = curriculum(index())
    low, high = sorted((one, other))
    groups = ((0, (0, 1)), (1, (0, 2)))
    more, less = (dict(admitted(made, bar, *groups)) for bar in (low, high))
    assert all(set(less[record]) <= set(more[record]) for record in less)
