"""The teacher itself beside the student, where no cache can know what will be asked: of sampled answers.

Decisions:
- It is no part of the student's module tree: no optimiser, checkpoint or saved folder can take it along.
- As in ``label``, its guidance is its folder's own. What it says is the state after its last norm at the
  answer tokens, and its head, which every rank holds whole, as it would hold the cache's.
- Sharded, it is a DeepSpeed engine of its own: ZeRO-3 without an optimiser, whatever the student's stage.
  Every rank then has to ask it equally often. Weights are taken apart one by one, so a device never holds it
  whole; each rank's memory does, while it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clinkd.model.clinkd_qwen2vl import load_model


class OnlineTeacher:
    """A frozen teacher that is asked batch by batch.

    Args:
        path: its Hugging Face folder. device: where it runs.
        dtype: of its weights.
        sharded: over the ranks by ZeRO-3; torch.distributed and DeepSpeed's collectives are up.

    Attributes:
        head: [Vt, Ht], on ``device``.

    Raises:
        ValueError: see ``load_model``.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sharded: bool = False,
    ) -> None:
        model: Any = load_model(path, dtype=dtype)
        model.eval().requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype
        self.head = model.lm_head.weight.detach().clone().to(device)
        del model.lm_head  # its states are all that is wanted of it
        states = _States(model)
        self._run: Any = _shard(states, self.device, dtype) if sharded else states.to(device)

    @torch.no_grad()
    def states(self, labels: Tensor, pixel_values: Tensor, **inputs: Tensor | None) -> Tensor:
        """Last hidden states [N, Ht] that predict the N answer tokens.

        Args:
            labels: [B, L], not shifted; -100 where no answer stands.
            pixel_values, inputs: of ``GuidedModel.forward_hidden``.
        """
        given = {name: None if value is None else value.to(self.device) for name, value in inputs.items()}
        pixels = pixel_values.to(self.device, self.dtype)
        found: Tensor = self._run(labels=labels.to(self.device), pixel_values=pixels, **given)
        return found

    def weights(self) -> dict[str, Tensor]:
        """What this rank holds of its weights, by name: a sharded one's own part, flat and padded."""
        module = getattr(self._run, "module", self._run)
        named = module.model.named_parameters()
        return {name: getattr(weight, "ds_tensor", weight).detach() for name, weight in named}


class _States(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model.forward_hidden(**inputs)
        return hidden[:, :-1][labels[:, 1:] != -100]


def _shard(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A DeepSpeed engine that only runs forward, its parameters sharded over all ranks."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        # Smaller parameters stay whole, as the student's do: gathering costs more than they weigh.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    # Before the engine, which would move the whole module to the device first.
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    engine.eval()
    return engine
