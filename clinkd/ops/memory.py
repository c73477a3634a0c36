"""Memory of one GPU (or, without any, of one worker's process) while a stage trains, part by part.

Decisions:
- What each ZeRO stage splits over P ranks is from Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, figure 1):
  with bfloat16 weights and gradients and float32 optimiser states, of N parameters that all train, 16 N,
  4 N + 12 N / P, 2 N + 14 N / P and 16 N / P bytes. What is frozen has weights alone.
- In float32, weights and gradients are 4 bytes each. DeepSpeed's ZeRO keeps a second copy of a rank's share
  of the weights there too, as its optimiser's; without ZeRO there is none. So float32 on one rank is 20 N
  with ZeRO and 16 N without.
- Activations are what autograd saves of one layer (``subject``), by the layers; with checkpointing a layer
  keeps its input, and one layer at a time is whole. Gradients of one layer's activations come on top.
- Logits exist for a chunk of answer tokens; but the loss works in float32, so under bfloat16 the heads of
  student and teacher exist once more, and the head's gradient is summed in float32 (distill/losses.py).
- Peak is the beginning of the backward pass: everything is there. Fragmentation, the CUDA context and NCCL
  take some 2 GiB more, the room that ``fits`` leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clinkd.ops.subject import Subject

GIB = 2**30
STATES = ("weights", "gradients", "optimizer")
LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters, and _max_reuse_distance: elements gathered at a time, at most."""
RESERVE = 2 * GIB
"""CUDA context, NCCL, and what the allocator cannot use."""
CE_BUFFERS, KD_BUFFERS = 2, 7
"""[chunk, V] float32 tensors that exist at one time in the losses, without and with a divergence."""
PROCESS = 100e6
"""Bytes that a worker without a GPU holds beside libraries and tensors: tokenizer, gloo's connections,
scratch of kernels, pages that its allocator keeps. Measured on configs/tiny.yaml (benchmarks/plan.py)."""

TURN = 300
"""Bytes of a turn's two arrays and its place in a dictionary, beside its tokens."""


@dataclass(frozen=True)
class Setting:
    """How a stage trains. ``element``: bytes of a weight; ``stage``: ZeRO's, 0 is plain data parallelism."""

    stage: int
    ranks: int
    element: int
    offload: bool = False
    offload_parameters: bool = False


def states(parameters: int, trained: int, how: Setting) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser states on one rank.

    Args:
        parameters: of the model; trained: of those, that train.
    """
    if not 0 <= trained <= parameters or how.ranks < 1 or how.stage not in (0, 1, 2, 3):
        raise ValueError(f"memory: {trained} of {parameters} parameters, {how}")
    split = [how.ranks if how.stage >= least else 1 for least in (3, 2, 1)]
    optimizer = 12 if how.element == 2 or how.stage else 8
    found = {
        "weights": how.element * parameters / split[0],
        "gradients": how.element * trained / split[1],
        "optimizer": optimizer * trained / split[2],
    }
    if how.offload and how.stage:
        found["optimizer"] = 0.0
        if how.stage >= 2:
            found["gradients"] = 0.0
    if how.offload_parameters and how.stage == 3:
        found["weights"] = 0.0
    return found


def buffers(subject: Subject, how: Setting, zero: Mapping[str, Any], gpu: bool) -> float:
    """Bytes of gradients being reduced and, under ZeRO-3, of weights that are gathered.

    Args:
        zero: ``zero_optimization`` of the engine's configuration.
    """
    if how.stage == 0:
        return 0.0
    bucket = int(zero.get("reduce_bucket_size", 500_000_000))
    copies = 2 if zero.get("overlap_comm") else 1
    # On a CPU pages that are never written do not exist: a bucket is as large as what is put into it.
    held = bucket if gpu else min(bucket, subject.trained)
    found = float(copies * held * how.element)
    if how.stage == 3 and how.ranks > 1:
        live = int(zero.get("stage3_max_live_parameters", LIVE))
        live += int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
        found += how.element * min(subject.parameters, max(live, subject.largest))
    return found


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one rank.

    Args:
        rows: questions; length: tokens of the longest, its image's among them; answers: of all answers.
        images: distinct ones; grid: (frames, rows, columns) of an image's patches.
        shared: tokens at the beginning of each row that rows of one image share; 0: none.
    """

    rows: int
    length: int
    answers: int
    images: int
    grid: tuple[int, int, int]
    shared: int = 0

    @property
    def patches(self) -> int:
        frames, rows, columns = self.grid
        return self.images * frames * rows * columns


