"""Models made here: tiny Qwen2-VLs with their own tokenizer, for when there is no checkpoint to start from.

Decisions:
- The classes are transformers' own; only sizes differ, so what is learnt here about the code holds
  for 2B and 7B.
- The tokenizer is byte-level BPE made from the training text, so any text can be written; whole numbers are
  one piece where the text repeats them, which makes a box four tokens of content, and so are the chat
  template's words, which stand in every sample. Special tokens are Qwen2-VL's.
- ``rope_theta`` is small: sequences are a few hundred tokens long, and a slow rotation tells nothing there.
- Weights start wider than Qwen2-VL's 0.02, which suits widths of thousands: at a width of 128 it leaves each
  layer's output far below its input, and training idles at first. What else they start with:
  ``first_weights``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL_TOKENS = (
    PAD, IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    VISION_START, VISION_END, "<|vision_pad|>", IMAGE, "<|video_pad|>",
)  # fmt: skip

# Qwen2-VL's turns without a system prompt: at this size every token counts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = "user\nassistant\n"
# Words with their leading space, whole numbers, runs of punctuation such as "),(", white space.
_PIECES = r"\d+| ?[^\W\d]+|[^\w\s]+|\s+"


@dataclass(frozen=True)
class TinySize:
    """Sizes of a tiny Qwen2-VL."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    mlp: int = 384
    vision_hidden: int = 64
    vision_layers: int = 3
    vision_heads: int = 2
    patch: int = 8
    image_size: int = 112


def train_tokenizer(texts: Iterable[str], out: Path, vocab_size: int = 1024) -> Path:
    """Trains the tokenizer on ``texts`` and writes it as a Hugging Face folder.

    ``vocab_size`` is the most it may take, special tokens included; 256 of them are single bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_roles(texts), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=IM_END, pad_token=PAD, padding_side="left",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]), chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    wrapped.save_pretrained(out)
    return out


def _with_roles(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each with the chat template's own words: as often as a model will read them."""
    for text in texts:
        yield text
        yield ROLES


def image_processor(size: TinySize) -> Any:
    """Qwen2-VL's image processor at the preset's size: any image is resized to about that area."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = size.image_size**2
    return Qwen2VLImageProcessorPil(
        patch_size=size.patch,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": area, "longest_edge": area},
    )


def tiny_config(size: TinySize, tokenizer: Any) -> Any:
    """The Qwen2VLConfig of a preset, its token ids taken from ``tokenizer``."""
    from transformers import Qwen2VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    half = size.hidden // size.heads // 2
    section = [half // 4, (half - half // 4) // 2]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": ids[IM_END],
        "pad_token_id": ids[PAD],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [*section, half - sum(section)],
        },
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=_tower(size),
        image_token_id=ids[IMAGE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        initializer_range=0.06,  # type: ignore[call-arg]
    )


def _tower(size: TinySize) -> dict[str, Any]:
    """The vision tower's part of the configuration."""
    return {
        "depth": size.vision_layers,
        "embed_dim": size.vision_hidden,
        "hidden_size": size.hidden,
        "mlp_ratio": 3,
        "num_heads": size.vision_heads,
        "patch_size": size.patch,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "initializer_range": 0.08,
    }


def describe(size: TinySize) -> str:
    return json.dumps(asdict(size), sort_keys=True)


def write_new_model(texts: Iterable[str], size: TinySize, out: Path, *, vocab_size: int, seed: int) -> Path:
    """A model with random weights as a Hugging Face folder: weights, tokenizer from ``texts``, processor."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from clinkd.model.first_weights import begin

    train_tokenizer(texts, out, vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(tiny_config(size, tokenizer))
        begin(model, tokenizer)
    image_processor(size).save_pretrained(out)
    model.save_pretrained(out)
    return out
