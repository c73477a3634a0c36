"""Text in and out of the model: turns as token ids and back.

Decisions:
- The prompt is the tokenizer's own chat template; prompt and answer are tokenized apart, so training sees the
  cut between them just where generation starts.
- Boxes are Qwen2-VL's box tokens in the model, ``<box>`` everywhere else.
- Control tokens that a question or answer spells out (``<|im_end|>``) are broken up with spaces: they stay
  readable, but text cannot end a turn or ask for an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from clinkd.data.boxes import from_qwen, to_qwen
from clinkd.model.presets import IM_END, IMAGE, VISION_END, VISION_START

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a token that is no target."""
_CONTROL = re.compile(r"<\|(\w+)\|>")


def _content(text: str) -> str:
    return to_qwen(_CONTROL.sub(r"<| \1 |>", text))


def prompt_text(tokenizer: Any, question: str) -> str:
    """The turn that asks ``question`` about one image, its place one ``<|image_pad|>``."""
    content = f"{VISION_START}{IMAGE}{VISION_END}{_content(question)}"
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, question: str, answer: str, image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer.

    Args:
        image_tokens: merged patches of the image, t * (h // 2) * (w // 2) of its grid.

    Returns:
        The prompt's ids with the image's place widened to ``image_tokens``, and the answer's, the last of
        them ``<|im_end|>``.

    Raises:
        ValueError: an image without tokens.
    """
    if image_tokens < 1:
        raise ValueError(f"chat: an image of {image_tokens} tokens")
    prompt = prompt_text(tokenizer, question).replace(IMAGE, IMAGE * image_tokens, 1)
    return (
        tokenizer.encode(prompt, add_special_tokens=False),
        tokenizer.encode(_content(answer) + IM_END, add_special_tokens=False),
    )


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of generated ids up to ``<|im_end|>`` or padding: boxes as ``<box>``, no other special tokens."""
    stops = {tokenizer.convert_tokens_to_ids(IM_END), tokenizer.pad_token_id}
    kept = list(map(int, ids))
    end = next((place for place, token in enumerate(kept) if token in stops), len(kept))
    text = tokenizer.decode(kept[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _CONTROL.sub("", from_qwen(text)).strip()


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
