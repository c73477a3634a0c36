"""Guided rotary positions: where each token stands on the (time, height, width) axes.

Decisions:
- A token's increment is what it adds to *the position the next text token would take*: 1 for text, the
  segment's advance for a vision segment, 0 for padding. One cumulative sum along the row then places all
  text, and vision tokens hang from their segment's corner. No loop over tokens, rows or images; padding
  anywhere needs no special case.
- Coordinates are worked out for lines (an image's rows and columns) and only then dealt out to tokens.
- Which image a token belongs to follows from counting image tokens in order, so images that touch are told
  apart.
- Sums run in float64 over increments rounded to 2**-24. They are exact whatever the order of summation, hence
  a row alone, in a batch or packed behind others gets the same bits, on any device. The rounding is below
  float32's own from position 1 upwards.
- Deltas are float64: `text position + delta`, cast to float32 *after* the sum, continues a cached generation
  bit for bit.
- Row r's step (patch guidance) is the one that leads from row r-1 to row r: row 0 stays at the gap whatever
  the guide says.
- A vision segment directly behind another one starts from the largest coordinate of that one as its p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["none", "pair", "patch"]

QUANTUM = 2.0**-24
# Patch guidance never shrinks a row's step below this share of alpha: however strong gamma, the axes stay
# strictly increasing (in float32 too, up to 2**17 positions at alpha = 1).
SMALLEST_STEP = 1 / 64


@dataclass(frozen=True)
class RopeGuidance:
    """How vision segments are laid out beside text.

    Args:
        lambda_h, lambda_w: gap between text and vision on the height and width axis, in text positions (> 0).
            The time axis takes their mean.
        alpha_h, alpha_w: step between neighbouring rows and columns, in text positions (> 0).
        gamma: strength of the Med-CLIP guidance (>= 0); 0 switches it off.
        mode: "none"; "pair" widens the gap of images that do not fit their question; "patch" stretches the
            rows and columns the guide looks at.

    Raises:
        ValueError: a value that is not finite or out of its range, an unknown mode.
    """

    lambda_h: float = 1.0
    lambda_w: float = 1.0
    alpha_h: float = 1.0
    alpha_w: float = 1.0
    gamma: float = 0.0
    mode: Mode = "none"

    def __post_init__(self) -> None:
        for name in ("lambda_h", "lambda_w", "alpha_h", "alpha_w"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"rope guidance: {name} must be a finite number above 0, not {value}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"rope guidance: gamma must be a finite number of at least 0, not {self.gamma}")
        if self.mode not in get_args(Mode):
            known = ", ".join(get_args(Mode))
            raise ValueError(f"rope guidance: mode must be one of {known}, not {self.mode!r}")

    @property
    def guided(self) -> str:
        """The mode that takes effect: "none" when gamma is 0."""
        return self.mode if self.gamma > 0 else "none"


@dataclass
class _Vision:
    """M vision tokens in S segments (images, then videos).

    A line is one row of one frame. Flat rows and flat columns are those of all segments, numbered through.
    """

    index: Tensor  # [M] place in the flat batch
    line: Tensor  # [M] the token's line
    column: Tensor  # [M] the token's flat column
    frame: Tensor  # [lines] frame within the segment
    row: Tensor  # [lines] flat row
    segment: Tensor  # [lines]
    size: Tensor  # [S, 3] frames, rows, columns after merging
    first: Tensor  # [S] flat place of the segment's first token
    last: Tensor  # [S]


def guided_rope_index(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    guidance: RopeGuidance,
    image_token_id: int,
    vision_start_token_id: int,
    spatial_merge_size: int = 2,
    video_token_id: int | None = None,
    video_grid_thw: Tensor | None = None,
    alignment: Tensor | None = None,
    relevance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary positions of a batch under ``guidance``.

    With lambda = alpha = 1 and gamma = 0 this is M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1); lambda = 2
    is ClinKD's released code.

    Args:
        input_ids: [B, L] integers.
        image_grid_thw: [images, 3] frames, rows, columns *before* merging, in the order of the images in the
            batch.
        attention_mask: [B, L]; 0 is padding (left, right or anywhere). Values above 1 number the documents of
            a packed row: positions start anew at each.
        vision_start_token_id: counted for the message when tokens and grids disagree.
        alignment: Med-CLIP alignment of image and question in [0, 1], for mode "pair": [images], or one per
            row as [B] or [B, 1]. With as many images as rows, [B] is read per image, [B, 1] per row. Videos
            take their row's score, and none (unguided) where scores come per image.
        relevance: [merged image patches] patch-text relevance in [0, 1] in the order of the image tokens, for
            mode "patch". Videos stay unguided.

    Returns:
        position_ids: float32 [3, B, L], axes time, height, width; 0 at padding, as transformers 5.23 has it.
        rope_deltas: float64 [B, 1], position of the next text token (of the last document, in a packed row)
            minus the row's number of tokens that are not padding. Add it to the text position, then cast to
            float32.

    Raises:
        ValueError: vision tokens do not match the grids, or the guide's scores are missing, of the wrong
            number or out of [0, 1].
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(attention_mask.shape)} for input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"rope index: attention_mask {shapes}")
    kept, step, start = _layout(input_ids, attention_mask)
    rank = step.cumsum(1)  # 1 at a row's first token that is kept
    kinds = ((image_token_id, image_grid_thw), (video_token_id, video_grid_thw))
    merge, marker = spatial_merge_size, vision_start_token_id
    parts = [_vision(input_ids, kept, token, grid, merge, marker) for token, grid in kinds]
    images = 0 if parts[0] is None else len(parts[0].size)
    vision = _join([part for part in parts if part is not None])
    if vision is not None:
        _check_whole(vision, rank, start)
        gaps = _gaps(guidance, alignment, vision, images, input_ids.shape)
        rows, columns, extent = _lines(guidance, relevance, vision, images)
        lead, before, advance = _chain(vision, rank, start, gaps, extent)
        step.view(-1)[vision.index] = 0
        step.view(-1)[vision.first] = advance

    text = step.cumsum(1).sub_(step)
    if start is not None:
        origin = torch.where(start, torch.arange(text.shape[1], device=text.device), 0).cummax(1).values
        text -= text.gather(1, origin)
    deltas = text[:, -1:] + step[:, -1:] - rank[:, -1:]
    positions = text.float().expand(3, -1, -1).contiguous()
    if kept is not None:
        positions.masked_fill_(~kept, 0)
    if vision is not None:
        corner = text.view(-1)[vision.first] - before + lead  # [3, S]
        time = (corner[0][vision.segment] + vision.frame).float().index_select(0, vision.line)
        height = (corner[1].repeat_interleave(vision.size[:, 1]) + rows).float()[vision.row]
        height = height.index_select(0, vision.line)
        width = (corner[2].repeat_interleave(vision.size[:, 2]) + columns).float()
        width = width.index_select(0, vision.column)
        for axis, coordinate in enumerate((time, height, width)):
            positions[axis].view(-1).index_copy_(0, vision.index, coordinate)
    return positions, deltas


def _layout(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What is padding and where documents begin.

    Returns:
        kept: bool [B, L], None when there is no mask.
        step: float64 [B, L], 1 where a token is kept.
        start: bool [B, L], first tokens of packed documents; None when each row is one document.
    """
    if attention_mask is None:
        return None, torch.ones_like(input_ids, dtype=torch.float64), None
    kept = attention_mask != 0
    step = kept.double()
    if attention_mask.dtype == torch.bool or not bool((attention_mask > 1).any()):
        return kept, step, None
    place = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    latest = torch.where(kept, place, -1).cummax(1).values  # the kept token at or before each place
    previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    other = attention_mask.gather(1, previous.clamp(min=0)) != attention_mask
    return kept, step, kept & ((previous < 0) | other)


