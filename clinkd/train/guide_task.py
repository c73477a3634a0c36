"""What the guide trains on: the regions of an image and the phrases that speak of them.

Decisions:
- A class name (ROC's answer) is held against the patches of all images in the batch; a longer text only
  against those of its own image, since other images may well show what it asks for.
- A patch belongs to a region that covers at least 40% of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.data.records import Box
from clinkd.data.regions import coverage, region_pairs
from clinkd.model.guide import Guide
from clinkd.train.ledger import Group
from clinkd.train.tasks import SupervisedTask

COVER = 0.4


class GuideLoss(nn.Module):
    """Patch-phrase contrast and the numbers of the patches' boxes; sums over positive patches."""

    def __init__(self, guide: Guide, number_weight: float) -> None:
        super().__init__()
        self.guide, self.number_weight = guide, number_weight

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor, phrase_ids: Tensor, phrase_mask: Tensor,
        labels: Tensor, known: Tensor, numbers: Tensor, regions: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """labels, known: [patches, P] 0/1; regions: [R] patches with a box; numbers: [4, R] its token ids."""
        patches = self.guide.patches(pixel_values, image_grid_thw)
        logits = self.guide.logits(patches, self.guide.phrases(phrase_ids, phrase_mask))
        contrast = (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * known).sum()
        found = self.guide.number_logits(patches[regions]).flatten(0, 1)
        boxes = F.cross_entropy(found, numbers.flatten(), reduction="sum") / 4
        return {"loss": contrast + self.number_weight * boxes, "contrast": contrast, "boxes": boxes}


@dataclass(frozen=True)
class GuideOptions:
    number_weight: float = 1.0


class GuideTask(SupervisedTask):
    """Whole records: every region of an image with every phrase."""

    options = GuideOptions()

    def build(self) -> nn.Module:
        model = self.load()
        # The text layers and the head take no part; frozen, they cost the optimiser nothing.
        model.requires_grad_(False)
        model.model.visual.requires_grad_(True)
        model.get_input_embeddings().weight.requires_grad_(True)
        return GuideLoss(Guide(model), self.options.number_weight)

    def batch(self, groups: list[Group], step: int, total: int) -> tuple[dict[str, Any], int]:
        records = list(dict.fromkeys(record for record, _ in groups))
        pairs = {record: region_pairs(self.table.turns(record)) for record in records}
        texts = list(dict.fromkeys(pair.phrase for record in records for pair in pairs[record]))
        names = {pair.phrase for record in records for pair in pairs[record] if pair.name}
        labels, known, numbers, regions, offset = [], [], [], [], 0
        for record in records:
            _, rows, columns = (self.images[record][1] // torch.tensor([1, 2, 2])).tolist()
            label = np.zeros((rows * columns, len(texts)), np.float32)
            own = np.array([text in names for text in texts], np.float32)
            boxed = np.zeros(rows * columns, np.float32)
            corners: list[Box | None] = [None] * (rows * columns)
            for pair in pairs[record]:
                column = texts.index(pair.phrase)
                own[column] = 1
                for box in pair.boxes:
                    share = coverage((box,), rows, columns)
                    label[:, column] = np.maximum(label[:, column], share >= COVER)
                    for patch in map(int, np.flatnonzero((share >= COVER) & (share > boxed))):
                        boxed[patch], corners[int(patch)] = share[patch], box
            labels.append(label)
            known.append(np.repeat(own[None], rows * columns, 0))
            for patch, corner in enumerate(corners):
                if corner is not None:
                    numbers.append([self._number(value) for value in corner])
                    regions.append(offset + patch)
            offset += rows * columns
        inputs = self.pictures([(record, (0,)) for record in records])
        inputs.pop("image_index")
        target = torch.from_numpy(np.concatenate(labels))
        ids = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        inputs |= {
            "phrase_ids": ids["input_ids"], "phrase_mask": ids["attention_mask"], "labels": target,
            "known": torch.from_numpy(np.concatenate(known)),
            "numbers": torch.tensor(numbers, dtype=torch.long).reshape(-1, 4).T.contiguous(),
            "regions": torch.tensor(regions, dtype=torch.long),
        }  # fmt: skip
        return inputs, max(1, len(regions))

    def _number(self, value: int) -> int:
        """The (first) token that writes a coordinate."""
        return int(self.tokenizer.encode(str(value), add_special_tokens=False)[0])

    def save(self, state: dict[str, Any], out: Path) -> None:
        """A model folder with the trained tower and embeddings, and the guide's own weights beside it."""
        from clinkd.model.clinkd_qwen2vl import load_model, save_model
        from clinkd.model.guide import save_guide

        model = load_model(self.spec.model)
        guide = Guide(model)
        own = {key.removeprefix("guide."): value for key, value in state.items()}
        own.setdefault("model.lm_head.weight", own["model.model.language_model.embed_tokens.weight"])
        guide.load_state_dict(own)
        save_model(model, self.tokenizer, self.processor, out)
        save_guide(guide, out, {"cover": COVER})
