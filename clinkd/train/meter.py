"""What a training step took: tokens, operations, seconds, memory.

Decisions:
- Counts come from the batch as it was made, before it moves to a device: nothing waits for the device.
- Input tokens are those that are no padding, image tokens among them. The guide has no sequences: its are its
  phrases' tokens and its images' merged patches.
- Weights are counted before the engine starts: ZeRO-3 leaves no rank a whole one.
- What a loss module computes beside its model it says itself, by a method ``own_work(arguments, tokens)``
  that returns ``flops.Work`` parts. A module without a ClinKD model has no operations to name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from clinkd import metrics
from clinkd.model.guided import GuidedModel
from clinkd.train.flops import Work, flops, image_pairs


class Totals(NamedTuple):
    """Of one step, over all ranks."""

    tokens: float  # that the loss is over
    samples: int
    input_tokens: int
    operations: float
    stop: bool  # somebody wants the job to end
    preempted: bool  # a node of it will be taken away
    waits: list[float]  # seconds of each rank for its batches and its first forward pass, a step ago


@dataclass(frozen=True)
class Matrices:
    """Elements of a part's matrices, and of those that train."""

    weights: int
    trained: int

    @classmethod
    def of(cls, *modules: nn.Module) -> Matrices:
        found = [weight for module in modules for weight in module.parameters() if weight.dim() > 1]
        return cls(sum(w.numel() for w in found), sum(w.numel() for w in found if w.requires_grad))

    def work(self, tokens: int, reached: bool, attention: int = 0) -> Work:
        return Work(tokens, self.weights, self.trained, reached, attention)


class Meter:
    """Counts the work of a loss module's batches; made before the engine takes its weights apart."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        models = [part for part in module.modules() if isinstance(part, GuidedModel)]
        trains = [model for model in models if any(weight.requires_grad for weight in model.parameters())]
        self.shape = ModelShape(trains[0]) if trains else None

    def count(self, arguments: Mapping[str, Any], tokens: int) -> tuple[int, float]:
        """(input tokens, operations forward and backward) of one micro-batch on this rank; 0: not known.

        Args:
            arguments: of the module's forward. tokens: what its sums are over.
        """
        lengths = document_lengths(arguments)
        if self.shape is None:
            return sum(lengths), 0.0
        given = arguments.get("image_grid_thw")
        grids = [] if given is None else [(frames, rows, columns) for frames, rows, columns in given.tolist()]
        inputs = sum(lengths)
        if "phrase_mask" in arguments:
            patches = sum(frames * rows * columns for frames, rows, columns in grids)
            inputs = int(arguments["phrase_mask"].sum()) + patches // self.shape.merge
        shown = arguments.get("shown")  # a frozen tower sees those images alone that it has not seen
        passing = None if shown is None else [grids[number] for number in shown.unseen]
        parts = self.shape.work(lengths, grids, tokens if lengths else 0, passing)
        own = getattr(self.module, "own_work", None)
        return inputs, flops(parts + (own(arguments, tokens) if own else []))


class ModelShape:
    """What of a ClinKD model each kind of token is multiplied with."""

    def __init__(self, model: Any) -> None:
        tower, text = model.model.visual, model.config.text_config
        vision = model.config.vision_config
        self.patch, self.blocks = Matrices.of(tower.patch_embed), Matrices.of(tower.blocks)
        self.merger, self.layers = Matrices.of(tower.merger), Matrices.of(model.model.language_model.layers)
        self.head = Matrices.of(model.lm_head)
        self.reached = any(weight.requires_grad for weight in model.model.parameters())
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        self.text_width = text.num_hidden_layers * heads * size
        self.merge = vision.spatial_merge_size**2
        depth, width = len(tower.blocks), getattr(vision, "embed_dim", vision.hidden_size)
        whole = getattr(vision, "fullatt_block_indexes", None)
        self.whole_width = width * (depth if whole is None else len(whole))
        self.window_width = width * depth - self.whole_width
        self.window = None
        if self.window_width:  # Qwen2.5-VL: of whole merged patches
            merged = vision.window_size // vision.spatial_merge_size // vision.patch_size
            self.window = merged * vision.spatial_merge_size

    def work(
        self,
        lengths: list[int],
        grids: list[tuple[int, int, int]],
        answers: int,
        passing: list[tuple[int, int, int]] | None = None,
    ) -> list[Work]:
        """Parts of a step over documents of these lengths, distinct images and answer tokens.

        ``passing``: the images that pass the tower; None: all.
        """
        through = grids if passing is None else passing
        patches, merged = (
            sum(frames * rows * columns for frames, rows, columns in images) for images in (through, grids)
        )
        tower = self.blocks.trained > 0
        seen = sum(
            self.whole_width * image_pairs(grid) + self.window_width * image_pairs(grid, self.window)
            for grid in through
        )
        pairs = sum(length * length for length in lengths)
        return [
            self.patch.work(patches, False),
            self.blocks.work(patches, tower, seen),
            self.merger.work(merged // self.merge, tower or self.merger.trained > 0),
            self.layers.work(sum(lengths), self.reached, self.text_width * pairs),
            self.head.work(answers, self.reached),
        ]


def document_lengths(arguments: Mapping[str, Any]) -> list[int]:
    """Tokens of each document that are no padding: of rows by their mask, of packed rows by their positions.

    Packed, the text's positions count from 0 in each document and in the padding, whose guided ones are 0.
    """
    if "input_ids" not in arguments:
        return []
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None:
        return [length for length in mask.sum(1).tolist() if length]
    if positions is None:
        rows, length = arguments["input_ids"].shape
        return [length] * rows
    place, guided = positions[0].flatten(), positions[1:].flatten(1).any(0)
    document = place.eq(0).cumsum(0) - 1
    lengths = torch.bincount(document)
    real = torch.bincount(document, weights=guided.double(), minlength=len(lengths)) > 0
    return [int(length) for length in lengths[real].tolist()]


def measured(engine: Any, sums: dict[str, float], totals: Totals, seconds: float) -> dict[str, Any]:
    """A step's fields of metrics.jsonl: the ``sums`` over all tokens, speed and memory, where known."""
    means = {key: value / max(totals.tokens, 1.0) for key, value in sums.items()}
    found: dict[str, Any] = {key: round(value, 6) for key, value in means.items() if math.isfinite(value)}
    found |= {"lr": engine.get_lr()[0], "tokens": int(totals.tokens)}
    found |= speed(seconds, totals.input_tokens, totals.operations)
    found["memory_gib"] = peak_memory_gib(engine.device)
    norm = gradient_norm(engine)
    if norm is not None and math.isfinite(norm):
        found["grad_norm"] = norm
    return found


