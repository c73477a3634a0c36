"""Tokens a second of real training steps: samples packed into sequences, against samples padded to the
longest.

    python benchmarks/packing.py [--images N] [--tokens N] [--sequences N] [--batch N] [--questions N]

Both sides train the tiny model of configs/tiny.yaml (forward and backward of the supervised loss) on the
same phantoms' samples, one turn each, made by the same code, images included; --questions of them share
an image. The padded side takes --batch images at a time padded, in the order of the sampler, one
sequence each. What counts are tokens that are no padding. Rounds alternate; a first step of each side is
not counted; the ratios are of the medians, by the clock and by this process's CPU seconds, which other
work on the machine disturbs less. Batches are made beforehand.

On a CPU attention over a packed sequence of L tokens costs L * L, whoever may see whom: there sequences
should be no longer than a few samples. On GPUs flash attention skips what no one may see.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (
        ("images", 160),
        ("tokens", 256),
        ("sequences", 2),
        ("batch", 8),
        ("questions", 1),
        ("rounds", 3),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    import torch

    torch.set_num_threads(chosen.threads)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        sides, lengths = prepared(chosen, Path(folder))
    ray.shutdown()
    describe(lengths)
    module = sides.pop("module")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for name, batches in sides.items():
        step(module, batches[0])
        real = sum(int(batch["tokens"]) for batch in batches)
        places = sum(batch["inputs"]["input_ids"].numel() for batch in batches)
        print(
            f"{name}: {len(batches)} batches, {real} tokens in {places} places: fill rate {real / places:.3f}"
        )
    for turn in range(chosen.rounds):
        for name, batches in sides.items():
            start, used = time.perf_counter(), time.process_time()
            for batch in batches:
                step(module, batch)
            tokens = sum(int(batch["tokens"]) for batch in batches)
            clock, cpu = tokens / (time.perf_counter() - start), tokens / (time.process_time() - used)
            rates[name].append((clock, cpu))
            print(f"round {turn + 1}: {name}: {clock:.0f} tokens/s, {cpu:.0f} a CPU second", flush=True)
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)]
        for name, found in rates.items()
    }
    for name, (clock, cpu) in medians.items():
        by_clock, by_cpu = clock / medians["padded"][0], cpu / medians["padded"][1]
        print(
            f"{name}: {clock:.0f} tokens/s ({by_clock:.2f} of padded), {cpu:.0f} a CPU second ({by_cpu:.2f})"
        )


def describe(lengths: list[int]) -> None:
    import numpy as np

    parts = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(int).tolist()
    print(f"{len(lengths)} samples; tokens of a sample: least, quartiles, most {parts}")


def prepared(chosen: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Batches of both sides, and the module they train."""
    import torch

    from clinkd.config import load_config
    from clinkd.data.boxes import to_qwen
    from clinkd.data.feed import Resources
    from clinkd.data.index import build_index
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.prepare import prepare
    from clinkd.data.sampler import SamplerOptions
    from clinkd.data.shards import Shards, samples
    from clinkd.model.presets import TinySize, write_new_model
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.batches import BatchSpec
    from clinkd.train.feed import FeedSpec, Share
    from clinkd.train.tasks import SupervisedTask, VqaSpec

    config = load_config(Path(__file__).parent.parent / "configs" / "tiny.yaml")
    prepare(PhantomSpec(images=chosen.images), folder / "data", test_fraction=0.02)
    tiny, vision = config.teacher.tiny, config.model.vision
    size = TinySize(
        tiny.hidden, tiny.layers, tiny.heads, tiny.mlp, vision.hidden, vision.layers, vision.heads,
        vision.patch, vision.image_size,
    )  # fmt: skip
    texts = (
        to_qwen(item[key]) for item in samples(folder / "data", "train") for key in ("question", "answer")
    )
    write_new_model(texts, size, folder / "model", vocab_size=1024, seed=0)
    vqa = VqaSpec(str(folder / "model"), RopeGuidance(2.0, 2.0), train_vision=True)
    shards = Shards.of(folder / "data")
    sides: dict[str, Any] = {}
    for name, tokens, batch in (("padded", None, chosen.batch), ("packed", chosen.tokens, chosen.sequences)):
        made = BatchSpec(vqa.model, vqa.guidance, packed=tokens is not None)
        index = build_index(shards, "train").measured(made.measure, shards)
        path = index.write(folder / f"{name}.arrow")
        options = SamplerOptions(0, batch, chosen.questions, tokens)
        task = SupervisedTask(vqa, FeedSpec(made, options, str(path), shards, Resources(tasks=0)))
        rounds = task.source.sampler(1).rounds(0)
        sides[name] = [
            {"inputs": inputs, "tokens": int((inputs["input_ids"] != task.tokenizer.pad_token_id).sum())}
            for inputs, *_ in task.feed(Share(1, 1, (0,), 0, rounds, rounds), torch.device("cpu"))
        ]
        sides["module"] = task.build()
    assert index.lengths is not None
    return sides, index.lengths.tolist()


def step(module: Any, batch: dict[str, Any]) -> None:
    module.zero_grad()
    module(**batch["inputs"])["loss"].backward()


if __name__ == "__main__":
    main()
