"""The likelihood of true answers: what a pass over each alone says, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phantom_rows import phantom_model, phantom_row

from clinkd.data.phantoms import PhantomSpec
from clinkd.evaluate.predict import Answerer, PredictSpec

PHANTOMS = PhantomSpec(5, size=56)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(phantom_model(PHANTOMS, tmp_path_factory.mktemp("model"), layers=2))


def test_it_is_the_loss_of_each_answer_alone(model: str) -> None:
    """By the class's own forward and its loss, one question at a time."""
    from clinkd.data.images import decode
    from clinkd.model.chat import encode

    rows = [phantom_row(PHANTOMS, number) for number in range(5)]
    answerer = Answerer(PredictSpec(model, batch_size=7, likelihood=True))
    found = {row["sample"]: row for row in answerer.answer(rows)}
    assert len(found) == sum(len(row["turns"]) for row in rows)
    for row in rows:
        picture = answerer.processor(images=[decode(row["png"])], return_tensors="pt")
        tokens = (picture["image_grid_thw"].prod(-1) // answerer.processor.merge_size**2).tolist()
        for number, turn in enumerate(row["turns"]):
            prompt, answer = encode(answerer.tokenizer, turn["question"], turn["answer"], tokens)
            with torch.no_grad():
                loss = answerer.model(
                    input_ids=torch.tensor([prompt + answer]),
                    labels=torch.tensor([[-100] * len(prompt) + answer]), **picture,
                ).loss  # fmt: skip
            said = found[f"{row['id']}#{number}"]
            assert said["tokens"] == len(answer) and "responses" not in said
            assert said["log_likelihood"] == pytest.approx(-float(loss) * len(answer), rel=1e-4)


def test_chunks_change_nothing(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [phantom_row(PHANTOMS, 0)]
    answerer = Answerer(PredictSpec(model, likelihood=True))
    whole = list(answerer.answer(rows))
    monkeypatch.setattr("clinkd.evaluate.predict.CHUNK", 3)
    for one, other in zip(answerer.answer(rows), whole, strict=True):
        assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], rel=1e-6)
