"""Images a second on 1 to 512 GPUs, before any is held: a model of the network, and pieces measured here.

Decisions:
- Each GPU keeps its batch (weak scaling), so more GPUs take larger steps; what that does to learning is not
  in here.
- What a step sends, of N trained parameters, is Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 7):
  2 N without ZeRO and under ZeRO-1, a reduce-scatter for each micro-batch and one gather under ZeRO-2; under
  ZeRO-3 each micro-batch gathers all weights twice and reduces the gradients once.
- A collective goes in rings, first in the node, then between nodes: (n - 1) / n of the data over the slower
  of its links, and a latency for each of its n - 1 hops (Thakur et al. 2005,
  doi:10.1177/1094342005051521, section 4.1). Between nodes each of a node's GPUs carries its part.
- Whether sending hides behind computing nobody knows before, so a number is a band: all hidden, none hidden.
- GPUs fail: of the time, write / interval + interval / (2 x time between failures) goes on checkpoints and on
  steps done twice, at the interval that is best for so many GPUs (ops/cost.py).
- Images are read, resized and cut by CPUs. What one core takes for one is measured here, on an image of the
  data's size; CPUs that cannot keep up are the limit.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clinkd.config import RunConfig
from clinkd.ops import cost

if TYPE_CHECKING:
    from clinkd.ops.stages import Outlook, Stage

NODE = 8
"""GPUs of a node."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HOP_INSIDE, HOP_BETWEEN = 3e-6, 15e-6
"""Seconds of a message's latency; of the order of what NCCL's own tests show."""
MFU = sum(cost.MFU) / 2


@dataclass(frozen=True)
class Network:
    """Bytes a second of one GPU, one way: to its own node's, and to other nodes; 0.8 of the links' rate."""

    name: str
    inside: float
    between: float


NETWORKS = (
    Network("NVLink, 400 Gb/s for each GPU", 0.8 * 450e9, 0.8 * 50e9),
    Network("NVLink, 100 Gb/s for a node", 0.8 * 450e9, 0.8 * 12.5e9 / NODE),
    Network("PCIe 4, 25 Gb/s for a node", 0.8 * 32e9, 0.8 * 3.125e9 / NODE),
)


@dataclass(frozen=True)
class Traffic:
    """``sweeps``: how often in a step ``size`` bytes are gathered, or reduced and scattered; in ``calls``."""

    size: float
    sweeps: int
    calls: int


def traffic(
    trained: int, parameters: int, zero: int, element: int, micro: int, bucket: int, layers: int
) -> list[Traffic]:
    """What one optimiser step sends.

    Args:
        trained, parameters: elements that train, and all; element: bytes of one. micro: micro-batches of a
            step. bucket: elements in one call. layers: of which ZeRO-3 gathers one at a time.
    """
    gradients, weights = float(element * trained), float(element * parameters)
    calls = max(1, math.ceil(trained / bucket))
    if zero == 3:
        return [Traffic(weights, 2 * micro, max(1, layers)), Traffic(gradients, micro, calls)]
    reduced = micro if zero == 2 else 1  # the others add micro-batches up before they send
    return [Traffic(gradients, reduced, calls), Traffic(gradients, 1, calls)]


def seconds(sent: Traffic, ranks: int, network: Network) -> float:
    """Of all of it, in rings over ``ranks`` GPUs."""
    inside = min(ranks, NODE)
    nodes = math.ceil(ranks / NODE)
    once = sent.size * (inside - 1) / inside / network.inside
    hops = (inside - 1) * HOP_INSIDE
    if nodes > 1:
        once += sent.size / inside * (nodes - 1) / nodes / network.between
        hops += (nodes - 1) * HOP_BETWEEN
    return sent.sweeps * (once + sent.calls * hops)


@dataclass(frozen=True)
class Pieces:
    """A stage's, of one GPU.

    Args:
        compute: seconds of a step. sent: of a step. images: of a step. write: seconds of a checkpoint, one
            GPU's share of a disk that all write to. read: images a second that the CPUs beside it cut.
    """

    compute: float
    sent: tuple[Traffic, ...]
    images: int
    write: float
    read: float


def throughput(pieces: Pieces, ranks: int, network: Network) -> tuple[float, float]:
    """Images a second with none and with all of the sending hidden behind the computing."""
    sending = sum(seconds(each, ranks, network) for each in pieces.sent)
    kept = useful(pieces.write, ranks)
    most = ranks * pieces.read
    low, high = (
        min(most, kept * ranks * pieces.images / step)
        for step in (pieces.compute + sending, max(pieces.compute, sending))
    )
    return low, high


