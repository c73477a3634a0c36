"""Phantoms as rows of a shard, for tests that need neither Ray nor a disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from clinkd.data.images import decode
from clinkd.data.phantoms import PhantomSpec, draw


def phantom_row(spec: PhantomSpec, number: int, trusted: bool = True) -> dict[str, Any]:
    """The record ``p<number>``, its image as PNG."""
    image, record = draw(spec, number)
    buffer = io.BytesIO()
    decode(image).save(buffer, "PNG")
    turns = [
        {"task": turn.task, "question": turn.question, "answer": turn.answer, "trusted": trusted}
        for turn in record.turns
    ]
    size = {"width": spec.size, "height": spec.size}
    shown = size | {"id": f"p{number}", "image": f"p{number}.png", "modality": record.modality}
    return shown | {"png": buffer.getvalue(), "more_png": [], "turns": turns}


def phantom_model(spec: PhantomSpec, folder: Path, layers: int) -> Path:
    """A small untrained model that knows the words of the first five phantoms."""
    from clinkd.model.presets import TinySize, write_new_model

    rows = [phantom_row(spec, number) for number in range(5)]
    texts = [turn[key] for row in rows for turn in row["turns"] for key in ("question", "answer")]
    size = TinySize(hidden=64, layers=layers, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
    return Path(write_new_model(texts, size, folder, vocab_size=400, seed=0))
