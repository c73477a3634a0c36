"""Scores on the validation split, by which sweeps choose."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from phantom_rows import phantom_row

from clinkd.config import RunConfig
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.prepare import prepare
from clinkd.evaluate.predict import Answerer, PredictSpec
from clinkd.model.presets import TinySize, write_new_model
from clinkd.progress import Progress
from clinkd.stages.asking import Desks, Records
from clinkd.stages.outcome import validate

PHANTOMS = PhantomSpec(64, size=112)


@pytest.fixture(scope="module")
def data(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PHANTOMS, out, test_fraction=0.1, validation_fraction=0.6)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [phantom_row(PHANTOMS, number) for number in range(5)]
    texts = [turn[key] for row in rows for turn in row["turns"] for key in ("question", "answer")]
    size = TinySize(hidden=64, layers=1, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
    return Path(write_new_model(texts, size, tmp_path_factory.mktemp("model"), vocab_size=400, seed=0))


class Knowing:
    """A pool whose model is the real one, and which then says what is true, of one task or of all."""

    def __init__(self, task: str | None) -> None:
        self.task = task

    def answers(self, spec: PredictSpec, parts: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        answerer = Answerer(spec)
        for number, records, _ in parts:
            rows = sorted(answerer.answer(records), key=lambda row: row["sample"])
            knows = [self.task in (None, row["task"]) for row in rows]
            yield number, [
                row | {"responses": [row["annotation"] if known else "nothing"]}
                for row, known in zip(rows, knows, strict=True)
            ]


def scored(data: Path, model: Path, task: str | None, *metrics: str) -> dict[str, float]:
    config = RunConfig.model_validate({"rope": {"mode": "none"}, "evaluate": {"max_new_tokens": 2}})
    run: Any = SimpleNamespace(config=config, done={"prepare": SimpleNamespace(path=data)})
    desks = Desks(1, Progress(stream=io.StringIO()))
    desks._pool = Knowing(task)  # type: ignore[assignment]
    return validate(run, model, 400, desks, Records(data, 2), metrics or ("score",))


def test_who_says_what_is_true_gets_everything(data: Path, model: Path) -> None:
    assert scored(data, model, None) == pytest.approx({"vg": 1.0, "roc": 1.0, "score": 1.0})


@pytest.mark.parametrize("task", ["vg", "roc"])
def test_each_task_has_its_score(data: Path, model: Path, task: str) -> None:
    other = {"vg": "roc", "roc": "vg"}[task]
    assert scored(data, model, task) == pytest.approx({task: 1.0, other: 0.0, "score": 0.5})


def test_texts_are_scored_where_they_are_wanted(data: Path, model: Path) -> None:
    found = scored(data, model, "rc", "rc", "mia")
    assert found["rc"] == pytest.approx(1.0) and found["mia"] < 0.1 and found["vg"] == 0
