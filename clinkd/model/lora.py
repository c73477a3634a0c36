"""LoRA (Hu et al. 2022, arXiv:2106.09685) on the text layers, through peft.

Decisions:
- Adapters are put into the model in place (peft's ``inject_adapter_in_model``): it stays a ClinKD model for
  the loss, the engine and generation.
- Only linear layers of the text layers are adapted. In Qwen2.5-VL the vision tower's layers bear the same
  names, so targets are told by their place too.
- The merger, and a vision tower that trains, train as a whole beside the adapters (``set_trainable``). They
  are no adapters, but the adapters are worth nothing without them: they go into peft's file as
  ``modules_to_save``.
- What is merged is the start's own weights plus the product: they do not pass through the engine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from clinkd.model.guided import GuidedModel

LAYERS = "model.language_model.layers."
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of a text layer."""


@dataclass(frozen=True)
class LoraOptions:
    """How adapters are made.

    Args:
        rank: r of W + (alpha / r) B A. alpha: see there. dropout: of an adapter's input, in training.
        targets: names of linear layers of the text layers.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS


def add_adapters(model: GuidedModel, options: LoraOptions) -> None:
    """Puts adapters into ``model``; A is random (torch's global generator), B is 0: it computes what it did.

    Raises:
        ValueError: a target that no text layer has.
    """
    from peft import inject_adapter_in_model

    _check_targets(model, options.targets)
    inject_adapter_in_model(_peft_config(options), model)


def is_adapted(model: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    known = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules()
         if name.startswith(LAYERS) and isinstance(module, nn.Linear)}
    )  # fmt: skip
    unknown = sorted(set(targets) - set(known))
    if unknown or not targets:
        raise ValueError(
            f"lora: no linear layer {', '.join(unknown) or '(none named)'} in the text layers; "
            f"there are {', '.join(known)}"
        )


def _peft_config(options: LoraOptions, **more: Any) -> Any:
    from peft import LoraConfig

    names = "|".join(options.targets)
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({names})",
        **more,
    )


@torch.no_grad()
def merge_adapters(model: GuidedModel) -> None:
    """Adds each adapter's product to the layer it stands at, and takes the adapters away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses what is not finite
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """By name, what ``set_trainable`` let train."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def save_adapter(model: GuidedModel, options: LoraOptions, start: str, train_vision: bool, out: Path) -> None:
    """Writes what trained as peft does: adapter_config.json and adapter_model.safetensors.

    ``PeftModel.from_pretrained(model of start, out)`` is the trained model.

    Args:
        start: folder of the model that the adapters were trained on.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = _peft_config(
        options,
        base_model_name_or_path=start,
        modules_to_save=["visual"] if train_vision else ["visual.merger"],
        inference_mode=True,
    )
    config.save_pretrained(str(out))
    state = {
        f"base_model.model.{name.replace('.default.', '.')}": value.cpu().contiguous()
        for name, value in trained_weights(model).items()
    }
    save_file(state, out / "adapter_model.safetensors", {"format": "pt"})