def speed(seconds: float, input_tokens: int, operations: float) -> dict[str, float]:
    """A step's fields of metrics.jsonl; of tokens and operations only what is known."""
    found: dict[str, float] = {"seconds": round(seconds, 4)}
    if input_tokens:
        found |= {"input_tokens": input_tokens, "tokens_per_s": _short(input_tokens / seconds)}
    if operations:
        found["tflops_per_s"] = _short(operations / seconds / 1e12)
    return found


def publish(
    step: int, total: int, loss: float, totals: Totals, seconds: float, device: torch.device, rank: int
) -> None:
    """A step for Ray's metrics: rank 0 tells of all ranks, each rank of its GPU; ``loss``: the sum."""
    if device.type == "cuda":
        metrics.TRAIN_GPU.set(torch.cuda.memory_allocated(device))
    if rank:
        return
    metrics.TRAIN_STEP.set(step)
    metrics.TRAIN_TOTAL.set(total)
    metrics.TRAIN_SECONDS.set(seconds)
    metrics.TRAIN_SAMPLES.add(totals.samples)
    metrics.TRAIN_TOKENS.add(totals.input_tokens)
    if math.isfinite(loss):
        metrics.TRAIN_LOSS.set(loss / max(totals.tokens, 1.0))


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: what torch held on a GPU, else this process's resident pages; GiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 4)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 4)


_libraries: float | None = None


def begin_memory() -> float:
    """Starts ``peak_memory_gib`` anew for the job that begins here.

    Call it with all libraries imported and no model built.

    Returns:
        GiB that this process held when its first job began: the libraries. 0 where a GPU is counted.
    """
    global _libraries
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    if _trim is not None:
        _trim(0)  # what a former job freed and the allocator kept
    try:
        # "5" sets the high-water mark to what is resident now (proc(5)); elsewhere than on Linux it stays.
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")
    except OSError:
        pass
    if _libraries is None:
        _libraries = peak_memory_gib(torch.device("cpu"))
    return _libraries


def _allocators_trim() -> Any:
    """glibc's malloc_trim; None where there is none."""
    import ctypes

    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


_trim = _allocators_trim()


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradients before clipping, over all ranks; None where DeepSpeed keeps none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else _short(float(norm))
