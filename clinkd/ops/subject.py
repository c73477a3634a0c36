"""A model that a stage trains, as far as its size goes: the real class on torch's meta device.

Decisions:
- Parameters are counted, not worked out: whatever trains, LoRA and a frozen tower too, is what the training
  code itself would let train (``set_trainable``, ``add_adapters``).
- What a layer keeps for its backward pass is counted too: one text layer and one block of the tower run on
  the meta device, and autograd says what it saves. Fused attention, which the meta device does not have, is
  stood in for by a function that saves what fused kernels do: queries, keys, values, output and a
  logarithm for each query (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clinkd.config import ConfigError, LoraSection, RunConfig, TinySection
from clinkd.model.clinkd_qwen2vl import new_model, set_trainable
from clinkd.model.presets import SPECIAL_TOKENS, TinySize, tiny_config
from clinkd.model.published import MAX_PIXELS, MIN_PIXELS, NAMES, published_config, published_name
from clinkd.model.rope import RopeGuidance
from clinkd.train.meter import ModelShape

COUNTED = "counted"


@dataclass(frozen=True)
class Source:
    """Where a model's dimensions come from: its transformers config, its processor's limits, and a word."""

    config: Any
    pixels: tuple[int, int]
    where: str


def source_of(config: RunConfig, role: str) -> Source:
    """The dimensions of the run's ``role``: "teacher" or "student".

    Raises:
        ConfigError: a folder that is not here and is not named after a released checkpoint.
    """
    model = config.model
    tiny: TinySection
    if role == "teacher":
        key, path, tiny = "teacher.path", config.teacher.path, config.teacher.tiny
    else:
        key, path, tiny = "model.path", model.path, model.tiny
    if path is not None:
        return _by_path(key, path)
    if role == "teacher" or model.init == "random":
        made = _made_here(config, tiny)
        area = model.vision.image_size**2
        return Source(made, (area, area), "made here, with the largest vocabulary it may get")
    return _cut(source_of(config, "teacher"), tiny)


def _by_path(key: str, path: str) -> Source:
    folder = Path(path)
    if (folder / "config.json").is_file():
        from transformers import AutoConfig

        try:
            return Source(AutoConfig.from_pretrained(folder), _limits(folder), str(folder))
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{key}: {folder}/config.json cannot be read ({reason})") from None
    name = published_name(path)
    if name is None:
        raise ConfigError(
            f"{key}: {path} holds no config.json; give a checkpoint's folder (its config.json is enough to "
            f"plan), or a path that ends in one of {', '.join(NAMES)}"
        )
    return Source(published_config(name), (MIN_PIXELS, MAX_PIXELS), f"{name} as released, {path} is not here")


def _limits(folder: Path) -> tuple[int, int]:
    """Least and most pixels of a resized image, by the folder's preprocessor_config.json."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        return MIN_PIXELS, MAX_PIXELS
    size = found.get("size") or {}
    low = found.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS
    return int(low), int(found.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS)


class _Words:
    """As much of a tokenizer as a config asks for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, token: str) -> int:
        return SPECIAL_TOKENS.index(token)


def _made_here(config: RunConfig, tiny: TinySection) -> Any:
    vision = config.model.vision
    size = TinySize(
        hidden=tiny.hidden, layers=tiny.layers, heads=tiny.heads, mlp=tiny.mlp, vision_hidden=vision.hidden,
        vision_layers=vision.layers, vision_heads=vision.heads, patch=vision.patch,
        image_size=vision.image_size,
    )  # fmt: skip
    return tiny_config(size, _Words(config.model.vocab_size))


def _cut(teacher: Source, tiny: TinySection) -> Source:
    """The student that ``model.students`` cuts out of a teacher."""
    config = copy.deepcopy(teacher.config)
    text = config.text_config
    if tiny.layers > text.num_hidden_layers or tiny.mlp > text.intermediate_size:
        raise ConfigError(
            f"model.tiny: {tiny.layers} layers of {tiny.mlp} neurons cannot be cut out of a teacher of "
            f"{text.num_hidden_layers} of {text.intermediate_size}"
        )
    text.num_hidden_layers, text.intermediate_size = tiny.layers, tiny.mlp
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[: tiny.layers]
    return Source(config, teacher.pixels, f"cut out of the teacher ({teacher.where})")


class _Kept(torch.autograd.Function):
    """Saves what fused attention saves; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size)
        log = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("a meta layer is run forward alone")


