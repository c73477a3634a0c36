"""ClinKD's models: Qwen2-VL and Qwen2.5-VL with guided rotary positions, in and out of folders.

Decisions:
- A folder says by its ``model_type`` which family it is; all else (``guided``) the families share.
- Qwen2.5-VL's videos step by seconds: they are refused, its images are laid out as Qwen2-VL's.
- The vision tower's blocks and patch embedding may be frozen, its merger never (it speaks the language
  model's language).
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from clinkd.model.attention import attention_kernel
from clinkd.model.guided import GuidedModel, GuidedTrunk, guidance_of
from clinkd.model.lora import is_adapted
from clinkd.model.rope import RopeGuidance

__all__ = [
    "ClinKDForConditionalGeneration", "ClinKDQwen2_5_VLForConditionalGeneration", "guidance_of", "load_model",
    "model_class", "new_model", "save_model", "set_trainable",
]  # fmt: skip


class ClinKDModel(GuidedTrunk, Qwen2VLModel):  # type: ignore[misc]
    """Qwen2-VL's trunk with guided positions."""


class ClinKDForConditionalGeneration(GuidedModel, Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2-VL with guided positions; see :class:`clinkd.model.guided.GuidedModel`."""

    plain = Qwen2VLForConditionalGeneration
    trunk = ClinKDModel


class ClinKDQwen2_5_VLModel(GuidedTrunk, Qwen2_5_VLModel):  # type: ignore[misc]
    """Qwen2.5-VL's trunk with guided positions."""

    videos = False


class ClinKDQwen2_5_VLForConditionalGeneration(  # type: ignore[misc]
    GuidedModel, Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL with guided positions."""

    plain = Qwen2_5_VLForConditionalGeneration
    trunk = ClinKDQwen2_5_VLModel


FAMILIES: dict[str, type[GuidedModel]] = {
    "qwen2_vl": ClinKDForConditionalGeneration,
    "qwen2_5_vl": ClinKDQwen2_5_VLForConditionalGeneration,
}
"""By the ``model_type`` of a config."""


def model_class(config: Any, where: Path | str = "a config") -> type[GuidedModel]:
    """The class for ``config``.

    Raises:
        ValueError: another family.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"clinkd model: {where} is of type {kind!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def new_model(config: Any, guidance: RopeGuidance) -> GuidedModel:
    """A model with random weights (torch's global generator) from a copy of ``config``, of its family.

    Raises:
        ValueError: see ``model_class``.
    """
    config = copy.deepcopy(config)
    config.rope_guidance = asdict(guidance)
    return model_class(config)(config)


def load_model(
    path: Path | str,
    guidance: RopeGuidance | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    attention: str = "auto",
    runs_in: torch.dtype | None = None,
) -> GuidedModel:
    """A model from a Hugging Face folder, ours or the family's.

    Args:
        guidance: takes the place of the folder's; None: the folder's own, M-RoPE where it has none.
        attention: the kernel, see ``attention_kernel``; runs_in: what the model is cast to afterwards.

    Raises:
        ValueError: another family; weights that the folder has not (transformers alone would start them at
            random); a kernel that is not there.
    """
    config = AutoConfig.from_pretrained(path)
    loaded: Any = model_class(config, path).from_pretrained(
        path, dtype=dtype, output_loading_info=True,
        attn_implementation=attention_kernel(attention, runs_in or dtype),
    )  # fmt: skip
    model, found = loaded
    if found["missing_keys"]:
        few = ", ".join(sorted(found["missing_keys"])[:3])
        raise ValueError(f"clinkd model: {path} lacks {len(found['missing_keys'])} weights ({few}, ...)")
    model.config.rope_guidance = asdict(guidance if guidance is not None else guidance_of(model.config))
    return model


def save_model(model: GuidedModel, tokenizer: Any, image_processor: Any, out: Path | str) -> Path:
    """Writes weights (safetensors), tokenizer and preprocessor_config.json as one Hugging Face folder."""
    out = Path(out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    image_processor.save_pretrained(out)
    return out


def set_trainable(model: GuidedModel, train_vision: bool) -> None:
    """Decides what trains.

    The merger does always; the vision tower's blocks and patch embedding only with ``train_vision``; the
    text model wholly, or where it has adapters (``lora.add_adapters``) these alone.
    """
    model.requires_grad_(True)
    for part in (model.model.visual.patch_embed, model.model.visual.blocks):
        part.requires_grad_(train_vision)
    if is_adapted(model):
        for part in (model.model.language_model, model.lm_head):
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(".lora_" in name)
