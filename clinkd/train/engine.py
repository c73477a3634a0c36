"""DeepSpeed from our configuration, in one place: optimiser, schedule, clipping, accumulation, precision.

Decisions:
- What a user lays in with ``compute.deepspeed: FILE`` is the base; keys that our configuration decides win,
  what it leaves open (``null``) is set only where the file says nothing. A value of "auto", which
  transformers would fill in, says nothing.
- On a GPU, open keys follow from the model's width as transformers' "auto" does (reduce bucket hidden^2,
  prefetch 0.9 hidden^2, persistence 10 hidden): a bucket is about one square matrix, so that reducing begins
  early in the backward pass. Tiny models get larger ones: a collective has a price of its own.
- On a CPU nothing overlaps: collectives hold the thread. Buckets take a tiny model whole, but not the two
  gigabytes of DeepSpeed's default, which it sets aside.
- The optimizer is torch's AdamW in its fused form. DeepSpeed's own compiles CUDA or C++ code first,
  with a compiler and CUDA's headers on every node, and stops where the architecture list of NVIDIA's
  images names a "10.0a". Offloaded it stays DeepSpeed's, which is made for weights in the main memory.
- On a CPU DeepSpeed would compile shared-memory collectives (40 s, with a C++ compiler) that only its
  inference uses: training reduces through gloo. They are left out.
- The schedule is ours (torch's LambdaLR), so that every ZeRO stage and a bare torch loop share one curve.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinkd.config import ComputeSection, ConfigError, OptimSection, merge

WHOLE_BUCKET = 500_000_000  # DeepSpeed's default, elements
LEAST_BUCKET = 1 << 20
CPU_BUCKET = 1 << 23


def deepspeed_config(
    optim: OptimSection, compute: ComputeSection, zero_stage: int, hidden: int | None = None
) -> dict[str, Any]:
    """The JSON that DeepSpeed gets.

    Args:
        hidden: width of the model; None: not known.

    Raises:
        ConfigError: ``compute.deepspeed`` is no readable JSON object.
    """
    ours = {
        "train_micro_batch_size_per_gpu": optim.batch_size,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.clip,
        "optimizer": _optimizer(optim, compute),
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_ours(compute, zero_stage),
        "bf16": {"enabled": compute.precision == "bf16"},
        "fp16": {"auto_cast": False},  # it would halve what a module is given: positions, scores
        "steps_per_print": 10**9,
    }
    preset = {"zero_optimization": _zero_preset(compute, zero_stage, hidden)}
    return merge(merge(preset, _given(_read_base(compute.deepspeed))), ours)


def _optimizer(optim: OptimSection, compute: ComputeSection) -> dict[str, Any]:
    """Return the optimizer's part of DeepSpeed's JSON: AdamW, or Muon with AdamW for what is no matrix."""
    given = {"lr": optim.lr, "betas": [0.9, 0.98], "weight_decay": optim.weight_decay}
    if optim.muon_lr is not None:
        return {"type": "Muon", "params": given | {"torch_adam": True, "ns_method": "standard"}}
    offloaded = compute.gpus_per_worker > 0 and compute.cpu_offload
    kernel = {"torch_adam": False} if offloaded else {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": given | kernel}


def _zero_ours(compute: ComputeSection, zero_stage: int) -> dict[str, Any]:
    """What our configuration decides of ZeRO."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if compute.overlap_comm is not None:
        zero["overlap_comm"] = compute.overlap_comm
    if compute.bucket_size is not None:
        zero |= {"reduce_bucket_size": compute.bucket_size, "allgather_bucket_size": compute.bucket_size}
    pinned = {"device": "cpu", "pin_memory": True}
    if compute.cpu_offload:
        zero["offload_optimizer"] = pinned
    if zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if compute.offload_parameters:
            zero["offload_param"] = pinned
    return zero


