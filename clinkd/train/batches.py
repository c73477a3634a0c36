"""Batches made of records: decoded, resized, tokenized, packed; in Ray Data's tasks or in the worker.

Decisions:
- There is one maker for every stage that answers; stages differ in their targets (train/targets.py).
- Documents are single turns, or with ``conversations`` all of a record's turns in one; then the guide's
  score of a document is the mean over its turns.
- A sequence each, padded, documents keep their mask, so that questions about one image may share it in the
  text model (model/prefix.py). Packed, they come with positions of their own.
- Lengths are measured by the very code that makes the batches, on the shards' light columns: an image's
  tokens follow from its size.
- A maker keeps the images it cut and the texts it encoded, within a budget: small data are decoded once.
- A batch without samples holds two tokens of padding and a blank image: the vision tower runs on every
  rank, the loss is 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clinkd.data.feed import Arrays, Asked, Order
from clinkd.data.reading import Kept, Place, Records
from clinkd.data.records import sample_id
from clinkd.data.scores import Scores, mean
from clinkd.data.tasks import FeedError
from clinkd.model.conversation import Document, encode_conversation, pack_documents, packed_positions
from clinkd.model.guide import guide_inputs, merged_grids
from clinkd.model.pixels import Patches, blank, cut, image_tokens, join, load_processor
from clinkd.model.presets import IMAGE, VISION_START
from clinkd.model.rope import RopeGuidance
from clinkd.train.targets import Targets, Truth, Turn

IMAGES_KEPT = 128 << 20
"""Bytes of cut images that a maker keeps."""
ENCODED_KEPT = 16 << 20
"""Bytes of token ids that it keeps."""
KEYS = "image_keys"
"""Of a batch: a name of each distinct image's content and of how it is cut."""


