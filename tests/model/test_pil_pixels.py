"""Pixels do not depend on whether torchvision is installed: every image processor is PIL's.

With torchvision beside it, transformers picks that backend unless told otherwise, and its resize gives other
values (up to 0.015 of a normalised pixel): a guide, teacher or student would see other images than it learnt.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_folders import noise

import clinkd
from clinkd.model.pixels import load_processor
from clinkd.model.presets import TinySize, image_processor

ROOT = Path(clinkd.__file__).parent


def test_every_image_processor_is_asked_for_as_pils() -> None:
    asked, wrong = 0, []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "AutoImageProcessor.from_pretrained":
                asked += 1
                if not any(
                    word.arg == "backend" and ast.unparse(word.value) == "'pil'" for word in node.keywords
                ):
                    wrong.append(path.relative_to(ROOT).as_posix())
    assert asked and not wrong, wrong


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 64 * 64, "max_pixels": 64 * 64}])
def test_a_folders_processor_gives_the_pixels_it_was_saved_with(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    saved: Any = image_processor(TinySize())
    saved.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path), **limits)
    assert type(loaded) is type(saved)
    if limits:
        saved.size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    images = [noise(90, 150)]
    mine, other = (
        processor(images=images, return_tensors="np")["pixel_values"] for processor in (loaded, saved)
    )
    assert np.array_equal(mine, other)
