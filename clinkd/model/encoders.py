"""One small interface to image-text encoders, and what all of their folders have in common.

Decisions:
- Logits are the encoder's own (scale, cosine, bias as it was trained) and uncalibrated: what a logit is
  worth on the images at hand is for the caller to fit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
TRANSFORMERS_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What an encoder keeps of one image."""

    whole: Tensor  # [D] the image as a whole
    patches: Tensor  # [rows * columns, D] dense features, row by row
    grid: tuple[int, int]  # rows, columns


class Encoder(Protocol):
    """Images and texts in one space.

    Cell (r, c) of a grid lies over the same share of the image whatever its shape: rows from the top, columns
    from the left, all of the image covered.
    """

    def images(self, images: Sequence[Image]) -> list[Seen]:
        """What the encoder keeps of PIL images in RGB, each of any size.

        Raises:
            ValueError: an image is of another mode.
        """

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[P, D]; a text longer than the encoder takes loses its end."""

    def pair_logits(self, seen: Seen, texts: Tensor) -> Tensor:
        """[P] logits of "this image shows that", uncalibrated."""

    def patch_logits(self, seen: Seen, texts: Tensor) -> Tensor:
        """[rows * columns, P] logits of "this part shows that", uncalibrated.

        Raises:
            ValueError: the encoder has no dense features.
        """


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON can be read ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def one_line(error: BaseException) -> str:
    """The first line of an error's text: libraries write essays."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