@dataclass(frozen=True)
class BatchSpec:
    """What makes a batch of records; travels to the tasks by value."""

    model: str  # folder of tokenizer and preprocessor_config.json
    guidance: RopeGuidance
    packed: bool = False
    conversations: bool = False
    scores: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    targets: Targets = field(default_factory=Truth)

    def measure(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Tokens of each document of each row, from the shards' light columns."""
        return batch_maker(self).lengths(rows)

    def make(self, order: Order, records: Records) -> Arrays:
        """A batch as arrays; see ``BatchMaker.batch``."""
        return batch_maker(self).batch(order, records)


@lru_cache(maxsize=2)
def batch_maker(spec: BatchSpec) -> BatchMaker:
    """One per process: tokenizer and processor take seconds to load."""
    return BatchMaker(spec)


class Shown(NamedTuple):
    """A record's images, cut, and their keys."""

    patches: list[Patches]
    keys: list[bytes]


class Pictures:
    """The images of records, cut once while they are kept."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._kept = Kept(IMAGES_KEPT)
        self._cut = repr(sorted(processor.to_dict().items())).encode()

    def of(self, record: str, place: Place, records: Records) -> Shown:
        """A record's images, in its order.

        Raises:
            FeedError: one of them cannot be decoded.
        """
        key = records.name(place)
        found = self._kept.get(key)
        if found is None:
            contents = records.images(place)
            try:
                patches = [cut(self.processor, content) for content in contents]
            except Exception as error:
                raise FeedError(
                    f"record {record}: its image cannot be decoded ({error}); "
                    "run `clinkd prepare` again, which leaves such images out"
                ) from None
            names = [hashlib.blake2b(self._cut + content, digest_size=16).hexdigest() for content in contents]
            found = Shown(patches, [name.encode() for name in names])
            self._kept.put(key, found, sum(one.values.nbytes for one in patches))
        return found


@dataclass(frozen=True)
class _Asked:
    """A group of a batch, its record read."""

    row: dict[str, Any]
    place: Place
    documents: list[tuple[int, ...]]  # turns of each


class _Said(NamedTuple):
    """A document but for its score; ``turns``: how many samples are in it."""

    ids: list[int]
    labels: list[int]
    images: tuple[int, ...]
    turns: int


class BatchMaker:
    """Tokenizer, image processor, scores and targets, and how records become a batch with them."""

    def __init__(self, spec: BatchSpec) -> None:
        from transformers import AutoTokenizer

        self.spec = spec
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = load_processor(spec.model, spec.min_pixels, spec.max_pixels)
        self.scores = Scores(spec.scores)
        self.targets = spec.targets.open()
        self.pictures = Pictures(self.processor)
        self._encoded = Kept(ENCODED_KEPT)
        ids: Any = self.tokenizer.convert_tokens_to_ids([IMAGE, VISION_START])
        self.image, self.vision_start = ids

    def lengths(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return [self._lengths(row) for row in rows]

    def _image_tokens(self, row: dict[str, Any]) -> list[int]:
        sizes = [(row["height"], row["width"])]
        sizes += [(other["height"], other["width"]) for other in row.get("more_images") or []]
        try:
            return [image_tokens(self.processor, *size) for size in sizes]
        except ValueError as error:
            raise FeedError(f"record {row['id']}: {error}; take it out of the data") from None

    def _lengths(self, row: dict[str, Any]) -> list[int]:
        tokens = self._image_tokens(row)
        talks = self.targets.talk(_turns(row, range(len(row["turns"]))), 0)
        said = [[talk for turn in turns if (talk := talks[turn]) is not None] for turns in self._all(row)]
        return [len(self._encode(talk, tokens)[0]) if talk else 1 for talk in said]

    def _all(self, row: dict[str, Any]) -> list[tuple[int, ...]]:
        """Turns of each document of a record."""
        turns = range(len(row["turns"]))
        return [tuple(turns)] if self.spec.conversations else [(turn,) for turn in turns]

    def _encode(self, talk: Sequence[tuple[str, str]], tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        key = tuple(talk), tuple(tokens)
        found = self._encoded.get(key)
        if found is None:
            found = encode_conversation(self.tokenizer, list(talk), list(tokens))
            self._encoded.put(key, found, 16 * len(found[0]) + 300)
        return found

    def batch(self, order: Order, records: Records) -> Arrays:
        """Arrays of a batch.

        Returns:
            ``input_ids``, ``labels`` [B, L]; packed ``position_ids`` float32 [4, B, L], else
            ``attention_mask`` and what the guidance takes of the scores; ``image_index`` [vision segments];
            the images as ``pixels.join`` gives them and their ``KEYS``; ``samples`` [1], the number of
            turns; and what the targets add.

        Raises:
            FeedError: a record that cannot be read or decoded, or packed, is not of the size that was
            measured.
        """
        asked = [[self._read(group, records) for group in sequence] for sequence in order.sequences]
        turns = [
            turn
            for sequence in asked for group in sequence for document in group.documents
            for turn in _turns(group.row, document)
        ]  # fmt: skip
        talks = iter(self.targets.talk(turns, order.step) if turns else [])
        images: list[Patches] = []
        keys: list[bytes] = []
        first: dict[Place, tuple[int, ...]] = {}
        names: list[str] = []
        rows: list[list[_Said]] = []
        for sequence in asked:
            found: list[_Said] = []
            for group in sequence:
                if group.place not in first:
                    shown = self.pictures.of(group.row["id"], group.place, records)
                    if self.spec.packed:
                        self._check(group.row, shown)
                    first[group.place] = tuple(range(len(images), len(images) + len(shown.patches)))
                    images += shown.patches
                    keys += shown.keys
                found += self._documents(group, first[group.place], images, talks, names)
            rows += ([found] if found else []) if self.spec.packed else [[document] for document in found]
        if not rows:
            return self._filler()
        return self._arrays(self._scored(rows, names), images) | self.targets.arrays(names) | {
            KEYS: np.array(keys), "samples": np.array([len(names)])
        }  # fmt: skip

    def _read(self, asked: Asked, records: Records) -> _Asked:
        row = records.row(asked.place)
        documents = self._all(row)
        return _Asked(row, asked.place, [documents[number] for number in asked.documents])

    def _check(self, row: dict[str, Any], shown: Shown) -> None:
        """Raises FeedError where an image is not of the size that the lengths were measured with."""
        merge = self.processor.merge_size**2
        cuts = [int(np.prod(one.grid)) // merge for one in shown.patches]
        if cuts != (measured := self._image_tokens(row)):
            raise FeedError(
                f"record {row['id']}: images of {cuts} tokens instead of {measured}, as they are not of the "
                "size that the shard names; run `clinkd prepare` again"
            )

    def _documents(
        self, asked: _Asked, shown: tuple[int, ...], images: Sequence[Patches],
        talks: Iterator[tuple[str, str] | None], names: list[str],
    ) -> Iterator[_Said]:  # fmt: skip
        """A group's documents; the samples in them join ``names``."""
        row, merge = asked.row, self.processor.merge_size**2
        tokens = [int(np.prod(images[image].grid)) // merge for image in shown]
        for turns in asked.documents:
            said = [(turn, talk) for turn in turns if (talk := next(talks)) is not None]
            if not said:
                continue
            ids, labels = self._encode([talk for _, talk in said], tokens)
            names += [sample_id(row["id"], turn) for turn, _ in said]
            yield _Said(ids, labels, shown, len(said))

    def _scored(self, rows: list[list[_Said]], names: Sequence[str]) -> list[list[Document]]:
        """The documents with the guide's score of each, where the guidance wants it."""
        guided = self.spec.guidance.guided != "none"
        scores = iter(self.scores.of(names)) if guided else iter(())

        def document(one: _Said) -> Document:
            score = mean([next(scores) for _ in range(one.turns)]) if guided else None
            return Document(one.ids, one.labels, one.images, score)

        return [[document(one) for one in row] for row in rows]

    def _arrays(self, rows: list[list[Document]], images: list[Patches]) -> Arrays:
        packed = pack_documents(rows, self.tokenizer.pad_token_id)
        pictures = join(images)
        documents = packed.pop("documents")
        flat = [document for row in rows for document in row]
        grids = torch.from_numpy(pictures["image_grid_thw"])
        scores = self._guidance(flat, grids)
        if self.spec.packed:
            packed["position_ids"] = packed_positions(
                packed["input_ids"], documents, grids[packed["image_index"]], guidance=self.spec.guidance,
                image_token_id=self.image, vision_start_token_id=self.vision_start,
                spatial_merge_size=self.processor.merge_size, **scores,
            )  # fmt: skip
        else:
            packed |= {"attention_mask": (documents > 0).long(), **scores}
        return {name: value.numpy() for name, value in packed.items()} | pictures

    def _guidance(self, documents: list[Document], grids: Tensor) -> dict[str, Tensor]:
        scored = [(document.score, document.images) for document in documents if document.score is not None]
        merged = [merged_grids(grids[list(images)], self.processor.merge_size) for _, images in scored]
        scores = [score for score, _ in scored]
        return guide_inputs(self.spec.guidance.guided, scores, merged, packed=self.spec.packed)

    def _filler(self) -> Arrays:
        ids = np.full((1, 2), self.tokenizer.pad_token_id, np.int64)
        positions = np.zeros((4, 1, 2), np.float32)
        positions[0] = [0, 1]  # the text's; guided ones are 0 at padding
        empty = blank(self.processor)
        return join([empty]) | {
            "input_ids": ids,
            "labels": np.full_like(ids, -100),
            "position_ids": positions,
            "image_index": np.zeros(0, np.int64),
            KEYS: np.array([b"blank"]),
            "samples": np.array([0]),
        } | self.targets.arrays([])  # fmt: skip


def _turns(row: dict[str, Any], turns: Sequence[int] | range) -> list[Turn]:
    return [
        Turn(sample_id(row["id"], turn), *(row["turns"][turn][key] for key in ("task", "question", "answer")))
        for turn in turns
    ]
