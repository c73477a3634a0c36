"""Which attention kernel a model runs on.

Decisions:
- "auto" leaves the choice to transformers (torch's fused kernels), except where flash attention can run: its
  package is there, there is a GPU, and the model runs in bfloat16.
- A kernel that was asked for by name and cannot run is an error at once, in one line, before any weight is
  read.
"""

from __future__ import annotations

import torch

CHOICES = ("auto", "eager", "sdpa", "flash_attention_2")


def attention_kernel(choice: str, dtype: torch.dtype) -> str | None:
    """transformers' ``attn_implementation`` for a model that runs in ``dtype``; None: its own choice.

    Raises:
        ValueError: an unknown choice, or flash attention where it cannot run.
    """
    if choice not in CHOICES:
        raise ValueError(f"model.attention: {choice!r} is none of {', '.join(CHOICES)}")
    if choice in ("eager", "sdpa"):
        return choice
    missing = _flash_lacks(dtype)
    if choice == "auto":
        return None if missing else "flash_attention_2"
    if missing:
        raise ValueError(f"model.attention: flash_attention_2 needs {missing}; choose auto, sdpa or eager")
    return choice


def _flash_lacks(dtype: torch.dtype) -> str | None:
    from transformers.utils import is_flash_attn_2_available

    if dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 (compute.precision or model.dtype), not {str(dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "a CUDA GPU"
    if not is_flash_attn_2_available():
        return "the package flash-attn (pip install 'clinkd[gpu]')"
    return None
