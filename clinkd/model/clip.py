"""transformers' CLIP, SigLIP and SigLIP 2 as encoders.

Decisions:
- Texts are padded as the model was trained: CLIP's to the longest of the batch, behind an attention mask;
  SigLIP's to its full length without one, since it reads its text vector off the last position.
- Weights are float32 whatever the file holds, so that a guide's scores do not depend on the machine.
- A folder that leaves weights out is refused: transformers would fill them with random numbers.
- SigLIP 2's variable-resolution model (model_type siglip2) keeps an image's shape; its fixed-resolution
  checkpoints are of model_type siglip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from clinkd.model.contrastive import Contrastive, Views, one_by_one, watched
from clinkd.model.encoders import TRANSFORMERS_WEIGHTS, one_line

TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class _Transformers(Contrastive):
    """What the three have in common."""

    model: Any

    def __init__(self, model: Any, tokenizer: Any, processor: Any, device: str | torch.device) -> None:
        text = model.config.text_config
        super().__init__(
            model, device, width=getattr(text, "projection_size", None) or model.config.projection_dim,
            scale=model.logit_scale, bias=getattr(model, "logit_bias", None),
        )  # fmt: skip
        self.tokenizer, self.processor = tokenizer, processor
        self.longest = int(text.max_position_embeddings)

    def _pixels(self, images: list[Image]) -> Tensor:
        """[B, 3, H, W], the whole of each image (see contrastive.py)."""
        side = self.model.config.vision_config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        inputs = self.processor(
            images=images, do_resize=True, size={"height": height, "width": width}, do_center_crop=False,
            return_tensors="pt",
        )  # fmt: skip
        return inputs["pixel_values"].to(self.device)


class Clip(_Transformers):
    """CLIP (Radford et al., 2021)."""

    def _see(self, images: list[Image]) -> Views:
        tower, pixels = self.model.vision_model, self._pixels(images)
        last = tower.encoder.layers[-1]
        with watched(last) as passage:
            whole = self.model.get_image_features(pixel_values=pixels).pooler_output
        alone = one_by_one(last, passage.into[:, 1:], None)  # the first is the class token
        dense = self.model.visual_projection(tower.post_layernorm(alone))
        patch = tower.embeddings.patch_size
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        return Views(whole, list(dense), [grid] * len(images))

    def _read(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return self.model.get_text_features(
            input_ids=inputs["input_ids"].to(self.device),
            attention_mask=inputs["attention_mask"].to(self.device),
        ).pooler_output


class Siglip(_Transformers):
    """SigLIP (Zhai et al., 2023): its attention pooling says of one patch what it makes of it."""

    def _see(self, images: list[Image]) -> Views:
        pixels = self._pixels(images)
        seen = self.model.get_image_features(pixel_values=pixels)
        dense = one_by_one(self.model.vision_model.head, seen.last_hidden_state)
        patch = self.model.config.vision_config.patch_size
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        return Views(seen.pooler_output, list(dense), [grid] * len(images))

    def _read(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return self.model.get_text_features(input_ids=inputs["input_ids"].to(self.device)).pooler_output


class Siglip2(Siglip):
    """SigLIP 2 of variable resolution (Tschannen et al., 2025): the grid follows the image's shape."""

    def _see(self, images: list[Image]) -> Views:
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        seen = self.model.get_image_features(
            pixel_values=inputs["pixel_values"], spatial_shapes=inputs["spatial_shapes"],
            pixel_attention_mask=inputs["pixel_attention_mask"],
        )  # fmt: skip
        dense = one_by_one(self.model.vision_model.head, seen.last_hidden_state)
        grids = [(int(rows), int(columns)) for rows, columns in inputs["spatial_shapes"].tolist()]
        patches = [part[: rows * columns] for part, (rows, columns) in zip(dense, grids, strict=True)]
        return Views(seen.pooler_output, patches, grids)


def open_transformers(folder: Path, device: str | torch.device, kind: str) -> Contrastive:
    """A folder as ``save_pretrained`` writes it, of model, tokenizer and image processor.

    Args:
        kind: "clip", "siglip" or "siglip2".

    Raises:
        ValueError: files are missing or do not load; weights only, never code, are read of a pickle.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Siglip2Model, SiglipModel

    needed = {"weights": TRANSFORMERS_WEIGHTS, "tokenizer": TOKENIZERS, "preprocessor": PROCESSORS}
    for what, names in needed.items():
        if not any((folder / name).is_file() for name in names):
            raise ValueError(f"guide {folder}: no {what}; one of {', '.join(names)} has to be there")
    models: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model}
    encoders: dict[str, Any] = {"clip": Clip, "siglip": Siglip, "siglip2": Siglip2}
    try:
        model, loaded = models[kind].from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, weights_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # PIL's pixels also where torchvision is installed: its resize gives others.
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # whatever a library makes of broken files
        raise ValueError(f"guide {folder}: does not load as {kind}: {one_line(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"guide {folder}: {len(missing)} weights are missing, first {missing[0]}")
    if kind != "clip" and not model.vision_model.use_head:
        raise ValueError(f"guide {folder}: a SigLIP without its pooling head cannot be compared with texts")
    return encoders[kind](model, tokenizer, processor, device)
