"""Images a second into a training process: the feed against a torch DataLoader, on the same cores.

    python benchmarks/feed.py [--images N] [--size PX] [--rounds N] [--workers N] [--batch N]

Both sides read the same prepared shards and give the same batches: decoded, resized and cut as Qwen2-VL's
image processor does (pixel limits of the released inference: 256*28*28 .. 1280*28*28), tokenized and
collated, float32 pixel values in the consumer's hands. The DataLoader has persistent workers and
prefetches; the feed has as many tasks. Each side passes over all images once before it is measured
(process start and imports are not counted), then they alternate; the ratio is of the medians. The
consumer does nothing but look at the batch.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMITS = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("images", 768), ("size", 512), ("rounds", 3), ("workers", 2), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # unset, ray.init leaves a token in the home folder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import ray
    import torch

    torch.set_num_threads(1)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        data, model = prepared(chosen.images, chosen.size, Path(folder))
        measure(data, model, chosen)
    ray.shutdown()


def prepared(images: int, size: int, folder: Path) -> tuple[Path, Path]:
    """Shards of phantoms, and a folder with a tokenizer and Qwen2-VL's own image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from clinkd.data.boxes import to_qwen
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.prepare import prepare
    from clinkd.data.shards import samples
    from clinkd.model.presets import train_tokenizer

    data, model = folder / "data", folder / "model"
    prepare(PhantomSpec(images=images, size=size), data, test_fraction=0.02, images_per_shard=256)
    texts = (to_qwen(item[key]) for item in samples(data, "train") for key in ("question", "answer"))
    train_tokenizer(texts, model)
    Qwen2VLImageProcessorPil(size=LIMITS).save_pretrained(model)
    return data, model


def measure(data: Path, model: Path, chosen: argparse.Namespace) -> None:
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        f"torch DataLoader, {chosen.workers} workers": loader_side(data, model, chosen),
        f"feed, {chosen.workers} tasks": feed_side(data, model, chosen),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(chosen.rounds + 1):
        for name, batches in sides.items():
            start, images, first = time.perf_counter(), 0, 0.0
            for batch in batches():
                images += len(batch["image_grid_thw"])
                first = first or time.perf_counter() - start
            seconds = time.perf_counter() - start
            after = (images - chosen.batch) / (seconds - first)
            note = "warm-up, not counted" if turn == 0 else f"round {turn}"
            print(
                f"{note}: {name}: {images} images, {images / seconds:.1f}/s; first batch after "
                f"{first:.2f} s, from there {after:.1f}/s",
                flush=True,
            )
            if turn:
                rates[name].append(images / seconds)
    base = statistics.median(next(iter(rates.values())))
    for name, found in rates.items():
        print(
            f"{name}: {statistics.median(found):.1f} images/s, "
            f"{statistics.median(found) / base:.2f} of the DataLoader"
        )
    breakdown(data, model)


