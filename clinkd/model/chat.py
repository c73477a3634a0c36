"""Text in and out of the model: turns as token ids and back.

Decisions:
- The prompt is the tokenizer's own chat template; prompt and answer are tokenized apart, so training sees the
  cut between them just where generation starts.
- Boxes are Qwen's box tokens in the model, ``<box>`` everywhere else; the unit inside (Qwen2-VL's grid, or
  Qwen2.5-VL's pixels) is the codec's, and the grid where none is given.
- All images of a record stand, in their order, in front of the question.
- Control tokens that a question or answer spells out (``<|im_end|>``) are broken up with spaces: they stay
  readable, but text cannot end a turn or ask for an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from clinkd.data.codec import BoxCodec
from clinkd.model.presets import IM_END, IMAGE, VISION_END, VISION_START

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a token that is no target."""
_CONTROL = re.compile(r"<\|(\w+)\|>")
_GRID = BoxCodec()


def _content(text: str, codec: BoxCodec = _GRID) -> str:
    return codec.encode(_CONTROL.sub(r"<| \1 |>", text))


def prompt_text(tokenizer: Any, question: str, images: int = 1, codec: BoxCodec = _GRID) -> str:
    """The turn that asks ``question`` about ``images`` images, the place of each one ``<|image_pad|>``."""
    content = f"{VISION_START}{IMAGE}{VISION_END}" * images + _content(question, codec)
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(
    tokenizer: Any,
    question: str,
    answer: str,
    image_tokens: int | Sequence[int],
    codec: BoxCodec = _GRID,
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer.

    Args:
        image_tokens: merged patches of the image, t * (h // 2) * (w // 2) of its grid; or of each image.
        codec: how the model spells boxes in this image.

    Returns:
        The prompt's ids with each image's place as wide as the image, and the answer's, the last of them
        ``<|im_end|>``.

    Raises:
        ValueError: no image, or an image without tokens.
    """
    counts = [image_tokens] if isinstance(image_tokens, int) else list(image_tokens)
    if not counts or min(counts) < 1:
        raise ValueError(f"chat: an image of {min(counts, default=0)} tokens")
    # No text can hold the image token (see ``_content``), so the places are the images' alone.
    before, *rest = prompt_text(tokenizer, question, len(counts), codec).split(IMAGE)
    prompt = before + "".join(IMAGE * count + text for count, text in zip(counts, rest, strict=True))
    return (
        tokenizer.encode(prompt, add_special_tokens=False),
        tokenizer.encode(_content(answer, codec) + IM_END, add_special_tokens=False),
    )


def decode_answer(tokenizer: Any, ids: Sequence[int], codec: BoxCodec = _GRID) -> str:
    """Text of generated ids up to ``<|im_end|>`` or padding: boxes as ``<box>``, no other special tokens."""
    stops = {tokenizer.convert_tokens_to_ids(IM_END), tokenizer.pad_token_id}
    kept = list(map(int, ids))
    end = next((place for place, token in enumerate(kept) if token in stops), len(kept))
    text = tokenizer.decode(kept[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _CONTROL.sub("", codec.decode(text)).strip()


def collate(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """A batch of (prompt ids, answer ids).

    Returns:
        ``input_ids``, ``attention_mask`` (1 = token, 0 = padding) and ``labels`` (the ids themselves, not
        shifted; -100 at prompt and padding), all int64 [B, L], padded on ``side``.
    """
    import torch

    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for number, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        first = length - size if side == "left" else 0
        input_ids[number, first : first + size] = torch.tensor([*prompt, *answer])
        attention_mask[number, first : first + size] = 1
        labels[number, first + len(prompt) : first + size] = torch.tensor(list(answer), dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
