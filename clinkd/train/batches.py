"""Batches made of records, in Ray Data's tasks: decoded, resized, tokenized, packed.

Decisions:
- Documents are single turns, or with ``conversations`` all of a record's turns in one; then the guide's
  score of a document is the mean over its turns.
- Lengths are measured by the very code that makes the batches, on the shards' light columns: an image's
  tokens follow from its size. A batch whose lengths are not those measured is refused.
- A batch without samples holds two tokens of padding and a blank image: the vision tower runs on every
  rank, the loss is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clinkd.data.feed import Arrays, Asked, FeedError
from clinkd.data.records import sample_id
from clinkd.data.scores import Score, Scores, mean
from clinkd.model.conversation import Document, encode_conversation, pack_documents, packed_positions
from clinkd.model.guide import guide_inputs, merged_grids
from clinkd.model.pixels import Patches, blank, cut, image_tokens, join, load_processor
from clinkd.model.presets import IMAGE, VISION_START
from clinkd.model.rope import RopeGuidance

CUT = "patches"
"""Key of a row's images once they are cut: its turns may stand in several batches of a job."""


@dataclass(frozen=True)
class BatchSpec:
    """What makes a batch of records; travels to the tasks by value."""

    model: str  # folder of tokenizer and preprocessor_config.json
    guidance: RopeGuidance
    packed: bool
    conversations: bool = False
    scores: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def measure(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Tokens of each document of each row, from the shards' light columns."""
        return [batch_maker(self).lengths(row) for row in rows]

    def make(self, sequences: list[list[Asked]]) -> Arrays:
        """A batch as arrays; see ``BatchMaker.batch``."""
        return batch_maker(self).batch(sequences)


@lru_cache(maxsize=2)
def batch_maker(spec: BatchSpec) -> BatchMaker:
    """One per process: tokenizer and processor take seconds to load."""
    torch.set_num_threads(1)
    return BatchMaker(spec)


class BatchMaker:
    """Tokenizer, image processor and scores, and how records become a batch with them."""

    def __init__(self, spec: BatchSpec) -> None:
        from transformers import AutoTokenizer

        self.spec = spec
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = load_processor(spec.model, spec.min_pixels, spec.max_pixels)
        self.scores = Scores(spec.scores)

    def documents(self, row: dict[str, Any]) -> list[tuple[int, ...]]:
        """Turns of each document of a record."""
        turns = range(len(row["turns"]))
        return [tuple(turns)] if self.spec.conversations else [(turn,) for turn in turns]

    def lengths(self, row: dict[str, Any]) -> list[int]:
        sizes = [(row["height"], row["width"])]
        sizes += [(other["height"], other["width"]) for other in row.get("more_images") or []]
        try:
            tokens = [image_tokens(self.processor, *size) for size in sizes]
        except ValueError as error:
            raise FeedError(f"record {row['id']}: {error}; take it out of the data") from None
        return [len(self._encode(row, turns, tokens)[0]) for turns in self.documents(row)]

    def _encode(
        self, row: dict[str, Any], turns: tuple[int, ...], tokens: list[int]
    ) -> tuple[list[int], list[int]]:
        talk = [(row["turns"][turn]["question"], row["turns"][turn]["answer"]) for turn in turns]
        return encode_conversation(self.tokenizer, talk, tokens)

    def patches(self, row: dict[str, Any]) -> list[Patches]:
        """A record's images, cut.

        Raises:
            FeedError: one of them cannot be decoded.
        """
        if CUT not in row:
            contents = (row["png"], *(row.get("more_png") or []))
            try:
                row[CUT] = [cut(self.processor, content) for content in contents]
            except Exception as error:
                raise FeedError(
                    f"record {row['id']}: its image cannot be decoded ({error}); "
                    "run `clinkd prepare` again, which leaves such images out"
                ) from None
        return list(row[CUT])

    def batch(self, sequences: list[list[Asked]]) -> Arrays:
        """Arrays of a batch.

        Returns:
            ``input_ids``, ``labels`` [B, L], ``position_ids`` float32 [4, B, L], ``image_index`` [vision
            segments], the images as ``pixels.join`` gives them, and ``samples`` [1], the number of turns.
        """
        if not sequences:
            return self._filler()
        images: list[Patches] = []
        first: dict[str, int] = {}
        rows: list[list[Document]] = []
        for sequence in sequences:
            found = [document for asked in sequence for document in self._documents(asked, images, first)]
            rows += [found] if self.spec.packed else [[document] for document in found]
        packed = pack_documents(rows, self.tokenizer.pad_token_id)
        pictures = join(images)
        flat = [document for row in rows for document in row]
        documents = packed.pop("documents")
        positions = self._positions(packed, documents, pictures["image_grid_thw"], flat)
        turns = sum(len(asked.documents) for sequence in sequences for asked in sequence)
        if self.spec.conversations:
            turns = sum(len(asked.row["turns"]) for sequence in sequences for asked in sequence)
        arrays = {name: value.numpy() for name, value in packed.items()} | pictures
        return arrays | {"position_ids": positions.numpy(), "samples": np.array([turns])}

    def _documents(self, asked: Asked, images: list[Patches], first: dict[str, int]) -> Iterator[Document]:
        """A group's documents; its images join ``images`` where ``first`` does not know the record yet."""
        row = asked.row
        cuts = self.patches(row)
        if row["id"] not in first:
            first[row["id"]] = len(images)
            images += cuts
        merge = self.processor.merge_size**2
        tokens = [int(np.prod(image.grid)) // merge for image in cuts]
        shown = tuple(range(first[row["id"]], first[row["id"]] + len(cuts)))
        length, turns = 0, self.documents(row)
        for number in asked.documents:
            ids, labels = self._encode(row, turns[number], tokens)
            length += len(ids)
            yield Document(ids, labels, shown, self._score(row["id"], turns[number]))
        if length != asked.tokens:
            raise FeedError(
                f"record {row['id']}: {length} tokens instead of {asked.tokens}, as its image is not of the "
                "size that the shard names; run `clinkd prepare` again"
            )

    def _score(self, record: str, turns: tuple[int, ...]) -> Score | None:
        if self.spec.guidance.guided == "none":
            return None
        return mean([self.scores[sample_id(record, turn)] for turn in turns])

    def _positions(
        self, packed: dict[str, Tensor], documents: Tensor, grids: np.ndarray, rows: list[Document]
    ) -> Tensor:
        ids: Any = self.tokenizer.convert_tokens_to_ids([IMAGE, VISION_START])
        image, start = ids
        grid, guided = torch.from_numpy(grids), self.spec.guidance.guided
        scored = [(row.score, row.images) for row in rows if row.score is not None and row.images]
        merged = [merged_grids(grid[list(images)], self.processor.merge_size) for _, images in scored]
        scores = guide_inputs(guided, [score for score, _ in scored], merged, packed=True)
        return packed_positions(
            packed["input_ids"],
            documents,
            grid[packed["image_index"]],
            guidance=self.spec.guidance,
            image_token_id=image,
            vision_start_token_id=start,
            spatial_merge_size=self.processor.merge_size,
            **scores,
        )

    def _filler(self) -> Arrays:
        ids = np.full((1, 2), self.tokenizer.pad_token_id, np.int64)
        positions = np.zeros((4, 1, 2), np.float32)
        positions[0] = [0, 1]  # the text's; guided ones are 0 at padding
        return join([blank(self.processor)]) | {
            "input_ids": ids,
            "labels": np.full_like(ids, -100),
            "position_ids": positions,
            "image_index": np.zeros(0, np.int64),
            "samples": np.array([0]),
        }
