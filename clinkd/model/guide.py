"""The guide: a Med-CLIP encoder and what turns its logits into scores in [0, 1].

Decisions:
- Any encoder behind ``encoders.Encoder`` can guide. A guide's folder holds guide.json: where the encoder is
  (beside it, or a path) and its calibration.
- Calibration is Platt's (1999): s = sigmoid(t * logit + b), fitted by maximum likelihood on the training
  split; once for (image, question) against the same question with another image, once for (patch, question)
  against the boxes that question and answer name.
- A question about several images is aligned with them if one of them shows what it asks about: its score is
  the largest. Relevance is each image's own.
- Questions are read without their boxes: encoders know words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from clinkd.data.regions import without_boxes
from clinkd.data.scores import Grid, Score, quantise

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from clinkd.model.encoders import Encoder, Seen

SETTINGS = "guide.json"
OWN = "model"  # folder of the encoder that was trained here, beside guide.json


@dataclass(frozen=True)
class Calibration:
    """Temperatures and biases of s = sigmoid(temperature * logit + bias)."""

    temperature: float = 1.0
    bias: float = 0.0
    patch_temperature: float = 1.0
    patch_bias: float = 0.0

    def alignment(self, logits: np.ndarray) -> np.ndarray:
        """Of (image, question), float32 in [0, 1]."""
        return expit(np.float32(self.temperature) * logits + np.float32(self.bias))

    def relevance(self, logits: np.ndarray) -> np.ndarray:
        """Of (patch, question), uint8 in steps of 1/255."""
        return quantise(expit(np.float32(self.patch_temperature) * logits + np.float32(self.patch_bias)))


class Guide:
    """Scores of questions about images."""

    def __init__(self, encoder: Encoder, calibration: Calibration) -> None:
        self.encoder, self.calibration = encoder, calibration

    def score(self, records: Sequence[tuple[Sequence[Image], Sequence[str]]]) -> list[list[Score]]:
        """Scores of each record's questions.

        Args:
            records: (RGB images, questions as they stand in the data) of each.
        """
        seen = iter(self.encoder.images([image for images, _ in records for image in images]))
        texts = self.encoder.texts([without_boxes(text) for _, questions in records for text in questions])
        found, at = [], 0
        for images, questions in records:
            asked = texts[at : at + len(questions)]
            found.append(self._score([next(seen) for _ in images], asked))
            at += len(questions)
        return found

    def _score(self, seen: list[Seen], texts: Tensor) -> list[Score]:
        alignment = self.calibration.alignment(pair_logits(self.encoder, seen, texts)).tolist()
        patches, grids = patch_logits(self.encoder, seen, texts)
        relevance = self.calibration.relevance(patches)
        return [Score(score, row, grids) for score, row in zip(alignment, relevance, strict=True)]


def pair_logits(encoder: Encoder, seen: Sequence[Seen], texts: Tensor) -> np.ndarray:
    """[P] of P questions about a record's images: the largest of them."""
    import torch

    return (
        torch.stack([encoder.pair_logits(image, texts) for image in seen]).max(0).values.float().cpu().numpy()
    )


def patch_logits(
    encoder: Encoder, seen: Sequence[Seen], texts: Tensor
) -> tuple[np.ndarray, tuple[Grid, ...]]:
    """[P, cells of a record's images], and the images' grids; without dense features there are no cells."""
    import torch

    try:
        patches = torch.cat([encoder.patch_logits(image, texts) for image in seen]).T
    except ValueError:
        return np.zeros((len(texts), 0), np.float32), ((0, 0),) * len(seen)
    return patches.float().cpu().numpy(), tuple(image.grid for image in seen)


def guide_inputs(
    guided: str, scores: Sequence[Score], merged: Sequence[Sequence[Grid]], *, packed: bool = False
) -> dict[str, Tensor]:
    """What the model takes of the scores of a batch's rows, or documents.

    Args:
        guided: ``RopeGuidance.guided``.
        merged: grids of merged patches of each row's images.
        packed: rows of several documents; alignment is each image's then.

    Returns:
        ``alignment`` [B, 1] under "pair", packed [images]; ``relevance`` [merged patches of the rows' images]
        under "patch".
    """
    import torch

    if guided == "pair":
        alignment = torch.tensor([[score.alignment] for score in scores])
        if packed:
            alignment = alignment[:, 0].repeat_interleave(torch.tensor([len(grids) for grids in merged]))
        return {"alignment": alignment}
    if guided == "patch":
        maps = [score.on(grids) for score, grids in zip(scores, merged, strict=True)]
        return {"relevance": torch.from_numpy(np.concatenate(maps))}
    return {}


def merged_grids(image_grid_thw: Tensor, merge: int) -> list[Grid]:
    """Rows and columns of merged patches of each image, from its grid before merging."""
    return [(rows // merge, columns // merge) for _, rows, columns in image_grid_thw.tolist()]


def fit_calibration(logits: Tensor, match: Tensor, steps: int = 200) -> tuple[float, float]:
    """Temperature and bias of s = sigmoid(t * logit + b) by maximum likelihood (Platt scaling).

    Args:
        logits, match: [N]; match is 1 where the two belong together.
    """
    import torch
    from torch.nn import functional as F

    slope, bias = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimiser = torch.optim.LBFGS([slope, bias], max_iter=steps)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(slope * logits + bias, match.float())
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return float(slope.detach()), float(bias.detach())


def write_settings(folder: Path, encoder: str, calibration: Calibration) -> None:
    """guide.json, which makes ``folder`` a guide's; ``encoder`` is ``OWN`` or an absolute path."""
    (folder / SETTINGS).write_text(json.dumps({"encoder": encoder} | asdict(calibration), indent=1) + "\n")


def copy_guide(folder: Path, out: Path) -> None:
    """A guide's folder again; an encoder that lies elsewhere stays there."""
    out.mkdir(parents=True)
    if (folder / OWN).is_dir() and json.loads((folder / SETTINGS).read_text())["encoder"] == OWN:
        shutil.copytree(folder / OWN, out / OWN)
    shutil.copyfile(folder / SETTINGS, out / SETTINGS)


def open_any(path: str | Path, device: str = "cpu") -> Encoder:
    """The encoder of a folder: one trained here, or any that ``encoders.open_encoder`` knows.

    Raises:
        ValueError: no encoder there.
    """
    from clinkd.model.encoder_folder import open_encoder
    from clinkd.model.tiny_guide import WEIGHTS, TinyEncoder

    if (Path(path) / WEIGHTS).is_file():
        return TinyEncoder(Path(path), device)
    return open_encoder(path, device)


def load_guide(folder: str | Path, device: str = "cpu") -> Guide:
    """The guide of a folder.

    Raises:
        ValueError: no guide there, or its encoder is gone.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        encoder, calibration = settings.pop("encoder"), Calibration(**settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"guide: {folder / SETTINGS}: {error}; a guide's folder is made by the stage guide"
        ) from None
    return Guide(open_any(folder / encoder, device), calibration)
