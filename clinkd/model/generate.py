"""Answers for a batch of prompts.

Decisions:
- Prompts are padded on the left and continued with a KV cache by transformers' ``generate``.
- Each distinct image passes the vision tower once, however many prompts ask about it, and each prompt the
  language model once, however many answers it gets: they share its keys and values.
- Every sampling setting is given: a checkpoint's ``generation_config`` (Qwen2-VL's samples with top-k 1 and
  repetition penalty) must not change results behind the protocol's back.
- A seed is set inside a fork of the random state: sampling does not disturb training's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clinkd.data.codec import BoxCodec
from clinkd.model.chat import collate, decode_answer
from clinkd.model.guided import GuidedModel
from clinkd.model.presets import IM_END


def generate_answers(
    model: GuidedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: Tensor,
    image_grid_thw: Tensor,
    image_index: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    num_return_sequences: int = 1,
    alignment: Tensor | None = None,
    relevance: Tensor | None = None,
    seed: int | None = None,
    codecs: Sequence[BoxCodec] | None = None,
) -> list[list[str]]:
    """Answers to B prompts, each about one image or several.

    Args:
        prompts: token ids, as ``chat.encode`` makes them.
        pixel_values: [patches, values] and image_grid_thw: [images, 3] of the distinct images.
        image_index: [vision segments] the images of each prompt, one prompt after the other; mostly one each.
        codecs: how the model spells boxes in the image of each prompt, [B]; None: on the grid.
        do_sample: sample at ``temperature`` from the whole distribution, instead of the likeliest token.
        num_return_sequences: answers per prompt.
        alignment: [B, 1]. relevance: [merged patches over the prompts].

    Returns:
        B lists of ``num_return_sequences`` texts, boxes as ``<box>``.

    Raises:
        ValueError: several answers without sampling (they would be the same), numbers that do not match.
    """
    written = generate_ids(
        model, tokenizer, prompts, pixel_values, image_grid_thw, image_index, max_new_tokens=max_new_tokens,
        do_sample=do_sample, temperature=temperature, num_return_sequences=num_return_sequences,
        alignment=alignment, relevance=relevance, seed=seed,
    )  # fmt: skip
    spelled = codecs or [BoxCodec()] * len(prompts)
    return [
        [decode_answer(tokenizer, ids, codec) for ids in answers]
        for answers, codec in zip(written, spelled, strict=True)
    ]


@torch.no_grad()
def generate_ids(
    model: GuidedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: Tensor | None,
    image_grid_thw: Tensor,
    image_index: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    image_features: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    num_return_sequences: int = 1,
    alignment: Tensor | None = None,
    relevance: Tensor | None = None,
    seed: int | None = None,
    banned: Sequence[int] = (),
) -> list[list[list[int]]]:
    """As :func:`generate_answers`, what was written as token ids: an answer that was cut off lacks its end.

    Args:
        image_features: [merged patches, H] of the distinct images, in the place of ``pixel_values``.
        banned: tokens that are never written.

    Returns:
        B lists of ``num_return_sequences`` answers, each up to and with ``<|im_end|>``.
    """
    if num_return_sequences > 1 and not do_sample:
        raise ValueError("generate: several answers per prompt need do_sample")
    index = _image_numbers(model, prompts, image_index)
    if not len(prompts):
        return []
    device, repeat = model.device, num_return_sequences
    batch = collate([(prompt, ()) for prompt in prompts], tokenizer.pad_token_id, side="left")
    asked: dict[str, Any] = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    training = model.training
    model.eval()
    try:
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            outputs, grids = model.encode_images(
                image_grid_thw.to(device),
                None if pixel_values is None else pixel_values.to(device),
                image_features,
                image_index=index,
            )
            asked |= {
                "image_grid_thw": grids, "mm_encoder_outputs": outputs, "relevance": relevance,
                "alignment": None if alignment is None else alignment.to(device),
            }  # fmt: skip
            written = model.generate(  # type: ignore[misc]
                **(asked if repeat == 1 else _shared(model, asked, repeat)),
                generation_config=_settings(tokenizer, max_new_tokens, do_sample, temperature, banned),
            )
    finally:
        model.train(training)
    answers = _ended(tokenizer, written[:, batch["input_ids"].shape[1] :].tolist())
    return [answers[first : first + repeat] for first in range(0, len(answers), repeat)]


def _image_numbers(
    model: GuidedModel, prompts: Sequence[Sequence[int]], image_index: Tensor | Sequence[int]
) -> Tensor:
    """The image of each vision segment of the prompts, of which there have to be as many."""
    index = torch.as_tensor(image_index, dtype=torch.long)
    shown = sum(list(prompt).count(model.config.vision_start_token_id) for prompt in prompts)
    if len(index) != shown:
        raise ValueError(f"generate: {len(index)} image numbers for {shown} images of the prompts")
    return index


def _ended(tokenizer: Any, written: list[list[int]]) -> list[list[int]]:
    """Each up to and with its end, behind which there is padding."""
    end = tokenizer.convert_tokens_to_ids(IM_END)
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in written]


def _shared(model: GuidedModel, asked: dict[str, Any], repeat: int) -> dict[str, Any]:
    """``generate``'s arguments for ``repeat`` answers to each prompt, which is read once."""
    ids, mask = asked["input_ids"], asked["attention_mask"]
    before = asked | {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
    cache = model.model(**before, use_cache=True).past_key_values
    cache.batch_repeat_interleave(repeat)
    deltas = model.model.rope_deltas  # from positions to lengths: the same with the last token, which is text
    model.model.rope_deltas = deltas.repeat_interleave(repeat, dim=0)
    return {
        "input_ids": ids.repeat_interleave(repeat, dim=0),
        "attention_mask": mask.repeat_interleave(repeat, dim=0),
        "past_key_values": cache,
    }


def _settings(
    tokenizer: Any, max_new_tokens: int, do_sample: bool, temperature: float, banned: Sequence[int]
) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature if do_sample else 1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(banned) or None,
    )
