"""What contrastive encoders share: unit vectors, a scale and a bias, dense features beside the pooled one.

Decisions:
- A dense feature has to live in the text's space, and only the pooled feature was trained to. Where a class
  token is pooled, MaskCLIP's way (Zhou, Loy and Dai, 2022) brings the patches there: in the last layer each
  token attends to itself alone, so that values, output projection and all that follows stay. Done here by
  giving the layer each patch as a sequence of one: a softmax over one key is one, whatever the layer's
  attention is. Where the tokens themselves are pooled (mean, attention) they are taken as they are, and the
  pooling is given each as a sequence of one.
- Images are stretched to the model's input, never cropped: a centre crop of an image that is not square
  would lay the grid over its middle only, and cell (r, c) would no longer be the part of the image that
  boxes, masks and the answering model's own patches call by that place. On square images this is the
  checkpoint's own preprocessing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.model.encoders import Seen

BATCH = 32


class Views(NamedTuple):
    """A batch of images before it is taken apart."""

    whole: Tensor  # [B, D]
    patches: list[Tensor]  # of each image [rows * columns, D], empty without dense features
    grids: list[tuple[int, int]]


class Contrastive(ABC):
    """An encoder whose logit is scale * cosine + bias; see :class:`clinkd.model.encoders.Encoder`.

    Args:
        model: moved to ``device`` here, once, and never trained.
        width: D. scale, bias: of the logits, as trained.
        no_dense: why there are no dense features, where there are none.
    """

    def __init__(
        self, model: nn.Module, device: str | torch.device, *, width: int, scale: Tensor, bias: Tensor | None,
        no_dense: str = "",
    ) -> None:  # fmt: skip
        self.model = model.eval().requires_grad_(False).to(device)
        self.device, self.width, self.no_dense = torch.device(device), width, no_dense
        self.scale = float(scale.detach().exp())
        self.bias = float(bias.detach()) if bias is not None else 0.0

    @abstractmethod
    def _see(self, images: list[Image]) -> Views:
        """A batch of RGB images."""

    @abstractmethod
    def _read(self, texts: list[str]) -> Tensor:
        """[P, D] of a batch of texts."""

    def images(self, images: Sequence[Image]) -> list[Seen]:
        for number, image in enumerate(images):
            if image.mode != "RGB":
                raise ValueError(f"image {number} is of mode {image.mode}: the guide takes RGB images")
        seen = []
        for start in range(0, len(images), BATCH):
            with torch.inference_mode():
                views = self._see(list(images[start : start + BATCH]))
            for whole, patches, grid in zip(*views, strict=True):
                seen.append(Seen(_unit(whole), _unit(patches), grid))
        return seen

    def texts(self, texts: Sequence[str]) -> Tensor:
        parts = [torch.empty(0, self.width, device=self.device)]
        for start in range(0, len(texts), BATCH):
            with torch.inference_mode():
                read = self._read(list(texts[start : start + BATCH]))
            parts.append(_unit(read))
        return torch.cat(parts)

    def pair_logits(self, seen: Seen, texts: Tensor) -> Tensor:
        return texts @ seen.whole * self.scale + self.bias

    def patch_logits(self, seen: Seen, texts: Tensor) -> Tensor:
        if self.no_dense:
            raise ValueError(f"the guide has no patch features: {self.no_dense}; only whole images compare")
        return seen.patches @ texts.T * self.scale + self.bias


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length one; a copy outside of inference mode, so that callers may fit on it."""
    return F.normalize(vectors.clone().float(), dim=-1)


def one_by_one(layer: Callable[..., Tensor], tokens: Tensor, *rest: Any) -> Tensor:
    """A layer or pooling over [B, N, W] with each token as a sequence of its own: [B, N, ...]."""
    alone = layer(tokens.flatten(0, 1)[:, None], *rest)
    return alone.reshape(*tokens.shape[:2], alone.shape[-1])


class Passage:
    """What went into a layer and what came out of it, [B, N, W] each."""

    into: Tensor
    out: Tensor


@contextmanager
def watched(layer: nn.Module) -> Iterator[Passage]:
    """Keeps the input and output of the forward pass of ``layer`` that happens inside."""
    passage = Passage()

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        passage.into = inputs[0]
        passage.out = output[0] if isinstance(output, tuple) else output

    handle = layer.register_forward_hook(keep)
    try:
        yield passage
    finally:
        handle.remove()
