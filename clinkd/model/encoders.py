"""One small interface to image-text encoders, and how a folder is told to be one.

Decisions:
- An encoder is a folder on disk, known by the files in it; nothing is fetched and no code of a folder runs.
- Logits are the encoder's own (scale, cosine, bias as it was trained) and uncalibrated: what a logit is
  worth on the images at hand is for the caller to fit.
- This module knows the kinds that other people's checkpoints come in; ``guide.open_any`` knows ours too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
TRANSFORMERS_KINDS = ("clip", "siglip", "siglip2")
TRANSFORMERS_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
ACCEPTED = (
    f"accepted are a transformers folder ({CONFIG} of model_type {', '.join(TRANSFORMERS_KINDS)}) and an "
    f"open_clip folder ({OPEN_CLIP_CONFIG} and weights)"
)


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


def open_encoder(path: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder in a folder, told by its files.

    Args:
        path: a transformers folder of CLIP, SigLIP or SigLIP 2 (weights, tokenizer and preprocessor beside
            ``config.json``) or an open_clip folder (``open_clip_config.json`` and weights; see
            :mod:`clinkd.model.open_clip_guide` for what BiomedCLIP's has to hold).
        device: where the model and what it returns live.

    Raises:
        ValueError: no such folder, none of these, or something is missing in it; one line says what.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"guide {path}: no such folder")
    kind = read_json(folder / CONFIG).get("model_type") if (folder / CONFIG).is_file() else None
    open_clip = (folder / OPEN_CLIP_CONFIG).is_file()
    # A hub repository may hold one model in both forms: transformers' needs no package more.
    whole = any((folder / name).is_file() for name in TRANSFORMERS_WEIGHTS)
    if kind in TRANSFORMERS_KINDS and (whole or not open_clip):
        from clinkd.model.clip import open_transformers

        return open_transformers(folder, device, str(kind))
    if open_clip:
        from clinkd.model.open_clip_guide import open_open_clip

        return open_open_clip(folder, device)
    found = f"{CONFIG} is of model_type {kind!r}" if kind else f"neither {CONFIG} with a model_type nor "
    raise ValueError(f"guide {folder}: {found}{'' if kind else OPEN_CLIP_CONFIG}; {ACCEPTED}")


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
