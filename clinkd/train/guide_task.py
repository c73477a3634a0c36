"""What the guide trains on: the regions of an image and the phrases that speak of them.

Decisions:
- A class name (ROC's answer) is held against all class names of the batch, at the patches of its region. A
  longer text (VG's question, RC's answer) is held against the patches of its own image: others may well
  show the same.
- A patch belongs to the region that covers most of it, at least 30%; a region that covers no patch so
  far has the one it covers most.
- Of a record with several images the first takes part: no box may say in which of them it lies, so there
  are no regions to learn.
- A patch also learns its region's box: each coordinate through a head of its own, and all four as a
  bag, in the rotated embedding space that the answering model's keys start in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.data.regions import Pair, coverage, covered, region_pairs
from clinkd.model.first_weights import begin_layers
from clinkd.model.tiny_guide import TinyGuide
from clinkd.train.flops import Work
from clinkd.train.ledger import Group
from clinkd.train.tasks import SupervisedTask, VqaSpec

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

    def own_work(self, arguments: Mapping[str, Any], tokens: int) -> list[Work]:
        """Each patch of a region through heads and table, four numbers and a bag; each patch with each
        phrase, both of which pass gradients on."""
        text = self.guide.model.config.text_config
        width, table = text.hidden_size, text.hidden_size * text.vocab_size
        trains = self.guide.model.get_input_embeddings().weight.requires_grad
        phrases, regions = len(arguments["phrase_ids"]), len(arguments["regions"])
        patches = len(arguments["labels"])
        return [
            Work(regions, 4 * width**2 + 5 * table, 4 * width**2 + 5 * table * trains, reached=True),
            Work(regions + phrases, width**2, trained=0, reached=True),  # the rotation
            Work(patches, width * phrases, width * phrases, reached=True),
        ]


class Taught(NamedTuple):
    """What one image teaches."""

    cells: int  # merged patches
    phrases: list[str]  # all of them, in order
    names: list[str]  # those that are class names
    regions: list[int]  # patches that lie in a named region, with its name and its box's number tokens
    owners: list[str]
    numbers: list[list[int]]
    spoken: list[tuple[str, np.ndarray]]  # longer texts and the patches they speak of, box by box


class GuideTask(SupervisedTask):
    """Whole records: every region of an image with every phrase."""

    keeps = False  # its loss takes pixels

    def __init__(self, rows: Any, scratch: Path, spec: VqaSpec, zero_stage: int = 0) -> None:
        super().__init__(rows, scratch, spec, zero_stage)
        # Of records, phrases and coordinates: each is dealt many times and always the same.
        self._kept: dict[int, Taught] = {}
        self._tokens: dict[str, list[int]] = {}
        self._written: dict[int, int] = {}

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
        shown = [_first(*self.images[record]) for record in records]
        taught = [self._taught(record, grid) for record, (_, grid) in zip(records, shown, strict=True)]
        texts = {text: at for at, text in enumerate(dict.fromkeys(t for one in taught for t in one.phrases))}
        names = {name: at for at, name in enumerate(dict.fromkeys(n for one in taught for n in one.names))}
        offsets = np.concatenate([[0], np.cumsum([one.cells for one in taught])]).tolist()
        labels = np.zeros((offsets[-1], max(1, len(texts))), np.float32)
        known = np.zeros_like(labels)
        for at, one in zip(offsets, taught, strict=False):
            for text, cells in one.spoken:
                labels[at + cells, texts[text]] = 1
                known[at : at + one.cells, texts[text]] = 1
        regions = [at + cell for at, one in zip(offsets, taught, strict=False) for cell in one.regions]
        owners = [names[name] for one in taught for name in one.owners]
        numbers = [tokens for one in taught for tokens in one.numbers]
        ids, mask = self._phrases(list(texts) or [""])
        inputs = {
            "pixel_values": torch.cat([values for values, _ in shown]),
            "image_grid_thw": torch.stack([grid for _, grid in shown]),
            "phrase_ids": ids, "phrase_mask": mask,
            "names": torch.tensor([texts[name] for name in names], dtype=torch.long),
            "regions": torch.tensor(regions, dtype=torch.long),
            "owners": torch.tensor(owners, dtype=torch.long),
            "numbers": torch.tensor(numbers, dtype=torch.long).reshape(-1, 4),
            "labels": torch.from_numpy(labels), "known": torch.from_numpy(known),
        }  # fmt: skip
        return inputs, max(1, len(regions))

    def _taught(self, record: int, grid: Tensor) -> Taught:
        """What a record teaches; the same each time it is dealt, so made once."""
        if record not in self._kept:
            _, rows, columns = (grid // torch.tensor([1, 2, 2])).tolist()
            self._kept[record] = _taught(region_pairs(self.table.turns(record)), rows, columns, self._number)
        return self._kept[record]

    def _phrases(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of phrases, padded on the right, and their mask; [P, L] each."""
        for text in texts:
            if text not in self._tokens:
                # A leading space: the tokens of words inside a sentence.
                self._tokens[text] = self.tokenizer(f" {text}")["input_ids"]
        found = [self._tokens[text] for text in texts]
        longest = max(len(tokens) for tokens in found)
        ids = torch.full((len(found), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(found):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def _number(self, value: int) -> int:
        """The (first) token that writes a coordinate."""
        if value not in self._written:
            self._written[value] = int(self.tokenizer.encode(str(value), add_special_tokens=False)[0])
        return self._written[value]

    def save(self, state: dict[str, Any], out: Path) -> None:
        """Write a model folder with the trained tower and embeddings, and the guide's own weights next to it.

        The text layers of a model made here are initialized from what the guide has learned.
        """
        from clinkd.model.clinkd_qwen2vl import load_model, save_model
        from clinkd.model.tiny_guide import save_guide

        model = load_model(self.spec.model)
        guide = TinyGuide(model)
        own = {key.removeprefix("guide."): value for key, value in state.items()}
        own.setdefault("model.lm_head.weight", own["model.model.language_model.embed_tokens.weight"])
        guide.load_state_dict(own)
        if self.spec.train_vision:
            begin_layers(model, self.tokenizer, list(guide.heads.parameters()))
        save_model(model, self.tokenizer, self.processor, out)
        save_guide(guide, out)


def _first(values: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Patches and grid [3] of the first of a record's images."""
    return values[: int(grids[0].prod())], grids[0]


def _taught(pairs: list[Pair], rows: int, columns: int, number: Callable[[int], int]) -> Taught:
    """One image: its patches in regions with name and box, and its long texts' patches."""
    best = np.zeros(rows * columns, np.float32)
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    spoken: list[tuple[str, np.ndarray]] = []
    for pair in pairs:
        for box in pair.boxes:
            share = coverage((box,), rows, columns)
            mine = covered(share)
            if pair.name:
                for patch in np.flatnonzero(mine & (share > best)).tolist():
                    best[patch], found[patch] = share[patch], (pair.phrase, box)
            else:
                spoken.append((pair.phrase, np.flatnonzero(mine)))
    ordered = sorted(found.items())
    return Taught(
        cells=rows * columns, phrases=[pair.phrase for pair in pairs],
        names=[pair.phrase for pair in pairs if pair.name], regions=[patch for patch, _ in ordered],
        owners=[name for _, (name, _) in ordered],
        numbers=[[number(value) for value in box] for _, (_, box) in ordered], spoken=spoken,
    )  # fmt: skip