def _numbered(counts: Tensor, total: int | None = None) -> Tensor:
    """[2, 3] -> [0, 0, 1, 1, 1]."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)


def _before(counts: Tensor) -> Tensor:
    """Exclusive cumulative sum."""
    return counts.cumsum(0) - counts


def _vision(
    input_ids: Tensor, kept: Tensor | None, token_id: int | None, grid: Tensor | None, merge: int, marker: int
) -> _Vision | None:
    """Tokens of one kind, dealt out to their grids; None when there are none."""
    if token_id is None:
        if grid is not None and len(grid):
            raise ValueError("rope index: a video grid, but no video_token_id")
        return None
    hit = input_ids == token_id
    if kept is not None:
        hit &= kept
    index = hit.view(-1).nonzero().squeeze(1)
    size = index.new_empty(0, 3) if grid is None else grid.to(index.device, torch.long)
    size = torch.stack([size[:, 0], size[:, 1] // merge, size[:, 2] // merge], dim=1)
    count = size.prod(1)
    if int(count.sum()) != len(index) or bool((count < 1).any()):
        raise ValueError(
            f"rope index: {len(index)} vision tokens (id {token_id}) not padded, but {len(size)} grids ask "
            f"for {int(count.sum())}; the batch has {int((input_ids == marker).sum())} vision starts. "
            "Was a sequence cut inside an image, or the image processed with other pixel limits?"
        )
    if len(index) == 0:
        return None
    frames, rows, columns = size.unbind(1)
    segment = _numbered(frames * rows)
    local = torch.arange(len(segment), device=index.device) - _before(frames * rows)[segment]
    frame = local // rows[segment]
    row = local - frame * rows[segment] + _before(rows)[segment]
    line = _numbered(columns[segment], len(index))
    shift = _before(columns)[segment] - _before(columns[segment])
    column = torch.arange(len(index), device=index.device) + shift.index_select(0, line)
    first = index[_before(count)]
    return _Vision(index, line, column, frame, row, segment, size, first, index[count.cumsum(0) - 1])


def _join(parts: list[_Vision]) -> _Vision | None:
    """Images and videos as one list of segments, images first."""
    if len(parts) < 2:
        return parts[0] if parts else None
    images, videos = parts
    videos.line = videos.line + len(images.segment)
    videos.segment = videos.segment + len(images.size)
    videos.row = videos.row + images.size[:, 1].sum()
    videos.column = videos.column + images.size[:, 2].sum()
    names = [field.name for field in fields(_Vision)]
    return _Vision(*(torch.cat([getattr(images, name), getattr(videos, name)]) for name in names))


def _check_whole(vision: _Vision, rank: Tensor, start: Tensor | None) -> None:
    """Each segment's tokens must stand together in one row and one document."""
    length, ranks = rank.shape[1], rank.view(-1)
    whole = vision.first // length == vision.last // length
    whole &= ranks[vision.last] - ranks[vision.first] == vision.size.prod(1) - 1
    if start is not None:
        document = start.view(-1).cumsum(0)
        whole &= document[vision.first] == document[vision.last]
    if not bool(whole.all()):
        number = int((~whole).nonzero()[0])
        raise ValueError(
            f"rope index: the tokens of vision segment {number} (merged grid {vision.size[number].tolist()}) "
            "do not stand together; are the grids in the order of the images in the batch?"
        )


