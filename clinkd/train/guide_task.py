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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.data.feed import Arrays, Order
from clinkd.data.reading import Kept, Place, Records
from clinkd.data.regions import Pair, coverage, covered, region_pairs
from clinkd.data.sampler import Batch
from clinkd.model.first_weights import begin_layers
from clinkd.model.pixels import Patches, blank, join, load_processor
from clinkd.model.tiny_guide import TinyGuide
from clinkd.train.batches import KEYS, Pictures
from clinkd.train.flops import Work
from clinkd.train.tasks import SupervisedTask

TAUGHT_KEPT = 32 << 20
"""Bytes of what records teach, and of phrases' tokens, that a maker keeps."""
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


@dataclass(frozen=True)
class GuideBatchSpec:
    """What makes a guide's batch of records; travels to the tasks by value."""

    model: str  # folder of tokenizer and preprocessor_config.json
    min_pixels: int | None = None
    max_pixels: int | None = None

    def make(self, order: Order, records: Records) -> Arrays:
        """A batch as arrays; see ``GuideBatchMaker.batch``."""
        return _maker(self).batch(order, records)


@lru_cache(maxsize=1)
def _maker(spec: GuideBatchSpec) -> GuideBatchMaker:
    return GuideBatchMaker(spec)


class GuideBatchMaker:
    """Whole records: every region of an image with every phrase."""

    def __init__(self, spec: GuideBatchSpec) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = load_processor(spec.model, spec.min_pixels, spec.max_pixels)
        self.pictures = Pictures(self.processor)
        # Of records, phrases and coordinates: each is dealt many times and always the same.
        self._kept = Kept(TAUGHT_KEPT)
        self._tokens = Kept(TAUGHT_KEPT)
        self._written: dict[int, int] = {}

    def batch(self, order: Order, records: Records) -> Arrays:
        """The images as ``pixels.join`` gives them with their ``KEYS``, and ``GuideLoss.forward``'s other
        arguments; ``samples`` [1] counts images."""
        places = list(dict.fromkeys(asked.place for sequence in order.sequences for asked in sequence))
        found = [self._record(place, records) for place in places]
        shown = [patches for patches, _, _ in found] or [blank(self.processor)]
        taught = [one for _, _, one in found] or [Taught(1, [], [], [], [], [], [])]
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
        return join(shown) | {
            KEYS: np.array([key for _, key, _ in found] or [b"blank"]),
            "phrase_ids": ids, "phrase_mask": mask,
            "names": np.array([texts[name] for name in names], np.int64),
            "regions": np.array(regions, np.int64), "owners": np.array(owners, np.int64),
            "numbers": np.array(numbers, np.int64).reshape(-1, 4),
            "labels": labels, "known": known, "samples": np.array([len(found)]),
        }  # fmt: skip

    def _record(self, place: Place, records: Records) -> tuple[Patches, bytes, Taught]:
        """The first of a record's images, its key, and what it teaches."""
        row = records.row(place)
        shown = self.pictures.of(row["id"], place, records)
        patches, key = shown.patches[0], shown.keys[0]
        taught = self._kept.get(records.name(place))
        if taught is None:
            _, rows, columns = patches.grid
            merge = self.processor.merge_size
            taught = _taught(region_pairs(row["turns"]), rows // merge, columns // merge, self._number)
            self._kept.put(records.name(place), taught, 4096)
        return patches, key, taught

    def _phrases(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of phrases, padded on the right, and their mask; int64 [P, L] each."""
        found = [self._phrase(text) for text in texts]
        longest = max(len(tokens) for tokens in found)
        ids = np.full((len(found), longest), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(found):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def _phrase(self, text: str) -> list[int]:
        found = self._tokens.get(text)
        if found is None:
            # A leading space: the tokens of words inside a sentence.
            found = self.tokenizer(f" {text}")["input_ids"]
            self._tokens.put(text, found, 16 * len(found) + 200)
        return list(found)

    def _number(self, value: int) -> int:
        """The (first) token that writes a coordinate."""
        if value not in self._written:
            self._written[value] = int(self.tokenizer.encode(str(value), add_special_tokens=False)[0])
        return self._written[value]


class GuideTask(SupervisedTask):
    """The tower, the embeddings and the guide's own weights; see ``GuideLoss``."""

    keeps = False  # its loss takes pixels

    def build(self) -> nn.Module:
        model = self.load()
        # The text layers and the head take no part; frozen, they cost the optimiser nothing.
        model.requires_grad_(False)
        if self.spec.train_vision:
            model.model.visual.requires_grad_(True)
            model.get_input_embeddings().weight.requires_grad_(True)
        return GuideLoss(TinyGuide(model))

    def arguments(
        self, arrays: Arrays, batch: Batch, step: int, device: torch.device
    ) -> tuple[dict[str, Any], int]:
        pictures = self.pictures(arrays, arrays.pop(KEYS), device)
        inputs = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        return inputs | pictures, max(1, len(inputs["regions"])) if batch.sequences else 0

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
