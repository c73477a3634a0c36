"""What the guide trains on: the regions of an image and the phrases that speak of them.

Decisions:
- A class name (ROC's answer) is held against all class names of the batch, at the patches of its
  region. A longer
  text (VG's question, RC's answer) is held against the patches of its own image: others may well show
  the same.
- A patch belongs to the region that covers most of it, at least 30%; a region that covers no patch so
  far has the one it covers most.
- Of a record with several images the first takes part: no box may say in which of them it lies, so there
  are no regions to learn.
- A patch also learns its region's box: each coordinate through a head of its own, and all four as a
  bag, in the rotated embedding space that the answering model's keys start in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.data.regions import Pair, coverage, covered, region_pairs
from clinkd.model.tiny_guide import TinyGuide
from clinkd.train.ledger import Group
from clinkd.train.tasks import SupervisedTask

TEXT_WEIGHT, HEADS_WEIGHT, BAG_WEIGHT = 0.1, 1.0, 0.5


class GuideLoss(nn.Module):
    """Sums over a batch's patches that lie in regions (see the file's decisions)."""

    def __init__(self, guide: TinyGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor, phrase_ids: Tensor, phrase_mask: Tensor,
        names: Tensor, regions: Tensor, owners: Tensor, numbers: Tensor, labels: Tensor, known: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Sums of the losses.

        Args:
            phrase_ids, phrase_mask: [P, L]. names: [K] which phrases are class names.
            regions: [R] patches in regions; owners: [R] the name of each, as an index into ``names``,
            -1 without one. numbers: [R, 4] tokens of their boxes' coordinates.
            labels, known: [patches, P] which phrase speaks of which patch, and where that is known.
        """
        patches = self.guide.patches(pixel_values, image_grid_thw)
        logits = self.guide.logits(patches, self.guide.phrases(phrase_ids, phrase_mask))
        named = logits[regions][:, names]
        name = (
            F.cross_entropy(named, owners, ignore_index=-1, reduction="sum")
            if len(names)
            else logits.sum() * 0
        )
        text = (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * known).sum()
        heads = self.guide.number_logits(patches[regions])
        boxes = F.cross_entropy(heads.flatten(0, 1), numbers.T.flatten(), reduction="sum") / 4
        bag = -self.guide.bag_logits(patches[regions]).log_softmax(-1).gather(1, numbers).mean(1).sum()
        loss = name + TEXT_WEIGHT * text + HEADS_WEIGHT * boxes + BAG_WEIGHT * bag
        return {"loss": loss, "name": name, "boxes": boxes, "bag": bag, "text": text}


class GuideTask(SupervisedTask):
    """Whole records: every region of an image with every phrase."""

    def build(self) -> nn.Module:
        model = self.load()
        # The text layers and the head take no part; frozen, they cost the optimiser nothing.
        model.requires_grad_(False)
        if self.spec.train_vision:
            model.model.visual.requires_grad_(True)
            model.get_input_embeddings().weight.requires_grad_(True)
        return GuideLoss(TinyGuide(model))

    def batch(self, groups: list[Group], step: int, total: int) -> tuple[dict[str, Any], int]:
        records = list(dict.fromkeys(record for record, _ in groups))
        pairs = [region_pairs(self.table.turns(record)) for record in records]
        texts = list(dict.fromkeys(pair.phrase for found in pairs for pair in found))
        names = list(dict.fromkeys(pair.phrase for found in pairs for pair in found if pair.name))
        shown = [_first(*self.images[record]) for record in records]
        grids = [(grid // torch.tensor([1, 2, 2])).tolist() for _, grid in shown]
        targets = [_targets(found, texts, names, grid) for found, grid in zip(pairs, grids, strict=True)]
        sizes = [rows * columns for _, rows, columns in grids]
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        inputs = {
            "pixel_values": torch.cat([values for values, _ in shown]),
            "image_grid_thw": torch.stack([grid for _, grid in shown]),
        }
        ids = self.tokenizer([f" {text}" for text in texts] or [" "], padding=True, padding_side="right",
                             return_tensors="pt")  # fmt: skip
        owners = [owner for target in targets for owner in target["owners"]]
        numbers = [[self._number(value) for value in box] for target in targets for box in target["boxes"]]
        regions = [
            int(at) + patch
            for at, target in zip(offsets, targets, strict=True)
            for patch in target["regions"]
        ]
        inputs |= {
            "phrase_ids": ids["input_ids"], "phrase_mask": ids["attention_mask"],
            "names": torch.tensor([texts.index(name) for name in names], dtype=torch.long),
            "regions": torch.tensor(regions, dtype=torch.long),
            "owners": torch.tensor(owners, dtype=torch.long),
            "numbers": torch.tensor(numbers, dtype=torch.long).reshape(-1, 4),
            "labels": torch.from_numpy(np.concatenate([target["labels"] for target in targets])),
            "known": torch.from_numpy(np.concatenate([target["known"] for target in targets])),
        }  # fmt: skip
        return inputs, max(1, len(regions))

    def _number(self, value: int) -> int:
        """The (first) token that writes a coordinate."""
        return int(self.tokenizer.encode(str(value), add_special_tokens=False)[0])

    def save(self, state: dict[str, Any], out: Path) -> None:
        """A model folder with the trained tower and embeddings, and the guide's own weights beside it."""
        from clinkd.model.clinkd_qwen2vl import load_model, save_model
        from clinkd.model.tiny_guide import save_guide

        model = load_model(self.spec.model)
        guide = TinyGuide(model)
        own = {key.removeprefix("guide."): value for key, value in state.items()}
        own.setdefault("model.lm_head.weight", own["model.model.language_model.embed_tokens.weight"])
        guide.load_state_dict(own)
        save_model(model, self.tokenizer, self.processor, out)
        save_guide(guide, out)


def _first(values: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Patches and grid [3] of the first of a record's images."""
    return values[: int(grids[0].prod())], grids[0]


def _targets(pairs: list[Pair], texts: list[str], names: list[str], grid: list[int]) -> dict[str, Any]:
    """One image: its patches in regions with owner and box, and its long texts' patches."""
    _, rows, columns = grid
    labels = np.zeros((rows * columns, max(1, len(texts))), np.float32)
    known, best = np.zeros_like(labels), np.zeros(rows * columns, np.float32)
    found: dict[int, tuple[int, tuple[int, ...]]] = {}
    for pair in pairs:
        for box in pair.boxes:
            share = coverage((box,), rows, columns)
            mine = covered(share)
            if pair.name:
                for patch in np.flatnonzero(mine & (share > best)).tolist():
                    best[patch], found[patch] = share[patch], (names.index(pair.phrase), box)
            else:
                labels[mine, texts.index(pair.phrase)] = 1
        if not pair.name:
            known[:, texts.index(pair.phrase)] = 1
    ordered = sorted(found.items())
    return {
        "regions": [patch for patch, _ in ordered], "owners": [owner for _, (owner, _) in ordered],
        "boxes": [box for _, (_, box) in ordered], "labels": labels, "known": known,
    }  # fmt: skip