def loader_side(data: Path, model: Path, chosen: argparse.Namespace) -> Callable[[], Iterator[Any]]:
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer

    from clinkd.data.shards import iter_rows

    class Images(torch.utils.data.Dataset):
        """The usual one: rows in memory, decoded and processed one by one."""

        def __init__(self) -> None:
            self.rows = list(iter_rows(data, "train"))

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, at: int) -> Any:
            import io

            from PIL import Image

            image = Image.open(io.BytesIO(self.rows[at]["png"])).convert("RGB")
            found = processor(images=image, return_tensors="pt")
            return self.rows[at], found["pixel_values"], found["image_grid_thw"][0]

    tokenizer, processor = AutoTokenizer.from_pretrained(model), AutoImageProcessor.from_pretrained(model)

    def collated(items: list[Any]) -> dict[str, Any]:
        from clinkd.model.chat import collate, encode

        rows = []
        for row, _, grid in items:
            turn = row["turns"][0]
            rows.append(encode(tokenizer, turn["question"], turn["answer"], int(grid.prod()) // 4))
        return collate(rows, tokenizer.pad_token_id) | {
            "pixel_values": torch.cat([values for _, values, _ in items]),
            "image_grid_thw": torch.stack([grid for _, _, grid in items]),
        }

    loader = torch.utils.data.DataLoader(
        Images(), batch_size=chosen.batch, shuffle=True, num_workers=chosen.workers, collate_fn=collated,
        persistent_workers=True, worker_init_fn=lambda _: torch.set_num_threads(1),
    )  # fmt: skip
    return lambda: iter(loader)


def feed_side(data: Path, model: Path, chosen: argparse.Namespace) -> Callable[[], Iterator[Any]]:
    """One turn of each record, as the other side has it: sampler, tasks, object store, pixel values."""
    import numpy as np
    import pyarrow as pa
    import torch

    from clinkd.data.feed import Resources, order_of, stream
    from clinkd.data.index import RecordIndex, build_index
    from clinkd.data.sampler import BatchSampler, Position, SamplerOptions
    from clinkd.data.shards import Shards
    from clinkd.model.pixels import Numbers, load_processor
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.batches import BatchSpec
    from clinkd.train.feed import InTask

    maker, shards = BatchSpec(str(model), RopeGuidance()), Shards.of(data)
    table = build_index(shards, "train").table
    at = table.column_names.index("turns")
    one = RecordIndex(table.set_column(at, "turns", pa.array(np.ones(len(table), np.int32))))
    sampler = BatchSampler(one, SamplerOptions(0, chosen.batch), lanes=1)
    numbers = Numbers(load_processor(str(model)))
    epochs = iter(range(10**6))

    def batches() -> Iterator[Any]:
        epoch = next(epochs)
        places = [Position(epoch, number) for number in range(sampler.rounds(epoch))]
        orders = (order_of(one, sampler.batch(place, 0), 0) for place in places)
        for arrays in stream(orders, shards, InTask(maker), Resources(chosen.workers, 0.5)):
            pixels = numbers(arrays["pixels"], arrays["channels"], arrays["image_grid_thw"])
            copies = {
                name: torch.from_numpy(arrays[name].copy())
                for name in ("input_ids", "labels", "attention_mask")
            }
            yield copies | {"pixel_values": pixels, "image_grid_thw": arrays["image_grid_thw"]}

    return batches


def breakdown(data: Path, model: Path) -> None:
    """Where the time of one image goes, in this process, one after the other."""
    import io
    import pickle

    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    from clinkd.data.feed import from_rows, to_row
    from clinkd.data.shards import iter_rows
    from clinkd.model.pixels import Numbers, cut, join

    rows = [row for row, _ in zip(iter_rows(data, "train"), range(32), strict=False)]
    processor = AutoImageProcessor.from_pretrained(model)
    numbers = Numbers(processor)
    images = [Image.open(io.BytesIO(row["png"])).convert("RGB") for row in rows]
    patches = [join([cut(processor, row["png"])]) for row in rows]
    floats = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    assert all(
        torch.allclose(numbers(**part), wanted, atol=1e-5)
        for part, wanted in zip(patches, floats, strict=True)
    )
    grey = np.mean([int(part["channels"][0]) == 1 for part in patches])
    print(f"one image in ms, one process ({grey:.0%} of the images are grey):")
    works: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "both: decode": (lambda row: Image.open(io.BytesIO(row["png"])).convert("RGB"), rows),
        "DataLoader: processor": (lambda image: processor(images=image, return_tensors="pt"), images),
        "DataLoader: copy of its floats": (lambda value: value.clone(), floats),
        "feed: decode, resize and cut": (lambda row: cut(processor, row["png"]), rows),
        "feed: to the object store and back": (
            lambda part: next(from_rows(pickle.loads(pickle.dumps(to_row(part), 5)))),
            patches,
        ),
        "feed: pixel values in the consumer": (lambda part: numbers(**part), patches),
    }
    for name, (work, items) in works.items():
        work(items[0])
        start = time.perf_counter()
        for item in items * 3:
            work(item)
        print(f"  {name}: {(time.perf_counter() - start) / 3 / len(items) * 1e3:.2f}")
    sizes = [sum(value.nbytes for value in part.values()) for part in patches]
    whole = np.mean([value.nbytes for value in floats])
    print(f"bytes an image: DataLoader {whole:.0f}, feed {np.mean(sizes):.0f}")


if __name__ == "__main__":
    main()
