"""How a folder is told to be an image-text encoder, and which.

Decisions:
- An encoder is a folder on disk, known by the files in it; nothing is fetched and no code of a folder runs.
- This module knows the kinds that other people's checkpoints come in; ``guide.open_any`` knows ours too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clinkd.model.encoders import CONFIG, OPEN_CLIP_CONFIG, TRANSFORMERS_WEIGHTS, Encoder, read_json

if TYPE_CHECKING:
    import torch

TRANSFORMERS_KINDS = ("clip", "siglip", "siglip2")
ACCEPTED = (
    f"accepted are a transformers folder ({CONFIG} of model_type {', '.join(TRANSFORMERS_KINDS)}) and an "
    f"open_clip folder ({OPEN_CLIP_CONFIG} and weights)"
)


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
