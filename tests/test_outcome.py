"""Scores on the validation split, by which sweeps choose."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from phantom_rows import phantom_model

from clinkd.config import ConfigError, RunConfig
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.prepare import prepare
from clinkd.data.reading import Records
from clinkd.data.shards import Shards
from clinkd.evaluate.predict import Answerer, PredictSpec
from clinkd.progress import Progress
from clinkd.stages.asking import Desks
from clinkd.stages.outcome import validate

PHANTOMS = PhantomSpec(64, size=112)


@pytest.fixture(scope="module")
def data(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PHANTOMS, out, test_fraction=0.1, validation_fraction=0.6)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom_model(PHANTOMS, tmp_path_factory.mktemp("model"), layers=1)


class Knowing:
    """A pool whose model is the real one, and which then says what is true, of one task or of all."""

    image: str | None = None  # in the place of the images' names

    def __init__(self, task: str | None) -> None:
        self.task = task

    def answers(
        self, spec: PredictSpec, shards: Shards, parts: Any
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        answerer, read = Answerer(spec), Records(shards, 1 << 20)
        for number, wanted, _ in parts:
            records = [read.record(one) for one in wanted]
            rows = sorted(answerer.answer(records), key=lambda row: row["sample"])
            for row in rows:
                row["responses"] = [row["annotation"] if self.task in (None, row["task"]) else "nothing"]
                row["image"] = self.image or row["image"]
            yield number, rows


def scored(data: Path, model: Path, task: str | None, *metrics: str) -> dict[str, float]:
    config = RunConfig.model_validate({"rope": {"mode": "none"}, "evaluate": {"max_new_tokens": 2}})
    run: Any = SimpleNamespace(
        config=config, done={"prepare": SimpleNamespace(path=data, fingerprint="")}, indices={}
    )
    desks = Desks(1, Progress(stream=io.StringIO()))
    desks._pool = Knowing(task)  # type: ignore[assignment]
    return validate(run, model, 400, desks, metrics or ("score",))


@pytest.mark.slow
def test_who_says_what_is_true_gets_everything(data: Path, model: Path) -> None:
    assert scored(data, model, None) == pytest.approx({"vg": 1.0, "roc": 1.0, "score": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vg", "roc"])
def test_each_task_has_its_score(data: Path, model: Path, task: str) -> None:
    other = {"vg": "roc", "roc": "vg"}[task]
    assert scored(data, model, task) == pytest.approx({task: 1.0, other: 0.0, "score": 0.5})


@pytest.mark.slow
def test_where_nothing_can_be_scored_it_is_said(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images whose names tell no modality, say: a 0 would look like a poor model."""
    monkeypatch.setattr(Knowing, "image", "scan-17.png")
    with pytest.raises(ConfigError, match=r"vg questions .* be scored \(unknown_modality \d+\)"):
        scored(data, model, None)


@pytest.mark.slow
def test_texts_are_scored_where_they_are_wanted(data: Path, model: Path) -> None:
    found = scored(data, model, "rc", "rc", "mia")
    assert found["rc"] == pytest.approx(1.0) and found["mia"] < 0.1 and found["vg"] == 0
