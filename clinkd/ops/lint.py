"""What in a configuration will go wrong or cost for nothing; each warning says what to do.

Decisions:
- A warning is no error: the plan is printed all the same, and its exit code is 0.
- What belongs to a job's ``--working-dir`` is what Ray would pack: what git ignores is left out, and what
  Ray leaves out by itself.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clinkd.config import RunConfig
from clinkd.tune.space import trials_wanted

MOST_WORKING_DIR = 100 * 2**20
"""Bytes that Ray takes of a job's working directory; more is refused (HTTP 413)."""
MOST_WRITING = 0.1
"""Share of the training time that writing checkpoints may take."""
NOT_PACKED = (".git", ".venv", "venv", "__pycache__")
"""Ray's RAY_RUNTIME_ENV_DEFAULT_EXCLUDES."""


@dataclass(frozen=True)
class Cluster:
    """What a run may use; None: not known."""

    cpus: float | None = None
    gpus: float | None = None


def starving(name: str, groups: int, images: int) -> Iterator[str]:
    """Of a stage with ``groups`` in an epoch and ``images`` a step."""
    if groups < images:
        yield (
            f"{name}: a step takes {images:,} images and an epoch has {groups:,}, so ranks see images "
            "twice in one step; lower compute.workers, or batch_size or accumulation of the stage"
        )


def placement(config: RunConfig, cluster: Cluster) -> Iterator[str]:
    """Of workers and trials against the cluster."""
    compute = config.compute
    needs = (("CPU", compute.cpus_per_worker, cluster.cpus), ("GPU", compute.gpus_per_worker, cluster.gpus))
    for kind, each, there in needs:
        if not each or there is None:
            continue
        wanted = compute.workers * each
        if wanted > there + 1e-9:
            yield (
                f"compute.workers: {compute.workers} workers of {each:g} {kind} want {wanted:g}, the cluster "
                f"has {there:g}: they would wait for ever; lower compute.workers to {int(there / each)}"
            )
            continue
        if not config.sweep.space:
            continue
        fit = int(there / wanted + 1e-9)
        asked = min(config.sweep.concurrent or 0, trials_wanted(config))
        if config.sweep.population and trials_wanted(config) > fit:
            yield (
                f"sweep.trials: a population of {trials_wanted(config)} trains side by side and wants "
                f"{trials_wanted(config) * wanted:g} {kind}s, the cluster has {there:g}: members would "
                f"wait for each other; lower sweep.trials to {fit}, or take scheduler: asha"
            )
        elif asked > fit:
            yield (
                f"sweep.concurrent: {asked} trials of {wanted:g} {kind}s want {asked * wanted:g}, the "
                f"cluster has {there:g}: {fit} run at one time; lower sweep.concurrent to {fit}"
            )


def working_dir(folder: Path, most: float = MOST_WORKING_DIR) -> Iterator[str]:
    """Of a folder that would be sent as a job's ``--working-dir``."""
    sizes = Counter[str]()
    for path in _packed(folder):
        if not path.is_symlink() and path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    total = sum(sizes.values())
    if total > most:
        big = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in sizes.most_common(3))
        yield (
            f"--working-dir: {folder} holds {total / 2**20:,.0f} MiB and Ray refuses more than "
            f"{most / 2**20:,.0f} (largest, MiB: {big}); move data and runs out of it, or name "
            "them in .gitignore"
        )


def _packed(folder: Path) -> Iterator[Path]:
    """Files that Ray would pack."""
    asked = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(asked, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        yield from _walk(folder)
        return
    for name in listed.split(b"\0"):
        path = folder / name.decode(errors="surrogateescape")
        if name and not set(path.relative_to(folder).parts) & set(NOT_PACKED):
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in NOT_PACKED:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def checkpoints(name: str, every: int, step_seconds: float, mtbf_hours: float, best: float) -> Iterator[str]:
    """Of a stage that writes one ``every`` so many steps; ``best``: seconds between two that lose least."""
    apart = every * step_seconds
    if apart > mtbf_hours * 3600:
        yield (
            f"compute.checkpoint_every: {name} writes a checkpoint every {apart / 3600:,.1f} h and something "
            f"fails every {mtbf_hours:,.1f} h: it would hardly get on; set it to "
            f"{max(1, round(best / step_seconds))}"
        )


def writing(
    name: str, every: int, step_seconds: float, write_seconds: float, best: float, steps: int
) -> Iterator[str]:
    """Of a stage of ``steps`` that writes for ``write_seconds`` after every so many; ``best``: as above."""
    if write_seconds > MOST_WRITING * every * step_seconds and best > every * step_seconds:
        wanted = min(steps, max(1, round(best / step_seconds)))
        yield (
            f"compute.checkpoint_every: {name} trains for {every * step_seconds:,.0f} s and then writes for "
            f"{write_seconds:,.0f} s; set it to {wanted:,}, or less if failures are more frequent than "
            "assumed (--mtbf)"
        )


def memory(name: str, need: float, capacity: float, better: str | None) -> Iterator[str]:
    """Of a stage that wants ``need`` bytes of a GPU's ``capacity``; ``better``: what would fit."""
    if need > capacity:
        remedy = better or "train by adapters (model.lora.rank=16), or lower batch_size"
        yield (f"{name}: wants {need / 1e9:,.1f} GB of each GPU, it has {capacity / 1e9:,.0f}; {remedy}")


def precision(config: RunConfig) -> Iterator[str]:
    """Of types that DeepSpeed refuses or that cost for nothing."""
    if config.compute.precision == "fp32" and config.model.dtype != "float32":
        yield (
            f"model.dtype: {config.model.dtype} under compute.precision=fp32 is refused by DeepSpeed; set "
            "compute.precision=bf16, or model.dtype=float32"
        )
    if config.compute.gpus_per_worker and config.compute.precision == "fp32":
        yield "compute.precision: fp32 on GPUs takes more memory and a fraction of the speed; set it to bf16"