def _round(value: Tensor) -> Tensor:
    return (value / QUANTUM).round() * QUANTUM


def _gaps(
    guidance: RopeGuidance, alignment: Tensor | None, vision: _Vision, images: int, shape: torch.Size
) -> Tensor:
    """Gap [3, S] (time, height, width) of each segment: lambda, guided by pair * (1 + gamma * (1 - s))."""
    device = vision.index.device
    high, wide = guidance.lambda_h, guidance.lambda_w
    gaps = torch.tensor([[(high + wide) / 2], [high], [wide]], dtype=torch.float64, device=device)
    if guidance.guided != "pair":
        return _round(gaps).expand(3, len(vision.size))
    if alignment is None:
        raise ValueError("rope index: mode pair needs the alignment scores of the stage guide")
    scores = alignment.detach().to(device, torch.float64)
    _check_scores(scores, "alignment")
    if scores.ndim == 1 and len(scores) == images:
        scores = torch.nn.functional.pad(scores, (0, len(vision.size) - images), value=1.0)
    elif scores.shape in ((shape[0],), (shape[0], 1)):
        scores = scores.reshape(-1)[vision.first // shape[1]]
    else:
        raise ValueError(
            f"rope index: alignment {tuple(scores.shape)} for {images} images in {shape[0]} rows; "
            "give one score per image or per row"
        )
    return _round(gaps * (1 + guidance.gamma * (1 - scores)))


def _lines(
    guidance: RopeGuidance, relevance: Tensor | None, vision: _Vision, images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets of the flat rows and flat columns from their segment's first corner, and the extents [3, S]."""
    scores = _patch_scores(relevance, vision, images) if guidance.guided == "patch" else None
    patches = vision.size.prod(1)
    extents = [vision.size[:, 0].double() - 1]
    tables = []
    row = vision.row[vision.line] if scores is not None else vision.row
    for place, count, alpha in (
        (row, vision.size[:, 1], guidance.alpha_h),
        (vision.column, vision.size[:, 2], guidance.alpha_w),
    ):
        owner = _numbered(count)
        first = _before(count)
        if scores is None:
            number = torch.arange(len(owner), device=owner.device) - first[owner]
            table = _round(number.double() * alpha)
        else:
            # Line r's step is alpha * (1 + gamma * (rho_r - mean rho)), rho_r the mean relevance of its
            # patches.
            rho = scores.new_zeros(len(owner)).index_add_(0, place, scores) / (patches // count)[owner]
            mean = scores.new_zeros(len(count)).index_add_(0, owner, rho) / count
            step = alpha * (1 + guidance.gamma * (rho - mean[owner])).clamp(min=SMALLEST_STEP)
            reached = _round(step).cumsum(0)
            table = reached - reached[first][owner]
        tables.append(table)
        extents.append(table[first + count - 1])
    return tables[0], tables[1], torch.stack(extents)


def _patch_scores(relevance: Tensor | None, vision: _Vision, images: int) -> Tensor:
    """Relevance [M]; a video's tokens get a constant, which leaves its steps as they are."""
    if relevance is None:
        raise ValueError("rope index: mode patch needs the patch relevance of the stage guide")
    wanted = int(vision.size[:images].prod(1).sum())
    if relevance.numel() != wanted:
        given = relevance.numel()
        raise ValueError(f"rope index: {given} relevance scores for {wanted} merged image patches")
    scores = relevance.detach().to(vision.index.device, torch.float64).reshape(-1)
    _check_scores(scores, "relevance")
    return torch.nn.functional.pad(scores, (0, len(vision.index) - wanted))


def _check_scores(scores: Tensor, name: str) -> None:
    if not bool(((scores >= 0) & (scores <= 1)).all()):  # also catches NaN
        raise ValueError(f"rope index: {name} scores must lie in [0, 1]; calibrate them first")


def _chain(
    vision: _Vision, rank: Tensor, start: Tensor | None, gaps: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How segments hook into the row.

    Returns:
        lead [3, S]: gap to the segment's first corner, 0 for one that opens its document.
        before [S]: from the position p in front of the segment to the one that text would take there.
        advance [S]: what the segment adds to the position of the next text.
    """
    length, ranks = rank.shape[1], rank.view(-1)
    opens = ranks[vision.first] == 1 if start is None else start.view(-1)[vision.first]
    exit_gap = gaps[1:].amax(0)
    # Segments in the order of the batch: does one touch the one in front of it?
    order = vision.first.argsort()
    first, last = vision.first[order][1:], vision.last[order][:-1]
    touches = (ranks[first] - ranks[last] == 1) & (first // length == last // length) & ~opens[order][1:]
    before = torch.ones_like(exit_gap)
    before[order[1:]] = torch.where(touches, exit_gap[order][:-1], 1.0)
    before = torch.where(opens, 0.0, before)
    lead = torch.where(opens, 0.0, gaps)
    return lead, before, (lead + extent).amax(0) + exit_gap - before