def _counted(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **how: Any
) -> Any:
    """Stands in for transformers' fused attention, which repeats keys and values to all heads first."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    masked = None
    if attention_mask is not None:  # torch turns a mask of bools into one of numbers, layer by layer
        masked = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
    return _Kept.apply(query, key, value, masked), None


def saved_bytes(run: Callable[[], Any], own: nn.Module) -> int:
    """Bytes that autograd saves while ``run`` runs, the weights of ``own`` apart."""
    weights = {weight.untyped_storage()._cdata for weight in own.parameters()}
    seen: dict[int, int] = {}
    alive = []  # a storage that is gone may be another's address

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage.nbytes()
            alive.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(seen.values())


class Subject:
    """A model without weights.

    Args:
        source: its dimensions. attention: "eager", or anything else for fused kernels.
    """

    def __init__(
        self, source: Source, *, train_vision: bool, lora: LoraSection | None = None, attention: str = "auto"
    ) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(COUNTED, _counted)
        config = copy.deepcopy(source.config)
        self.source, self.lora = source, lora
        with torch.device("meta"):
            self.model = new_model(config, RopeGuidance(mode="none"))
            if lora is not None:
                from clinkd.model.lora import LoraOptions, add_adapters

                add_adapters(self.model, LoraOptions(**lora.model_dump()))
        set_trainable(self.model, train_vision)
        self.model.train()
        kernel = "eager" if attention == "eager" else COUNTED
        for part in self.model.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = kernel  # type: ignore[union-attr]
        self.config = self.model.config
        self._saved: dict[tuple[Any, ...], int] = {}
        self.shape = ModelShape(self.model)

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    @cached_property
    def trained(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest single weight."""
        return max(weight.numel() for weight in self.model.parameters())

    @property
    def head(self) -> tuple[int, int]:
        """Vocabulary and width."""
        rows, width = self.model.lm_head.weight.shape
        return int(rows), int(width)

    @property
    def head_trains(self) -> bool:
        return bool(self.model.lm_head.weight.requires_grad)

    @property
    def tower_trains(self) -> bool:
        return self.shape.blocks.trained > 0

    @property
    def patch(self) -> int:
        """Pixels a side of a patch."""
        return int(self.config.vision_config.patch_size)

    @property
    def merge(self) -> int:
        """Patches a side that become one token."""
        return int(self.config.vision_config.spatial_merge_size)

    @property
    def patch_values(self) -> int:
        vision = self.config.vision_config
        return 3 * int(vision.temporal_patch_size) * self.patch**2

    def layer_bytes(self, rows: int, length: int, dtype: torch.dtype) -> int:
        """What one text layer keeps for its backward pass over [rows, length] tokens."""
        return self._once(("layer", rows, length, dtype), lambda: self._layer(rows, length, dtype))

    def _once(self, key: tuple[Any, ...], count: Callable[[], int]) -> int:
        if key not in self._saved:
            self._saved[key] = count()
        return self._saved[key]

    def _layer(self, rows: int, length: int, dtype: torch.dtype) -> int:
        text = self.model.model.language_model
        layer = text.layers[0].to(dtype)
        # A padded batch has a mask; with adapters alone gradients still pass from layer to layer.
        states = torch.empty(
            rows, length, self.head[1], device="meta", dtype=dtype, requires_grad=self.shape.reached
        )
        places = torch.empty(3, rows, length, device="meta")
        turned = text.rotary_emb(states, places)
        mask = None if rows == 1 else torch.empty(rows, 1, length, length, device="meta", dtype=dtype)
        return saved_bytes(lambda: layer(states, attention_mask=mask, position_embeddings=turned), layer)

    def block_bytes(self, images: int, grid: tuple[int, int, int], dtype: torch.dtype) -> int:
        """What one block of the vision tower keeps for its backward pass; 0 where the tower is frozen."""
        if not self.tower_trains:
            return 0
        return self._once(("block", images, grid, dtype), lambda: self._block(images, grid, dtype))

    def _block(self, images: int, grid: tuple[int, int, int], dtype: torch.dtype) -> int:
        tower, vision = self.model.model.visual, self.config.vision_config
        block = tower.blocks[0].to(dtype)
        each = grid[0] * grid[1] * grid[2]
        width = getattr(vision, "embed_dim", vision.hidden_size)
        states = torch.empty(images * each, width, device="meta", dtype=dtype, requires_grad=True)
        angle = torch.empty(images * each, width // vision.num_heads, device="meta")
        ends = torch.arange(0, (images + 1) * each, each, dtype=torch.int32)
        return saved_bytes(lambda: block(states, cu_seqlens=ends, position_embeddings=(angle, angle)), block)

    @property
    def depth(self) -> tuple[int, int]:
        """Text layers and vision blocks."""
        return len(self.model.model.language_model.layers), len(self.model.model.visual.blocks)
