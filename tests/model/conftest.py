"""Shared by the tests of the model: a tokenizer of a few phantoms' words."""

from __future__ import annotations

from typing import Any

import pytest
from cpu_torchvision import make_importable

make_importable()  # before transformers, which imports torchvision wherever it is installed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    from clinkd.data.phantoms import PhantomSpec, draw
    from clinkd.model.presets import train_tokenizer

    records = [draw(PhantomSpec(4), index)[1] for index in range(4)]
    texts = [text for record in records for turn in record.turns for text in (turn.question, turn.answer)]
    return AutoTokenizer.from_pretrained(train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), 400))
