"""Shared by the tests of training: how a tiny model of some prepared phantoms starts."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def start(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model's folder, its tokenizer trained on the module's ``prepared`` data."""
    from clinkd.data.boxes import to_qwen
    from clinkd.data.shards import samples
    from clinkd.model.presets import TinySize, write_new_model

    texts = [to_qwen(item[key]) for item in samples(prepared) for key in ("question", "answer")]
    size = TinySize(hidden=64, layers=2, heads=2, mlp=128, vision_hidden=32, vision_layers=1, patch=14)
    return write_new_model(texts, size, tmp_path_factory.mktemp("start"), vocab_size=600, seed=0)
