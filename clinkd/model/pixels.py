"""Qwen2-VL's image processing in two halves: uint8 patches where images are decoded, numbers where they are
used.

Decisions:
- Between the halves travels what the image holds, not what the tower wants: bytes instead of floats, no
  second copy for the temporal patch, one channel where red, green and blue are the same, as they mostly
  are in medical images. That is an eighth to a 24th of the processor's output.
- The numbers are the processor's to float32 rounding: the same resize (PIL, bicubic, in uint8), then one
  multiply and add per channel instead of two. Resizing works on each channel for itself, so one stands
  for three equal ones.
- Where the processor is set up for other steps, or runs on another backend than PIL, it does the whole
  work itself and its floats travel.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clinkd.data.codec import smart_resize


def load_processor(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The image processor of a model's folder, with these limits of the resized area where they are given.

    Raises:
        ValueError: ``min_pixels`` above ``max_pixels``, given or the folder's.
    """
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    size = {"shortest_edge": processor.size["shortest_edge"], "longest_edge": processor.size["longest_edge"]}
    if min_pixels is not None:
        size["shortest_edge"] = min_pixels
    if max_pixels is not None:
        size["longest_edge"] = max_pixels
    if min_pixels is None and max_pixels is None:
        return processor
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"model.min_pixels {size['shortest_edge']} is above model.max_pixels {size['longest_edge']} "
            f"(what is not configured comes from {path}/preprocessor_config.json)"
        )
    return AutoImageProcessor.from_pretrained(path, size=size, backend="pil")


@dataclass(frozen=True)
class Patches:
    """An image cut into patches: [patches, C, side, side] uint8, C 1 or 3, or the processor's own float32
    [patches, values]; and its grid (frames, rows, columns)."""

    values: np.ndarray
    grid: tuple[int, int, int]


def cut(processor: Any, content: bytes) -> Patches:
    """An encoded image, resized and cut as ``processor`` does.

    Raises:
        OSError, ValueError: no image, or one of an impossible shape.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    if not _by_halves(processor):
        found = processor(images=image.convert("RGB"), return_tensors="np")
        rows, columns = (int(side) for side in found["image_grid_thw"][0][1:])
        return Patches(found["pixel_values"], (1, rows, columns))
    image = _one_channel(image)
    side, merge = processor.patch_size, processor.merge_size
    height, width = resized(processor, image.height, image.width)
    pixels = np.asarray(image.resize((width, height), processor.resample))
    rows, columns = height // side, width // side
    shape = (rows // merge, merge, side, columns // merge, merge, side, -1)
    # [rows / merge, columns / merge, merge, merge, C, side, side]: merged patches stand together.
    patches = pixels.reshape(shape).transpose(0, 3, 1, 4, 6, 2, 5)
    return Patches(np.ascontiguousarray(patches).reshape(rows * columns, -1, side, side), (1, rows, columns))


def _by_halves(processor: Any) -> bool:
    steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    return processor.backend == "pil" and all(getattr(processor, step) for step in steps)


def _one_channel(image: Any) -> Any:
    """A picture in grey as one channel, if it is one."""
    if image.mode == "L":
        return image
    red, green, blue = image.split()
    first = red.tobytes()
    return red if first == green.tobytes() and first == blue.tobytes() else image


def resized(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width after the processor's resize; works on the image's size alone."""
    return smart_resize(
        height,
        width,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
    )


def image_tokens(processor: Any, height: int, width: int) -> int:
    """Tokens that an image of this size takes in the language model."""
    high, wide = resized(processor, height, width)
    return high * wide // (processor.patch_size * processor.merge_size) ** 2


def blank(processor: Any) -> Patches:
    """The smallest image there is: one token, all black."""
    side, merge = processor.patch_size, processor.merge_size
    if _by_halves(processor):
        return Patches(np.zeros((merge**2, 1, side, side), np.uint8), (1, merge, merge))
    values = 3 * processor.temporal_patch_size * side**2
    return Patches(np.zeros((merge**2, values), np.float32), (1, merge, merge))


def join(images: list[Patches]) -> dict[str, np.ndarray]:
    """``pixels`` (flat, uint8 or float32), ``channels`` [images] (0: floats as they are), and
    ``image_grid_thw`` [images, 3]."""
    whole = images[0].values.dtype != np.uint8  # the processor decides, so for all or none
    return {
        "pixels": np.concatenate([image.values.reshape(-1) for image in images]),
        "channels": np.array([0 if whole else image.values.shape[1] for image in images], np.int64),
        "image_grid_thw": np.array([image.grid for image in images], np.int64),
    }


class Numbers:
    """The second half: pixel values as the vision tower takes them."""

    def __init__(self, processor: Any, device: torch.device | str = "cpu") -> None:
        self.side, self.frames = processor.patch_size, processor.temporal_patch_size
        std = torch.tensor(processor.image_std, dtype=torch.float64)
        mean = torch.tensor(processor.image_mean, dtype=torch.float64)
        self.scale = (processor.rescale_factor / std).float().view(1, 3, 1, 1, 1).to(device)
        self.shift = (-mean / std).float().view(1, 3, 1, 1, 1).to(device)
        self.device = device

    def parts(self, pixels: np.ndarray, channels: np.ndarray, image_grid_thw: np.ndarray) -> list[np.ndarray]:
        """The pixels of each image, as they stand in ``join``'s."""
        values = np.where(channels > 0, channels * self.side**2, 3 * self.frames * self.side**2)
        return np.split(pixels, np.cumsum(image_grid_thw.prod(1) * values)[:-1])

    def __call__(self, pixels: np.ndarray, channels: np.ndarray, image_grid_thw: np.ndarray) -> Tensor:
        """float32 [patches, 3 * frames * side * side] of all images, on the device."""
        counts = image_grid_thw.prod(1).tolist()
        values = 3 * self.frames * self.side**2
        if not channels.all():
            return torch.from_numpy(pixels.copy()).view(-1, values).to(self.device)
        found = torch.empty(sum(counts), 3, self.frames, self.side, self.side, device=self.device)
        given = torch.from_numpy(pixels.copy()).to(
            self.device
        )  # a copy: torch warns of what it may not write
        taken = patch = 0
        for count, depth in zip(counts, channels.tolist(), strict=True):
            size = count * depth * self.side**2
            part = given[taken : taken + size].view(count, depth, 1, self.side, self.side)
            found[patch : patch + count] = torch.mul(part.float(), self.scale).add_(self.shift)
            taken, patch = taken + size, patch + count
        return found.view(-1, values)
