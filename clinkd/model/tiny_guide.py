"""The guide made here: a small Med-CLIP that says how well an image and a text belong together, and where.

Decisions:
- Its image side is the vision tower and merger that the answering model will use, its text side that model's
  own token embeddings, pooled with learnt weights: what the guide learns is where the teacher starts, as
  Qwen2-VL's own tower began as a CLIP's.
- It is trained on (region, phrase) pairs, patch by patch. Phrases are compared after a fixed rotation of the
  embedding space: the answering model's first keys start as its queries behind that rotation
  (model/first_weights.py), so a word looks for patches that show it, and not for itself.
- Patches of a region also tell its box, through the embeddings of the numbers that write it: a feature
  carries what a grounded answer has to say, in the space in which the language model says it.
- The logit of (image, text) is the largest of its patches. Logits are float32 also where the weights are not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.model.encoders import Seen
from clinkd.model.first_weights import rotation
from clinkd.model.guided import GuidedModel

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = "guide.safetensors"


class TinyGuide(nn.Module):
    """Scores of patches and texts in the answering model's embedding space.

    Args:
        model: the answering model, whose vision tower, merger and token embeddings are used (not copied).
    """

    rotation: Tensor

    def __init__(self, model: GuidedModel) -> None:
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
        whole = (weights[..., None] * tokens).sum(1)
        return F.normalize((whole @ self.rotation.T.to(whole.dtype)).float(), dim=-1)

    def logits(self, patches: Tensor, phrases: Tensor) -> Tensor:
        """[patches, P] logits of "this patch shows that"."""
        return F.normalize(patches.float(), dim=-1) @ phrases.T * self.scale.exp() + self.bias

    def number_logits(self, patches: Tensor) -> Tensor:
        """[4, patches, V]: tokens of x1, y1, x2, y2 of the region a patch belongs to."""
        table = self.model.get_input_embeddings().weight
        return torch.stack([(head(patches) @ table.T).float() for head in self.heads])

    def bag_logits(self, patches: Tensor) -> Tensor:
        """[patches, V]: tokens that speak of a patch, read in the rotated space."""
        table: Any = self.model.get_input_embeddings().weight
        return (patches @ self.rotation.to(patches.dtype) @ table.T).float()


def box_maps(folder: Path) -> list[Tensor]:
    """Return the four maps [H, H] from a patch to the embeddings of x1, y1, x2, y2 (``TinyGuide.heads``).

    Args:
        folder: what ``save_guide`` wrote.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    return [weights[f"heads.{number}.weight"] for number in range(4)]


def save_guide(guide: TinyGuide, out: Path) -> None:
    """The guide's own weights beside a model's folder (which holds the tower and the embeddings)."""
    from safetensors.torch import save_file

    own = {
        key: value.detach().cpu().clone()
        for key, value in guide.state_dict().items()
        if not key.startswith("model.")
    }
    unfinished = out / f".{WEIGHTS}"
    save_file(own, unfinished)
    os.replace(unfinished, out / WEIGHTS)


class TinyEncoder:
    """The trained guide of a folder as an ``Encoder``.

    Args:
        folder: what ``save_guide`` wrote: a model's folder with guide.safetensors.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from safetensors.torch import load_file
        from transformers import AutoImageProcessor, AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import load_model

        self.guide = TinyGuide(load_model(folder))
        self.guide.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        self.guide.eval().to(device)
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    @torch.inference_mode()
    def images(self, images: Sequence[Image]) -> list[Seen]:
        found = self.processor(images=list(images), return_tensors="pt")
        grids, merge = found["image_grid_thw"], self.processor.merge_size
        patches = self.guide.patches(found["pixel_values"].to(self.device), grids.to(self.device))
        sizes = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in grids]
        parts = patches.split([rows * columns for rows, columns in sizes])
        return [Seen(part.mean(0), part, size) for part, size in zip(parts, sizes, strict=True)]

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        # A leading space, as in training: the tokens of words inside a sentence.
        spaced = [f" {text}" for text in texts]
        ids = self.tokenizer(spaced, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        return self.guide.phrases(ids["input_ids"], ids["attention_mask"])

    @torch.inference_mode()
    def pair_logits(self, seen: Seen, texts: Tensor) -> Tensor:
        return self.patch_logits(seen, texts).max(0).values

    @torch.inference_mode()
    def patch_logits(self, seen: Seen, texts: Tensor) -> Tensor:
        return self.guide.logits(seen.patches, texts)
