"""Questions put to a model in parts: what is answered is kept, and asked no second time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clinkd.data.reading import Questions
from clinkd.data.shards import Shards
from clinkd.progress import Progress
from clinkd.stages.asking import PART, Desks


class Told:
    """A pool that answers with what it was asked, and notes the parts; it stops after some of them."""

    def __init__(self, most: int = 99) -> None:
        self.asked: list[tuple[int, int]] = []
        self.most = most

    def answers(self, spec: Any, shards: Any, parts: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for number, records, seed in parts:
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append((number, seed))
            yield number, [{"sample": f"r{wanted.place.row:03d}", "seed": seed} for wanted in records]


NAMES = [f"r{number:03d}" for number in range(2 * PART + 3)]


def ask(folder: Path, pool: Told, count: int = len(NAMES)) -> list[dict[str, Any]]:
    desks = Desks(1, Progress(stream=io.StringIO()))
    desks._pool = pool  # type: ignore[assignment]
    place = np.array([(0, 0, row) for row in range(count)], np.int32).reshape(-1, 3)
    return desks.ask(None, Questions(Shards((), ()), place), folder, "test", 100)  # type: ignore[arg-type]


def test_every_record_is_asked_once_in_parts_that_follow_from_the_order(tmp_path: Path) -> None:
    pool = Told()
    found = ask(tmp_path, pool)
    assert [row["sample"] for row in found] == NAMES
    assert sorted(pool.asked) == [(0, 100), (1, 101), (2, 102)]  # the seed is the part's
    assert len(list(tmp_path.glob("part-*.jsonl"))) == 3
    assert ask(tmp_path, again := Told()) == found and again.asked == []


def test_what_was_interrupted_goes_on_and_comes_out_the_same(tmp_path: Path) -> None:
    whole = ask(tmp_path / "whole", Told())
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "torn", first := Told(most=1))
    ((done, _),) = first.asked
    assert ask(tmp_path / "torn", rest := Told()) == whole
    assert sorted(number for number, _ in rest.asked) == sorted({0, 1, 2} - {done})


def test_a_part_that_is_half_written_does_not_count(tmp_path: Path) -> None:
    ask(tmp_path, Told())
    part = tmp_path / "part-00001.jsonl"
    lines = part.read_text()
    part.rename(tmp_path / ".part-00001.jsonl.77")  # as a kill between writing and renaming leaves it
    assert len(ask(tmp_path, again := Told())) == len(NAMES) and [n for n, _ in again.asked] == [1]
    assert part.read_text() == lines and json.loads(lines.splitlines()[0])["sample"] == NAMES[PART]


def test_of_nothing_nothing_is_asked(tmp_path: Path) -> None:
    assert ask(tmp_path, Told(), 0) == []
