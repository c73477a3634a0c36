"""Milliseconds for the rotary positions of a batch: ours, with and without guidance, against transformers'.

    python benchmarks/rope.py [--sequences N] [--length N] [--rounds N] [--threads N] [--device cpu|cuda]

Batches are --sequences rows of at most --length tokens, padded on the left to the longest: text with one
image, with two, with eight small ones, nearly nothing but image, and text alone. Transformers' side is
``get_rope_index`` of its own Qwen2-VL class; without guidance both are checked to be equal before they are
timed. Both sides run in every round, one after the other; ratios are of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from clinkd.model.rope import RopeGuidance, guided_rope_index

IMAGE, VIDEO, START, END, TEXT, PAD = 900, 901, 902, 903, 7, 0
LAYOUTS = {  # merged grids of the images of every row
    "one image of 16 x 16": [(16, 16)],
    "two images of 16 x 16": [(16, 16)] * 2,
    "eight images of 4 x 4": [(4, 4)] * 8,
    "two images of 30 x 30": [(30, 30)] * 2,
    "text alone": [],
}
GUIDANCES = {
    "none": RopeGuidance(),
    "pair": RopeGuidance(2.0, 2.0, gamma=0.5, mode="pair"),
    "patch": RopeGuidance(2.0, 2.0, gamma=0.5, mode="patch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("sequences", 64), ("length", 2048), ("rounds", 9), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    theirs = transformers_model()
    print(f"{chosen.sequences} x {chosen.length} tokens on {chosen.device}; milliseconds, median of rounds")
    print(f"{'layout':24}{'transformers':>14}" + "".join(f"{name:>16}" for name in GUIDANCES))
    for layout, images in LAYOUTS.items():
        inputs = batch(images, chosen.sequences, chosen.length, chosen.device)
        sides = {"transformers": transformers_side(theirs, inputs)}
        sides |= {name: our_side(guidance, inputs) for name, guidance in GUIDANCES.items()}
        wanted, found = sides["transformers"](), sides["none"]()
        if not torch.equal(wanted[0].float(), found[0]):
            raise SystemExit(f"{layout}: positions differ from those of transformers")
        times = measured(sides, chosen.rounds, chosen.device)
        line = "".join(
            f"{times[name]:9.2f} {times['transformers'] / times[name]:5.1f}x" for name in GUIDANCES
        )
        print(f"{layout:24}{times['transformers']:14.2f}{line}")


def transformers_model() -> Any:
    """The smallest Qwen2-VL trunk; only its index is asked."""
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen2VLModel(config).eval()


def batch(images: list[tuple[int, int]], sequences: int, length: int, device: str) -> dict[str, Any]:
    """Rows of four lengths; images stand between a few words each, the rest of the text behind them."""
    rows = []
    for number in range(sequences):
        row = [TEXT] * 20
        for high, wide in images:
            row += [START, *[IMAGE] * (high * wide), END] + [TEXT] * 20
        rows.append(row + [TEXT] * (length - 16 * (number % 4) - len(row)))
    ids = torch.full((sequences, max(map(len, rows))), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, -len(row) :] = torch.tensor(row)
        mask[number, -len(row) :] = 1
    grids = [[1, 2 * high, 2 * wide] for high, wide in images] * sequences
    return {
        "input_ids": ids.to(device), "attention_mask": mask.to(device),
        "image_grid_thw": torch.tensor(grids, device=device) if grids else None,
    }  # fmt: skip


def transformers_side(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    kinds = (inputs["input_ids"] == IMAGE).int()
    return lambda: model.get_rope_index(mm_token_type_ids=kinds, **inputs)


def our_side(guidance: RopeGuidance, inputs: dict[str, Any]) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    grids = inputs["image_grid_thw"]
    images, patches = (0, 0) if grids is None else (len(grids), int(grids.prod(-1).sum()) // 4)
    device = inputs["input_ids"].device
    alignment = torch.rand(images or len(inputs["input_ids"]), generator=generator).to(device)
    relevance = torch.rand(patches, generator=generator).to(device)
    return lambda: guided_rope_index(
        **inputs, guidance=guidance, image_token_id=IMAGE, vision_start_token_id=START,
        video_token_id=VIDEO, alignment=alignment, relevance=relevance,
    )  # fmt: skip


def measured(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each side; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