def _zero_preset(compute: ComputeSection, zero_stage: int, hidden: int | None) -> dict[str, Any]:
    """What holds where neither our configuration nor the user's file says anything; see above."""
    if zero_stage == 0:
        return {}
    zero: dict[str, Any] = {"overlap_comm": compute.gpus_per_worker > 0}
    if compute.gpus_per_worker == 0:
        zero |= {"reduce_bucket_size": CPU_BUCKET, "allgather_bucket_size": CPU_BUCKET}
    elif hidden is not None:
        bucket = min(WHOLE_BUCKET, max(LEAST_BUCKET, hidden**2))
        zero["reduce_bucket_size"] = bucket
        if zero_stage == 3:
            zero["stage3_prefetch_bucket_size"] = int(0.9 * bucket)
    if zero_stage == 3:
        # Parameters under the threshold stay whole on every rank: gathering them costs more than they weigh.
        zero["stage3_param_persistence_threshold"] = max(10_000, 10 * (hidden or 0))
    return zero


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` without those that are "auto"."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _read_base(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"compute.deepspeed: {path}: {error}; give a JSON file of DeepSpeed's") from None
    if not isinstance(value, dict):
        raise ConfigError(f"compute.deepspeed: {path}: a JSON object is wanted")
    return value


def learning_rate(step: int, total: int, optim: OptimSection) -> float:
    """Factor on ``optim.lr`` in step ``step`` of ``total``: linear warm-up, then as ``schedule`` says."""
    warm = max(1, round(optim.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":  # warm-up, stable, decay (Hu et al., 2024)
        return max(0.02, min(1.0, 5 * (1 - step / total)))
    done = min(1.0, (step - warm) / max(1, total - warm))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def hidden_size(module: Any) -> int | None:
    """Width of the widest language model in ``module``; None where there is none."""
    configs: list[Any] = [part.config for part in module.modules() if hasattr(part, "config")]
    texts = [getattr(config, "text_config", config) for config in configs]
    return max((text.hidden_size for text in texts if hasattr(text, "hidden_size")), default=None)


def parameter_groups(module: Any, optim: OptimSection) -> list[dict[str, Any]]:
    """Return what trains, in groups: the vision tower and its merger at a learning rate of their own.

    With ``optim.muon_lr`` the matrices of each are a group by themselves. Embeddings and the head are none:
    their rows are looked up one by one (Jordan et al., 2024), and DeepSpeed chooses by the same names.
    """
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            row_wise = any(part in name.lower() for part in ("embed", "lm_head"))
            matrix = optim.muon_lr is not None and parameter.ndim >= 2 and not row_wise
            groups.setdefault((".visual." in name, matrix), []).append(parameter)
    return [
        {
            "params": group,
            "lr": (optim.muon_lr if matrix else optim.lr) * (optim.vision_lr if tower else 1.0),  # type: ignore[operator]
        }
        for (tower, matrix), group in sorted(groups.items())
    ]


def import_engine(compute: ComputeSection) -> Any:
    """Return the module deepspeed, set up for the device that it runs on."""
    if compute.gpus_per_worker:
        import deepspeed

        return deepspeed
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # no extension is compiled, and no compiler is looked for
    return deepspeed


def start_engine(
    module: Any,
    optim: OptimSection,
    compute: ComputeSection,
    zero_stage: int,
    total: int,
    universal: bool = False,
) -> Any:
    """A DeepSpeed engine around ``module``; torch.distributed is already up (Ray Train did that).

    ``universal``: what it is going to load is a universal checkpoint.
    """
    deepspeed = import_engine(compute)
    from torch.optim.lr_scheduler import LambdaLR

    curve: Callable[[int], float] = lambda step: learning_rate(step, total, optim)  # noqa: E731
    config = deepspeed_config(optim, compute, zero_stage, hidden_size(module))
    if universal:
        config = merge(config, {"checkpoint": {"load_universal": True}})
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, optim),
        config=config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, curve),
        dist_init_required=False,
    )
    return engine


OPTIONS = ("weight_decay", "betas")


def options_of(engine: Any) -> tuple[list[float], list[dict[str, Any]]]:
    """Base learning rates, and what else the configuration says of each group of parameters."""
    groups = engine.optimizer.param_groups
    return list(engine.lr_scheduler.base_lrs), [
        {key: group[key] for key in OPTIONS if key in group}
        for group in groups  # Muon has no betas
    ]


def set_options(engine: Any, options: tuple[list[float], list[dict[str, Any]]]) -> None:
    """Puts the configuration's options in the place of a checkpoint's: a clone's settings are its own."""
    scheduler = engine.lr_scheduler
    scheduler.base_lrs = options[0]
    for group, base, curve, others in zip(
        engine.optimizer.param_groups, options[0], scheduler.lr_lambdas, options[1], strict=True
    ):
        group.update(others, lr=base * curve(scheduler.last_epoch), initial_lr=base)


def whole_state(engine: Any, zero_stage: int) -> dict[str, Any]:
    """The module's weights; under ZeRO-3 all ranks call it together, and only rank 0 has them."""
    if zero_stage == 3:
        return engine._zero3_consolidated_16bit_state_dict() or {}
    return {key: value.detach().cpu().clone() for key, value in engine.module.state_dict().items()}


def set_seeds(seed: int) -> None:
    """Of Python, numpy and torch."""
    import random

    import numpy as np
    import torch

    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed % 2**32)


def on_device(value: Any, device: Any) -> Any:
    """A tensor where the engine is; anything else as it is."""
    import torch

    return value.to(device) if isinstance(value, torch.Tensor) else value
