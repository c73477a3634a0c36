"""PyPI's torchvision is built for CUDA: beside a CPU-only torch its operators do not load, and its Python
stops at the first that is missing. Nothing here calls one; declared by name, they let the rest import."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def make_importable() -> None:
    if find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision  # noqa: F401