def useful(write: float, ranks: int) -> float:
    """Share of the time that is neither spent on checkpoints nor lost with a GPU that fails."""
    mtbf = cost.job_mtbf(ranks)
    interval = cost.interval(write, mtbf)
    return 1 / (1 + write / interval + interval / (2 * 3600 * mtbf)) if write else 1.0


def pieces_of(look: Outlook, stage: Stage, card: cost.Accelerator, image_seconds: float) -> Pieces:
    """What the configuration says of a stage, and what was measured of its images."""
    from clinkd.train.engine import deepspeed_config

    config, subject = look.config, stage.subject
    compute, workers = config.compute, config.compute.workers
    engine = deepspeed_config(stage.optim, compute, stage.zero, subject.head[1])["zero_optimization"]
    bucket = engine.get("reduce_bucket_size", 500_000_000)
    sent = traffic(
        subject.trained, subject.parameters, stage.zero, look.element, stage.optim.accumulation,
        bucket if isinstance(bucket, int) else 500_000_000, sum(subject.depth),
    )  # fmt: skip
    size = cost.checkpoint_bytes(subject.parameters, subject.trained, look.element)
    return Pieces(
        compute=look.step_flops(stage) / workers / (card.peak * MFU), sent=tuple(sent),
        images=look.per_step(stage) // workers, write=size / cost.WRITE,
        read=compute.cpus_per_worker / image_seconds,
    )  # fmt: skip


def image_seconds(look: Outlook, stage: Stage, least: float = 1.0) -> float:
    """Seconds of one core to decode, resize and cut an image of the data's size; measured for ``least`` s."""
    import numpy as np
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from clinkd.model.pixels import cut

    load = look.workload
    random = np.random.default_rng(0)
    rough = Image.fromarray(random.integers(0, 256, (load.height // 8, load.width // 8, 3), dtype=np.uint8))
    held = io.BytesIO()
    rough.resize((load.width, load.height), Image.Resampling.BICUBIC).save(held, "PNG")
    low, high = stage.subject.source.pixels
    model, subject = look.config.model, stage.subject
    processor = Qwen2VLImageProcessorPil(
        patch_size=subject.patch, temporal_patch_size=subject.config.vision_config.temporal_patch_size,
        merge_size=subject.merge,
        size={"shortest_edge": model.min_pixels or low, "longest_edge": model.max_pixels or high},
    )  # fmt: skip
    cut(processor, held.getvalue())
    begun, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < least or count < 3:
        cut(processor, held.getvalue())
        count += 1
    return taken / count


def scaling(config: RunConfig, gpu: str, records: int | None = None) -> dict[str, Any]:
    """Throughput of each stage that trains, by network and number of GPUs.

    Raises:
        ConfigError: an unknown accelerator, or a model whose size nothing tells.
    """
    from clinkd.ops.stages import Outlook
    from clinkd.ops.workload import workload_of

    card = cost.accelerator(gpu)
    look = Outlook(config, workload_of(config, records))
    stages = list(look.stages())
    measured = image_seconds(look, stages[0])
    return {
        "run": config.run.name, "gpu": gpu, "mfu": MFU, "image_seconds": measured,
        "cpus_a_gpu": config.compute.cpus_per_worker, "node": NODE, "data": look.workload.known,
        "stages": [_stage(look, stage, card, measured) for stage in stages],
    }  # fmt: skip


def _stage(look: Outlook, stage: Stage, card: cost.Accelerator, measured: float) -> dict[str, Any]:
    pieces = pieces_of(look, stage, card, measured)
    return {
        "name": stage.name, "zero_stage": stage.zero, "images_a_step_and_gpu": pieces.images,
        "compute_seconds": pieces.compute, "sent_bytes": sum(each.size * each.sweeps for each in pieces.sent),
        "fits": _fits(look, stage, card),
        "networks": [{"name": network.name, "rows": list(_rows(pieces, network))} for network in NETWORKS],
    }  # fmt: skip


def _fits(look: Outlook, stage: Stage, card: cost.Accelerator) -> int | None:
    """The fewest GPUs whose memory the stage fits; None: none of these."""
    from clinkd.ops.memory import RESERVE

    needs = ((ranks, sum(look.memory(stage, ranks=ranks).values()) + RESERVE) for ranks in RANKS)
    return next((ranks for ranks, need in needs if need <= card.memory), None)


def _rows(pieces: Pieces, network: Network) -> Iterator[dict[str, Any]]:
    alone = throughput(pieces, 1, network)[1]
    for ranks in RANKS:
        low, high = throughput(pieces, ranks, network)
        by_cpus = high >= 0.999 * ranks * pieces.read
        yield {
            "gpus": ranks, "images_a_second": [low, high],
            "efficiency": [low / ranks / alone, high / ranks / alone],
            "useful": useful(pieces.write, ranks), "limit": "cpus" if by_cpus else "gpus",
        }  # fmt: skip
