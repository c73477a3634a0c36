"""Rows of a padded batch in groups of like length: less padding for some more passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling


def length_groups(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Row numbers in groups, each padded to its own longest row, at the least cost.

    The cost of a group is its padded tokens and ``overhead``, what another pass costs in tokens; the best
    split of the rows in order of length is found exactly, in time quadratic in the rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    least, begins = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cost, begin = min((least[at] + (end - at) * longest, at) for at in range(end))
        least.append(cost + overhead)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def hidden_by_groups(
    model: Any,
    groups: list[list[int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    images: dict[str, Any],
    alignment: Tensor | None,
    relevance: Tensor | None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Last hidden states [B, L, H] of rows padded on the right, group by group.

    Args:
        model: a ``GuidedModel``, whose ``forward_hidden`` says what the rest is.
        images: ``mm_encoder_outputs`` and ``image_grid_thw`` of all segments.
    """
    grids, outputs = images["image_grid_thw"], images["mm_encoder_outputs"]["image"].pooler_output
    shown = input_ids.eq(model.config.vision_start_token_id).sum(1).tolist()
    segments = torch.arange(len(grids)).split(shown)  # of each row
    merge = model.config.vision_config.spatial_merge_size
    parts = None if relevance is None else relevance.split((grids.prod(-1) // merge**2).tolist())
    found = []
    for rows in groups:
        length = int(attention_mask[rows].sum(1).max())
        own = [number for row in rows for number in segments[row].tolist()]
        pooled: Any = tuple(outputs[at] for at in own)
        with model.last_layer.only(None if wanted is None else wanted[rows, :length]):
            hidden = model.model(
                input_ids=input_ids[rows, :length],
                attention_mask=attention_mask[rows, :length],
                use_cache=False,
                alignment=None if alignment is None else alignment[rows],
                relevance=None if parts is None else torch.cat([parts[at] for at in own]),
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=pooled)},
                image_grid_thw=grids[own],
            ).last_hidden_state
        found.append(F.pad(hidden, (0, 0, 0, input_ids.shape[1] - length)))
    order = torch.tensor([row for rows in groups for row in rows])
    return torch.cat(found)[order.argsort().to(input_ids.device)]
