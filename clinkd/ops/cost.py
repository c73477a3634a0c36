"""Hours, price, bytes on disk, and how often to write a checkpoint.

Decisions:
- A GPU reaches a share of its peak (model FLOPs utilisation: Chowdhery et al. 2022, PaLM, arXiv:2204.02311);
  which one nobody knows before, so hours are a band.
- Peaks are the makers' for dense bfloat16. Prices are of the order of what clouds ask on demand and change:
  give your own.
- Interval between checkpoints: sqrt(2 x seconds to write one x mean time between failures) (Young 1974,
  doi:10.1145/361147.361115; Daly 2006, doi:10.1016/j.future.2004.11.016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clinkd.config import ConfigError

MFU = (0.15, 0.35)
CPU_MFU = (0.05, 0.3)
GPU_MTBF = 50_000.0
"""Hours between failures of a GPU and what belongs to it: 419 in 54 days of 16,384 (Llama Team 2024,
arXiv:2407.21783, section 3.3.4)."""
WRITE = 1e9
"""Bytes a second to a shared disk, of a job; assumed."""
KEPT = 3
"""Checkpoints on disk at one time: two whole ones and the one that is being written (train/checkpoint.py)."""


@dataclass(frozen=True)
class Accelerator:
    """``peak``: FLOP/s, dense bfloat16; ``memory``: bytes; ``price``: US dollars an hour, assumed."""

    peak: float
    memory: float
    price: float


GPUS = {
    "h100": Accelerator(989e12, 80e9, 3.0),
    "h200": Accelerator(989e12, 141e9, 3.8),
    "b200": Accelerator(2250e12, 180e9, 5.5),
    "a100-80": Accelerator(312e12, 80e9, 1.8),
    "a100-40": Accelerator(312e12, 40e9, 1.3),
    "l40s": Accelerator(362e12, 48e9, 1.0),
    "a10g": Accelerator(70e12, 24e9, 1.0),
    "l4": Accelerator(121e12, 24e9, 0.7),
    "v100": Accelerator(125e12, 32e9, 1.5),
    "mi300x": Accelerator(1307e12, 192e9, 2.5),
}
CPU_PEAK = 128e9
"""FLOP/s of a core in float32: two fused multiply-adds of sixteen numbers at 2 GHz."""


def accelerator(name: str, price: float | None = None) -> Accelerator:
    """One of ``GPUS``.

    Raises:
        ConfigError: another name.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu: unknown accelerator {name!r}; one of {', '.join(GPUS)}")
    found = GPUS[name]
    return found if price is None else Accelerator(found.peak, found.memory, price)


def hours(operations: float, peak: float, devices: float, band: tuple[float, float]) -> tuple[float, float]:
    """Fewest and most hours of ``operations`` on ``devices`` of ``peak`` FLOP/s each."""
    if operations < 0 or peak <= 0 or devices <= 0 or not 0 < band[0] <= band[1] <= 1:
        raise ValueError(f"cost: {operations} operations on {devices} devices of {peak}, {band}")
    best, worst = (operations / (peak * devices * share) / 3600 for share in reversed(band))
    return best, worst


def checkpoint_bytes(parameters: int, trained: int, element: int) -> float:
    """One checkpoint of DeepSpeed's: the weights, and the optimiser's float32 copy and moments."""
    return element * float(parameters) + 12.0 * trained


def interval(write_seconds: float, mtbf_hours: float) -> float:
    """Seconds between two checkpoints that lose least."""
    if write_seconds < 0 or mtbf_hours <= 0:
        raise ValueError(f"checkpoint interval: {write_seconds} s to write, {mtbf_hours} h between failures")
    return math.sqrt(2 * write_seconds * mtbf_hours * 3600)


def job_mtbf(devices: float, given: float | None = None) -> float:
    """Hours between failures of a whole job; ``given``: by the user."""
    return given if given is not None else GPU_MTBF / max(1.0, devices)
