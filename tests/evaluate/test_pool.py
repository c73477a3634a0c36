"""Desks that answer in parts: the same answers whoever gives them, and whatever dies on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phantom_rows import phantom_row

from clinkd.data.phantoms import PhantomSpec
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


def parts() -> list[tuple[int, list[dict[str, Any]], int]]:
    rows = [phantom_row(PHANTOMS, number) for number in range(6)]
    return [(number, rows[2 * number : 2 * number + 2], 40 + number) for number in range(3)]


def alone(spec: PredictSpec, number: int) -> list[dict[str, Any]]:
    from clinkd.evaluate.pool import Desk

    _, records, seed = parts()[number]
    return Desk().answer(spec, records, seed)


@pytest.mark.slow
def test_answers_follow_from_the_part_and_its_seed_alone(pool: AnswerPool, model: str) -> None:
    """Sampled: the student and its corrector by turns, a lost desk, and one desk or two."""
    import ray

    spec = PredictSpec(model, max_new_tokens=5, candidates=2, batch_size=4)
    wanted = {number: alone(spec, number) for number in range(3)}
    first = dict(pool.answers(spec, parts()))
    assert first == wanted
    assert [row["sample"] for row in first[0]] == sorted(row["sample"] for row in first[0])
    assert all(len(row["responses"]) == 2 for rows in first.values() for row in rows)

    greedy = PredictSpec(model, max_new_tokens=5)
    assert dict(pool.answers(greedy, parts()))[1] == alone(greedy, 1)
    lost = pool._desks[0]
    pid = next(
        actor["ActorID"] and actor["Pid"]
        for actor in ray._private.state.actors().values()
        if actor["ActorID"] == lost._actor_id.hex()
    )
    os.kill(pid, signal.SIGKILL)
    assert dict(pool.answers(spec, reversed(parts()))) == wanted


def test_no_part_no_answer(pool: AnswerPool, model: str) -> None:
    assert list(pool.answers(PredictSpec(model), [])) == []


@pytest.mark.slow
def test_an_answerer_says_what_is_missing(pool: AnswerPool, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nowhere"):
        list(pool.answers(PredictSpec(str(tmp_path / "nowhere")), parts()))
