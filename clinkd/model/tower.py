"""What a frozen vision tower says of an image, worked out once in a process and kept.

Decisions:
- The states before the merger are kept, for the merger always trains.
- An image passes the tower alone: its states are the same bits in whichever batch it comes, so a run that
  goes on in another process repeats the undisturbed one.
- States are found by the tower's weights and the image's content, not by a run's name: stages of a run, and
  the trials of a sweep that share a tower, find each other's.
- Past ``LIMIT`` the oldest make room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIMIT = 512 << 20
"""Bytes of states that a process keeps."""

Key = tuple[str, str]
"""(tower, image), digests both."""


@dataclass(frozen=True)
class State:
    """An image's states [patches, width] before the merger, on the CPU; grid: (frames, rows, columns)."""

    values: Tensor
    grid: tuple[int, int, int]


class States:
    """The last states that were used, as many as have room."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Key, State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> State | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, state: State) -> None:
        if key in self._kept or state.values.nbytes > self.limit:
            return
        self._kept[key] = state
        self.size += state.values.nbytes
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].values.nbytes


STATES = States()
"""This process's."""


@dataclass(frozen=True)
class Shown:
    """The distinct images of a batch, in their order: what the tower said of them, where that is kept.

    Args:
        keys: of all images. states: of all images, None of those whose pixels come with the batch.
    """

    keys: tuple[Key, ...]
    states: tuple[State | None, ...]

    @property
    def unseen(self) -> list[int]:
        """Images that have to pass the tower."""
        return [number for number, state in enumerate(self.states) if state is None]


def can_keep(model: Any) -> bool:
    """Whether the tower is frozen and gives its states in the order of the patches.

    Qwen2.5-VL's come in the order of its windows.
    """
    visual = model.model.visual
    weights = [*visual.patch_embed.parameters(), *visual.blocks.parameters()]
    return not any(weight.requires_grad for weight in weights) and model.config.model_type == "qwen2_vl"


def tower_digest(model: Any, runs_in: torch.dtype) -> str:
    """Of the weights of patch embedding and blocks, and of the type they are cast to."""
    digest = hashlib.blake2b(str(runs_in).encode(), digest_size=16)
    for part in (model.model.visual.patch_embed, model.model.visual.blocks):
        for name, weight in part.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def merged_states(
    visual: Any, grids: Tensor, pixel_values: Tensor | None, shown: Shown
) -> tuple[Tensor, ...]:
    """[merged patches, H] of each image of a batch; those that pass the tower are kept from now on.

    Args:
        visual: the frozen tower with its merger.
        grids: [images, 3] of all images. pixel_values: [patches, values] of the unseen ones, in their order.
    """
    sizes = [(frames, rows, columns) for frames, rows, columns in grids.tolist()]
    counts = [frames * rows * columns for frames, rows, columns in sizes]
    unseen = shown.unseen
    pixels = [] if pixel_values is None else pixel_values.split([counts[number] for number in unseen])
    found = {number: state.values for number, state in enumerate(shown.states) if state is not None}
    for number, values in zip(unseen, pixels, strict=True):
        with torch.no_grad():
            said = visual(values.type(visual.dtype), grid_thw=grids[number : number + 1]).last_hidden_state
        found[number] = said
        STATES.put(shown.keys[number], State(said.cpu(), sizes[number]))
    states = torch.cat([found[number].to(grids.device) for number in range(len(sizes))])
    merge = visual.spatial_merge_size**2
    return tuple(visual.merger(states).split([count // merge for count in counts]))