def activations(subject: Subject, batch: Batch, element: int, checkpointing: bool) -> float:
    """Bytes kept for the backward pass, and the gradients of one layer's."""
    import torch

    dtype = torch.bfloat16 if element == 2 else torch.float32
    layers, blocks = subject.depth
    width, tokens = subject.head[1], batch.rows * batch.length
    if batch.shared:
        layer = float(subject.layer_bytes(batch.rows, batch.length - batch.shared, dtype))
        layer += subject.layer_bytes(batch.images, batch.shared, dtype)
        tokens = batch.rows * (batch.length - batch.shared) + batch.images * batch.shared
        # Each row holds its beginning's keys and values beside its own.
        text = subject.config.text_config
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layer += 2 * element * batch.rows * batch.shared * text.num_attention_heads * size
    else:
        layer = float(subject.layer_bytes(batch.rows, batch.length, dtype))
    block = float(subject.block_bytes(batch.images, batch.grid, dtype))
    vision = subject.config.vision_config
    entering = element * tokens * width
    seen = element * batch.patches * getattr(vision, "embed_dim", vision.hidden_size)
    ends = 4 * entering + 4 * tokens * width  # embeddings, images put among them, the last norm in float32
    pixels = element * batch.patches * subject.patch_values
    merged = 4 * seen  # the merger's norm, its two layers and what is between
    if checkpointing:
        kept = layers * entering + (blocks * seen if block else 0)
        return kept + 2 * max(layer, block) + ends + pixels + merged
    return layers * layer + blocks * block + max(layer, block) + ends + pixels + merged


def logits(
    subject: Subject, batch: Batch, element: int, chunk: int, *, distils: bool, passes: int = 1
) -> float:
    """Bytes of the loss.

    Args:
        distils: against a teacher's distribution. passes: over the head, each with a gradient of its own.
    """
    vocabulary, width = subject.head
    head = 4 * vocabulary * width
    chunked = 4 * min(chunk, max(1, batch.answers)) * vocabulary * (KD_BUFFERS if distils else CE_BUFFERS)
    copy = head if element == 2 else 0
    slope = head * passes if subject.head_trains else 0
    return float(chunked + copy + slope + 8 * batch.answers * width)


def teacher_head(vocabulary: int, width: int, element: int, answers: int) -> float:
    """Bytes of the teacher's head, of its float32 copy under bfloat16, and of its states at the answers."""
    head = vocabulary * width
    return float(element * head + (4 * head if element == 2 else 0) + 4 * answers * width)


def kept_images(
    subject: Subject, grid: tuple[int, int, int], seen: float, element: int, states: bool
) -> float:
    """Bytes of images that a worker's process keeps of ``seen`` records: cut, a byte a value.

    Args:
        states: those of a frozen tower are kept too (model/tower.py), in ``element`` bytes.
    """
    from clinkd.model.tower import LIMIT
    from clinkd.train.batches import IMAGES_KEPT

    frames, rows, columns = grid
    patches, vision = frames * rows * columns, subject.config.vision_config
    once = subject.patch_values / vision.temporal_patch_size
    pixels = min(float(IMAGES_KEPT), patches * once * seen)
    if not states:
        return pixels
    return pixels + min(LIMIT, element * patches * getattr(vision, "embed_dim", vision.hidden_size) * seen)


def kept_tokens(turns: float, length: float) -> float:
    """Bytes of turns of ``length`` tokens, prompt and answer, as a worker keeps them."""
    from clinkd.train.batches import ENCODED_KEPT

    return min(float(ENCODED_KEPT), turns * (16 * length + TURN))


def distinct(records: int, dealt: float) -> float:
    """How many of ``records`` a worker has seen, on average, once it was dealt ``dealt`` of them."""
    return records * (1 - (1 - 1 / records) ** dealt) if records > 1 else float(records)


def fits(parts: Mapping[str, float], capacity: float) -> bool:
    """Whether a GPU of ``capacity`` bytes holds these."""
    return sum(parts.values()) + RESERVE <= capacity


def choose(needs: Mapping[tuple[int, int], float], capacity: float) -> tuple[int, int] | None:
    """(ZeRO stage, ranks) to take: the fewest ranks that hold it, and of their stages the one that sends
    least: 2 before 1 and 0, which hold more and send as much; 3 last, which gathers weights in every pass.

    Args:
        needs: bytes on a rank by (stage, ranks).
    """
    good = [key for key, need in needs.items() if need + RESERVE <= capacity]
    order = {2: 0, 1: 1, 0: 2, 3: 3}
    return min(good, key=lambda key: (key[1], order[key[0]]), default=None)
