"""Images of records on their way into a batch: as pixels, or as what a frozen tower has said of them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from clinkd.data.ingest import RecordTable, decode
from clinkd.model.tower import STATES, Shown, State

KEPT = 4096
"""Records whose pixels a worker keeps;"""
PASSING = 64
"""so where the tower's states are kept in their place."""


class ImageStore:
    """Pixel values of records, processed once and kept; of a frozen tower's images, its states.

    ``tower`` is the digest of a frozen tower (``tower.tower_digest``) whose states take the place of pixels.
    """

    tower: str | None = None

    def __init__(self, table: RecordTable, processor: Any) -> None:
        self.table, self.processor = table, processor
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._cut = repr(sorted(processor.to_dict().items())).encode()

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor]:
        """([patches of all its images, values], grids [images, 3])."""
        if record not in self._kept:
            images = [decode(png) for png in self.table.images(record)]
            found = self.processor(images=images, return_tensors="pt")
            while len(self._kept) >= (KEPT if self.tower is None else PASSING):
                self._kept.pop(next(iter(self._kept)))
            self._kept[record] = (found["pixel_values"], found["image_grid_thw"])
        return self._kept[record]

    def grids(self, record: int) -> Tensor:
        """[images, 3] of a record; nothing is decoded for it where the tower has seen its images."""
        known = [state.grid for state in self._states(record) if state is not None]
        if self.tower is not None and len(known) == len(self._digests(record)):
            return torch.tensor(known)
        return self[record][1]

    def batch(self, records: list[int]) -> dict[str, Any]:
        """Arguments of ``GuidedModel.forward_hidden`` for the images of some records, in their order.

        Returns:
            ``image_grid_thw`` [images, 3] and ``pixel_values`` [patches, values]; with a tower also
            ``shown``, and the pixels are of the images alone that it has not seen (None: it has seen all).
        """
        grids = torch.cat([self.grids(record) for record in records])
        if self.tower is None:
            pixels = torch.cat([self[record][0] for record in records])
            return {"image_grid_thw": grids, "pixel_values": pixels}
        keys, states, unseen = [], [], []
        for record in records:
            known = self._states(record)
            keys += [(self.tower, name) for name in self._digests(record)]
            states += known
            unseen += self._unseen(record, known)
        return {
            "image_grid_thw": grids,
            "pixel_values": torch.cat(unseen) if unseen else None,
            "shown": Shown(tuple(keys), tuple(states)),
        }

    def _digests(self, record: int) -> tuple[str, ...]:
        """Of each of a record's images, of its content and of how it is cut into patches."""
        if record not in self._names:
            self._names[record] = tuple(
                hashlib.blake2b(self._cut + content, digest_size=16).hexdigest()
                for content in self.table.images(record)
            )
        return self._names[record]

    def _states(self, record: int) -> list[State | None]:
        """What is kept of each of a record's images."""
        if self.tower is None:
            return []
        return [STATES.get((self.tower, name)) for name in self._digests(record)]

    def _unseen(self, record: int, known: list[State | None]) -> list[Tensor]:
        """[patches, values] of each of a record's images of which nothing is ``known``."""
        if None not in known:
            return []
        values, grids = self[record]
        parts = values.split(grids.prod(-1).tolist())
        return [part for part, state in zip(parts, known, strict=True) if state is None]
