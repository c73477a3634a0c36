"""Conversations as token ids, and several of them in one sequence.

Decisions:
- A document is one conversation: all its images at the beginning of its first question, then questions
  and answers in turn. With one image and one turn it is what ``chat.encode`` gives, token by token: each
  answer is tokenized apart from what stands before and behind it.
- Labels are the answers' tokens alone, each with its ``<|im_end|>``: what a model has to say, and when to
  stop.
- Packed, a document sees no other. The mask comes from positions [4, B, L], whose first axis counts anew
  from 0 in each document (transformers derives a block-causal mask from it when there is no attention
  mask); the other three are the guided rotary positions, which start anew too.
- Padding is a document of its own: no one sees it, and it sees but itself, so no softmax is empty.
- A row of one document is a packed row like any other: packed and padded batches take one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clinkd.model.chat import IGNORED, _content
from clinkd.model.presets import IM_END, IMAGE, VISION_END, VISION_START

if TYPE_CHECKING:
    from torch import Tensor

    from clinkd.data.scores import Score
    from clinkd.model.rope import RopeGuidance


@dataclass(frozen=True)
class Document:
    """One conversation.

    Args:
        ids, labels: of one length; labels are the ids themselves where an answer stands, else -100.
        images: which images of the batch it is about, in the order of its vision segments.
        score: the guide's, of images and questions, where the guidance wants it.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    images: tuple[int, ...] = ()
    score: Score | None = None


def encode_conversation(
    tokenizer: Any, turns: Sequence[tuple[str, str]], image_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation.

    Args:
        turns: (question, answer), at least one.
        image_tokens: merged patches of each image; none: a conversation about no image.

    Raises:
        ValueError: no turn, an image without tokens, or a chat template that rewrites earlier turns.
    """
    if not turns or any(count < 1 for count in image_tokens):
        raise ValueError(f"conversation: {len(turns)} turns, images of {list(image_tokens)} tokens")
    ids: list[int] = []
    labels: list[int] = []
    messages: list[dict[str, str]] = []
    said = ""
    for number, (question, answer) in enumerate(turns):
        opening = "" if number else f"{VISION_START}{IMAGE}{VISION_END}" * len(image_tokens)
        messages.append({"role": "user", "content": opening + _content(question)})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not text.startswith(said):
            raise ValueError(
                "conversation: the chat template rewrites earlier turns; it cannot be trained on"
            )
        piece = text[len(said) :]
        if not number:
            piece = _widen(piece, image_tokens)
        asked = tokenizer.encode(piece, add_special_tokens=False)
        answered = tokenizer.encode(_content(answer) + IM_END, add_special_tokens=False)
        ids += asked + answered
        labels += [IGNORED] * len(asked) + answered
        said = text + _content(answer) + IM_END
        messages.append({"role": "assistant", "content": _content(answer)})
    return ids, labels


def _widen(text: str, image_tokens: Sequence[int]) -> str:
    """Each image's place as wide as the image; no other text can hold the token (see ``chat``)."""
    before, *rest = text.split(IMAGE)
    return before + "".join(IMAGE * count + after for count, after in zip(image_tokens, rest, strict=True))


def pack_documents(rows: Sequence[Sequence[Document]], pad_id: int) -> dict[str, Tensor]:
    """Documents side by side, one sequence a row, padded on the right.

    Returns:
        ``input_ids`` and ``labels`` (not shifted; -100 at each document's first token, which no document
        before it may predict), ``documents`` (1, 2, … within a row, 0 at padding), all int64 [B, L], and
        ``image_index`` [vision segments] of all documents in their order.
    """
    import torch

    length = max(sum(len(document.ids) for document in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    documents = torch.zeros_like(input_ids)
    images: list[int] = []
    for number, row in enumerate(rows):
        at = 0
        for place, document in enumerate(row):
            end = at + len(document.ids)
            input_ids[number, at:end] = torch.tensor(document.ids)
            labels[number, at:end] = torch.tensor(document.labels)
            labels[number, at] = IGNORED
            documents[number, at:end] = place + 1
            images += document.images
            at = end
    index = torch.tensor(images, dtype=torch.long)
    return {"input_ids": input_ids, "labels": labels, "documents": documents, "image_index": index}


def packed_positions(
    input_ids: Tensor,
    documents: Tensor,
    image_grid_thw: Tensor,
    *,
    guidance: RopeGuidance,
    image_token_id: int,
    vision_start_token_id: int,
    spatial_merge_size: int = 2,
    alignment: Tensor | None = None,
    relevance: Tensor | None = None,
) -> Tensor:
    """Positions of packed documents.

    Args:
        input_ids, documents: [B, L], as ``pack_documents`` gives them.
        image_grid_thw: [vision segments, 3], in the order of the documents (not of distinct images).
        alignment: [vision segments], for the mode "pair". relevance: [merged patches over the segments], for
            the mode "patch".

    Returns:
        float32 [4, B, L]: text positions, from 0 in each document and in the padding; then the guided axes
        time, height, width, 0 at padding.

    Raises:
        ValueError: see ``guided_rope_index``.
    """
    import torch

    from clinkd.model.rope import guided_rope_index

    guided, _ = guided_rope_index(
        input_ids,
        image_grid_thw if len(image_grid_thw) else None,
        # Two documents at least, or a row of one would be read as a plain mask; the numbers only need differ.
        torch.where(documents > 0, documents + 1, 0),
        guidance=guidance,
        image_token_id=image_token_id,
        vision_start_token_id=vision_start_token_id,
        spatial_merge_size=spatial_merge_size,
        alignment=alignment,
        relevance=relevance,
    )
    place = torch.arange(documents.shape[1]).expand(documents.shape)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    text = place - torch.where(starts, place, 0).cummax(1).values
    return torch.cat([text[None].float(), guided])
