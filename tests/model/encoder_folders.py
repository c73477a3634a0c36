"""Tiny encoders as the folders that users have: transformers' CLIP, SigLIP and SigLIP 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = ("a", "scan", "of", "the", "left", "right", "kidney", "liver", "spleen", "lung")
LONGEST = 8


def save_tokenizer(out: Path, start: str = "[CLS]", end: str = "[SEP]") -> Any:
    """A word tokenizer that writes ``start`` before a text and ``end`` behind it, as an encoder's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", start, *WORDS, end]  # CLIP's end of text has the largest id
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 2), (end, len(words) - 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token=start, sep_token=end
    )
    wrapped.save_pretrained(out)
    return wrapped


def text_sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS) + 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LONGEST, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": len(WORDS) + 3,
    } | more  # fmt: skip


def vision_sizes(side: int = 32, patch: int = 8, layers: int = 2) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2,
        "image_size": side, "patch_size": patch,
    }  # fmt: skip


def tiny_clip(side: int = 32, patch: int = 8, layers: int = 2, seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    # A larger initializer than CLIP's: with 0.02 a model this small tells nothing apart.
    vision = vision_sizes(side, patch, layers) | {"initializer_factor": 5.0, "initializer_range": 0.1}
    config = CLIPConfig(
        text_config=text_sizes(initializer_factor=5.0), vision_config=vision, projection_dim=16
    )
    return CLIPModel(config).eval()


def save_clip(out: Path, model: Any, resize: int | None = None) -> Path:
    """Model, tokenizer and CLIP's preprocessor: shortest edge to the model's side, then a centre crop."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = resize or model.config.vision_config.image_size
    model.save_pretrained(out)
    save_tokenizer(out)
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(out)
    return out


def save_siglip(out: Path, side: int = 32, patch: int = 8) -> tuple[Path, Any]:
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(1)
    config = SiglipConfig(text_config=text_sizes(projection_size=32), vision_config=vision_sizes(side, patch))
    model = SiglipModel(config).eval()
    _spread(model)
    model.save_pretrained(out)
    save_tokenizer(out)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(out)
    return out, model


def save_siglip2(out: Path) -> tuple[Path, Any]:
    from transformers import Siglip2Config, Siglip2Model
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    torch.manual_seed(2)
    vision = vision_sizes(patch=8) | {"num_patches": 16}
    del vision["image_size"]
    config = Siglip2Config(text_config=text_sizes(projection_size=32), vision_config=vision)
    model = Siglip2Model(config).eval()
    _spread(model)
    model.save_pretrained(out)
    save_tokenizer(out)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(out)
    return out, model


def _spread(model: Any) -> None:
    """Wide weights, so that every word and patch shows, and a scale and bias that must not be forgotten."""
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.logit_scale.data.fill_(1.5)
    model.logit_bias.data.fill_(-3.0)


def noise(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def changed(image: Image.Image, row: int, column: int, grid: int = 4) -> Image.Image:
    """The image with the pixels of one cell of a grid over it inverted."""
    values = np.array(image)
    rows = slice(row * image.height // grid, (row + 1) * image.height // grid)
    columns = slice(column * image.width // grid, (column + 1) * image.width // grid)
    values[rows, columns] = 255 - values[rows, columns]
    return Image.fromarray(values)
