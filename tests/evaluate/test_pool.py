"""Desks that answer in parts: the same answers whoever gives them, and whatever dies on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feeding import write_shard
from phantom_rows import phantom_row

from clinkd.data.phantoms import PhantomSpec
from clinkd.data.reading import Place, Wanted
from clinkd.data.shards import Shards
from clinkd.evaluate.pool import AnswerPool
from clinkd.evaluate.predict import PredictSpec
from clinkd.model.presets import TinySize, write_new_model

PHANTOMS = PhantomSpec(6, size=56)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    texts = ["Where is the liver located in the image?", "<box>(1,2),(3,4)</box>"]
    size = TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
    return str(write_new_model(texts, size, tmp_path_factory.mktemp("model"), vocab_size=300, seed=0))


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.full), 2])
def pool(request, ray_session) -> Iterator[AnswerPool]:
    found = AnswerPool(request.param, cpus=0)
    yield found
    found.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    rows = [phantom_row(PHANTOMS, number) for number in range(6)]
    return Shards.of(write_shard(tmp_path_factory.mktemp("data") / "prepared", rows))


def parts() -> list[tuple[int, list[Wanted], int]]:
    rows = [Wanted(Place(0, number // 4, number % 4)) for number in range(6)]
    return [(number, rows[2 * number : 2 * number + 2], 40 + number) for number in range(3)]


def alone(spec: PredictSpec, shards: Shards, number: int) -> list[dict[str, Any]]:
    from clinkd.evaluate.pool import Desk

    _, wanted, seed = parts()[number]
    return Desk().answer(spec, shards, wanted, seed)


@pytest.mark.slow
def test_answers_follow_from_the_part_and_its_seed_alone(
    pool: AnswerPool, model: str, shards: Shards
) -> None:
    """Sampled: the student and its corrector by turns, a lost desk, and one desk or two."""
    import ray

    spec = PredictSpec(model, max_new_tokens=5, candidates=2, batch_size=4)
    wanted = {number: alone(spec, shards, number) for number in range(3)}
    first = dict(pool.answers(spec, shards, parts()))
    assert first == wanted
    assert [row["sample"] for row in first[0]] == sorted(row["sample"] for row in first[0])
    assert all(len(row["responses"]) == 2 for rows in first.values() for row in rows)

    greedy = PredictSpec(model, max_new_tokens=5)
    assert dict(pool.answers(greedy, shards, parts()))[1] == alone(greedy, shards, 1)
    lost = pool._desks[0]
    pid = next(
        actor["ActorID"] and actor["Pid"]
        for actor in ray._private.state.actors().values()
        if actor["ActorID"] == lost._actor_id.hex()
    )
    os.kill(pid, signal.SIGKILL)
    assert dict(pool.answers(spec, shards, reversed(parts()))) == wanted


def test_no_part_no_answer(pool: AnswerPool, model: str, shards: Shards) -> None:
    assert list(pool.answers(PredictSpec(model), shards, [])) == []


@pytest.mark.slow
def test_an_answerer_says_what_is_missing(pool: AnswerPool, shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nowhere"):
        list(pool.answers(PredictSpec(str(tmp_path / "nowhere")), shards, parts()))


@pytest.mark.slow
def test_images_may_be_asked_about_something_else(model: str, shards: Shards) -> None:
    from clinkd.evaluate.pool import Desk

    turn = {"task": "mia", "question": "What else?", "answer": "Nothing.", "trusted": True}
    wanted = [Wanted(Place(0, 1, 0), "p4#1", (turn,))]
    (row,) = Desk().answer(PredictSpec(model, max_new_tokens=3), shards, wanted, 0)
    assert (row["sample"], row["question"], row["image"]) == ("p4#1#0", "What else?", "p4.png")
