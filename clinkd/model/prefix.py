"""Two savings in a training pass that leave what is learned from as it was.

Decisions:
- Questions about one image begin alike, with the image: where nothing in the positions depends on the
  question, that beginning runs through the text model once, and each question goes on from its keys and
  values, through which gradients flow back.
- Of the last layer's states only those before answer tokens are looked at. Keys and values there are wanted
  of all tokens; queries, outputs and the MLP of these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clinkd.model.rows import length_groups


class LastLayer:
    """Has the position-wise parts of a decoder layer work on some positions, and give 0 elsewhere.

    Held by hooks as bound methods, so that a copy of the model has its own.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._places: Tensor | None = None  # of the flattened batch
        self._shapes: list[torch.Size] = []
        parts: list[Any] = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]  # type: ignore[union-attr]
        for part in parts:
            part.register_forward_pre_hook(self._take)
            part.register_forward_hook(self._put)

    @contextmanager
    def only(self, wanted: Tensor | None) -> Iterator[None]:
        """``wanted`` [B, L]: the positions whose states count in the passes inside; None: all."""
        self._places = None if wanted is None else wanted.flatten().nonzero()[:, 0]
        try:
            yield
        finally:
            self._places = None

    def _take(self, part: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._places is None:
            return None
        self._shapes.append(arguments[0].shape)
        return (arguments[0].flatten(0, -2)[self._places],)

    def _put(self, part: nn.Module, arguments: tuple[Tensor, ...], made: Tensor) -> Tensor | None:
        if self._places is None:
            return None
        shape = self._shapes.pop()[:-1]
        whole = made.new_zeros(shape.numel(), made.shape[-1])
        return whole.index_copy(0, self._places, made).view(*shape, -1)


def prefix_lengths(input_ids: Tensor, image_token: int) -> list[int]:
    """Tokens of each row up to its last image's last; 0 without an image."""
    found = input_ids.eq(image_token)
    behind = found.flip(1).int().argmax(1)
    return torch.where(found.any(1), input_ids.shape[1] - behind, 0).tolist()


def alike(input_ids: Tensor, prefixes: Sequence[int], shown: Sequence[tuple[int, ...]]) -> list[int]:
    """Of each row the first row that begins as it does, with the same images ``shown``."""
    first: dict[Any, int] = {}
    found = []
    for row, (ids, length) in enumerate(zip(input_ids.tolist(), prefixes, strict=True)):
        found.append(first.setdefault((shown[row], tuple(ids[:length])), row))
    return found


def hidden_by_prefix(
    model: Any,
    same: Sequence[int],
    prefixes: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor,
    images: dict[str, Any],
    wanted: Tensor,
    overhead: int,
) -> Tensor:
    """Last hidden states [B, L, H] behind the images of rows padded on the right; 0 elsewhere.

    Args:
        model: an unguided ``GuidedModel``, whose ``forward_hidden`` says what the rest is.
        same: of each row the first that begins alike. prefixes: tokens of the beginnings, all above 0.
        images: ``mm_encoder_outputs`` and ``image_grid_thw`` of all segments.
    """
    device, (count, length) = input_ids.device, input_ids.shape
    grids = images["image_grid_thw"]
    positions, _ = model.model.get_rope_index(
        input_ids, image_grid_thw=grids, attention_mask=attention_mask
    )  # fmt: skip
    firsts = sorted(set(same))
    cache, seen = _beginnings(model, firsts, prefixes, input_ids, positions, images)
    lengths = attention_mask.sum(1).tolist()
    behind = [whole - start for whole, start in zip(lengths, prefixes, strict=True)]
    begins = torch.tensor(prefixes, device=device)
    place = {row: at for at, row in enumerate(firsts)}
    result: Tensor | None = None
    for rows in length_groups(behind, overhead):
        longest = max(behind[row] for row in rows)
        at = torch.tensor(rows, device=device)
        columns = begins[at, None] + torch.arange(longest, device=device)
        there = columns < attention_mask.sum(1)[at, None]
        columns = columns.clamp(max=length - 1)
        which = torch.tensor([place[same[row]] for row in rows], device=device)
        with model.last_layer.only(wanted[at[:, None], columns] & there):
            hidden = model.model(
                input_ids=input_ids[at[:, None], columns],
                attention_mask=torch.cat([seen[which], there.to(seen.dtype)], 1),
                position_ids=positions[:, at[:, None], columns],
                past_key_values=_copied(cache, which),
                use_cache=True,
            ).last_hidden_state
        if result is None:
            result = hidden.new_zeros(count, length, hidden.shape[-1])
        result = result.index_put((at[:, None].expand_as(columns)[there], columns[there]), hidden[there])
    assert result is not None
    return result


def _beginnings(
    model: Any,
    firsts: Sequence[int],
    prefixes: Sequence[int],
    input_ids: Tensor,
    positions: Tensor,
    images: dict[str, Any],
) -> tuple[Any, Tensor]:
    """Keys and values of the beginnings of the rows ``firsts``, and which of them are there [rows, P]."""
    grids, outputs = images["image_grid_thw"], images["mm_encoder_outputs"]["image"].pooler_output
    shown = input_ids.eq(model.config.vision_start_token_id).sum(1).tolist()
    segments = torch.arange(len(grids)).split(shown)
    own = [number for row in firsts for number in segments[row].tolist()]
    rows = torch.tensor(firsts, device=input_ids.device)
    lengths = torch.tensor([prefixes[row] for row in firsts], device=input_ids.device)
    longest = int(lengths.max())
    seen = (torch.arange(longest, device=input_ids.device) < lengths[:, None]).long()
    cache = DynamicCache()
    pooled: Any = tuple(outputs[number] for number in own)
    with model.last_layer.only(torch.zeros_like(seen, dtype=torch.bool)):
        model.model(
            input_ids=input_ids[rows, :longest],
            attention_mask=seen,
            position_ids=positions[:, rows, :longest],
            past_key_values=cache,
            use_cache=True,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=pooled)},
            image_grid_thw=grids[own],
        )
    return cache, seen


def _copied(cache: Any, which: Tensor) -> Any:
    """The cache's rows ``which``, in a cache of their own that can grow."""
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys[which], layer.values[which], number)
    return copy
