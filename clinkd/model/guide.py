"""The guide: a small Med-CLIP that says how well an image and a text belong together, and where.

Decisions:
- Its image side is the vision tower and merger that the answering model will use, its text side that
  model's own token
  embeddings, pooled with learnt weights: what the guide learns is where the teacher starts, as
  Qwen2-VL's own tower began as a CLIP's.
- It is trained on (region, phrase) pairs, patch by patch. Phrases are compared after a fixed rotation of the
  embedding space: the answering model's first keys start as its queries behind that rotation
  (``presets``), so a word looks for patches that show it, and not for itself.
- Patches of a region also tell its box, through the embeddings of the numbers that write it: a feature
  carries what a grounded answer has to say, in the space in which the language model says it.
- The score of (image, text) is the largest patch probability, calibrated to [0, 1] by temperature and
  bias on the training pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.model.clinkd_qwen2vl import ClinKDForConditionalGeneration
from clinkd.model.presets import rotation

WEIGHTS, SETTINGS = "guide.safetensors", "guide.json"


class Guide(nn.Module):
    """Scores of patches and texts in the answering model's embedding space.

    Args:
        model: the answering model, whose vision tower, merger and token embeddings are used (not copied).
    """

    rotation: Tensor

    def __init__(self, model: ClinKDForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        self.register_buffer("rotation", rotation(width), persistent=False)
        self.weigh = nn.Linear(width, 1)  # which tokens of a phrase matter
        nn.init.zeros_(self.weigh.weight)
        self.heads = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor([2.5]))  # log; DeepSpeed wants no scalars
        self.bias = nn.Parameter(torch.tensor([-4.0]))

    def patches(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """[merged patches of all images, H], as the language model receives them."""
        parts = self.model.model.get_image_features(pixel_values, image_grid_thw).pooler_output
        return torch.cat(tuple(parts))

    def phrases(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts [P, L] of token ids (mask 1 = token) to unit vectors [P, H] in the rotated space."""
        tokens = self.model.get_input_embeddings()(ids)
        weights = self.weigh(tokens).squeeze(-1).masked_fill(mask == 0, float("-inf")).softmax(-1)
        return F.normalize((weights[..., None] * tokens).sum(1) @ self.rotation.T, dim=-1)

    def logits(self, patches: Tensor, phrases: Tensor) -> Tensor:
        """[patches, P] logits of "this patch shows that"."""
        return F.normalize(patches, dim=-1) @ phrases.T * self.scale.exp() + self.bias

    def number_logits(self, patches: Tensor) -> Tensor:
        """[4, patches, V]: tokens of x1, y1, x2, y2 of the region a patch belongs to."""
        table = self.model.get_input_embeddings().weight
        return torch.stack([head(patches) @ table.T for head in self.heads])

    def bag_logits(self, patches: Tensor) -> Tensor:
        """[patches, V]: tokens that speak of a patch, read in the rotated space."""
        table: Any = self.model.get_input_embeddings().weight
        return patches @ self.rotation @ table.T


def image_scores(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """[images, P]: the largest patch logit of each image; ``counts`` are the images' merged patches."""
    return torch.stack([part.max(0).values for part in logits.split(list(counts))])


def fit_calibration(scores: Tensor, match: Tensor, steps: int = 200) -> tuple[float, float]:
    """Temperature and bias of s = sigmoid(t * score + b) by maximum likelihood (Platt scaling).

    Args:
        scores, match: [pairs]; match is 1 where image and text belong together.
    """
    slope, bias = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimiser = torch.optim.LBFGS([slope, bias], max_iter=steps)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(slope * scores + bias, match.float())
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return float(slope.detach()), float(bias.detach())


def save_guide(guide: Guide, out: Path, settings: dict[str, Any]) -> None:
    """The guide's own weights beside a model's folder (which holds the tower and the embeddings)."""
    from safetensors.torch import save_file

    own = {
        key: value.detach().cpu().clone()
        for key, value in guide.state_dict().items()
        if not key.startswith("model.")
    }
    save_file(own, out / WEIGHTS)
    (out / SETTINGS).write_text(json.dumps(settings, indent=1))


def load_guide(folder: Path, model: ClinKDForConditionalGeneration) -> tuple[Guide, dict[str, Any]]:
    from safetensors.torch import load_file

    guide = Guide(model)
    guide.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    return guide.eval(), json.loads((folder / SETTINGS).read_text())
