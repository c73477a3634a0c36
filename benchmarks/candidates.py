"""Candidates of a corrector, a second: batched with shared prompts, against other ways to sample them.

    python benchmarks/candidates.py [--misses N] [--candidates N] [--tokens N] [--rounds N] [--threads N]
                                    [--checkpoint FOLDER]

--misses corrections (image, question, truth, wrong answer) of phantoms, --candidates answers to each of at
most --tokens tokens, by the model in --checkpoint or one made here as large as configs/tiny.yaml's teacher.
Three ways: one candidate at a time; all in batches of 16 misses with every prompt read once a candidate; and
the same with each prompt read once for all its candidates, which is what stage reflect does. All run in every
round, one after the other; ratios are of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clinkd.data.boxes import to_qwen
from clinkd.data.correction import correction_prompt
from clinkd.data.images import decode
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.model import presets
from clinkd.model.chat import encode
from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.generate import generate_ids

BATCH = 16
Item = tuple[list[int], torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("misses", 32), ("candidates", 4), ("tokens", 32), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--checkpoint", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.checkpoint or new_model(chosen.misses, Path(scratch))
        sides = ways(folder, chosen)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(chosen.rounds + 1):
            for name, side in sides.items():
                start = time.perf_counter()
                written = side()
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
                assert written == chosen.misses * chosen.candidates
    medians = {name: statistics.median(found) for name, found in times.items()}
    slowest = medians["one at a time"]
    print(f"{chosen.misses} misses, {chosen.candidates} candidates each, at most {chosen.tokens} tokens")
    for name, seconds in medians.items():
        rate = chosen.misses * chosen.candidates / seconds
        print(f"{name:34}{seconds:8.2f} s {rate:9.1f} candidates/s {slowest / seconds:6.2f}x")


def new_model(misses: int, out: Path) -> Path:
    texts = []
    for turn in turns(misses):
        texts += [to_qwen(turn.question), to_qwen(turn.answer), correction_prompt("", "", "")]
    size = presets.TinySize(
        hidden=128, layers=3, heads=4, mlp=384, vision_hidden=96, vision_layers=3, image_size=112
    )
    return presets.write_new_model(texts, size, out / "model", vocab_size=1024, seed=0)


def turns(misses: int) -> list[Any]:
    """A question about each of as many phantoms."""
    spec = PhantomSpec(misses)
    drawn = [draw(spec, number)[1] for number in range(misses)]
    return [record.turns[number % len(record.turns)] for number, record in enumerate(drawn)]


def ways(folder: Path, chosen: argparse.Namespace) -> dict[str, Callable[[], int]]:
    from transformers import AutoImageProcessor, AutoTokenizer

    model = load_model(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    asked = turns(chosen.misses)
    items: list[Item] = []
    for number, turn in enumerate(asked):
        wrong = asked[(number + 1) % len(asked)].answer
        image = processor(images=[decode(draw(PhantomSpec(chosen.misses), number)[0])], return_tensors="pt")
        tokens = int(image["image_grid_thw"].prod()) // processor.merge_size**2
        prompt = correction_prompt(turn.question, turn.answer, wrong)
        ids = encode(tokenizer, prompt, "", tokens)[0]
        items.append((ids, image["pixel_values"], image["image_grid_thw"]))

    def sample(part: list[Item], repeat: int, read: int, number: int) -> int:
        """``repeat`` answers that share a prompt, to ``read`` copies of each prompt."""
        index = [image for image in range(len(part)) for _ in range(read)]
        answers = generate_ids(
            model, tokenizer, [part[image][0] for image in index], torch.cat([item[1] for item in part]),
            torch.cat([item[2] for item in part]), index, max_new_tokens=chosen.tokens, do_sample=True,
            temperature=0.7, num_return_sequences=repeat, seed=number,
        )  # fmt: skip
        return sum(map(len, answers))

    count = chosen.candidates
    parts = [items[at : at + BATCH] for at in range(0, len(items), BATCH)]
    return {
        "one at a time": lambda: sum(
            sample([item], 1, 1, number) for item in items for number in range(count)
        ),
        "batches, prompts read each time": lambda: sum(
            sample(part, 1, count, number) for number, part in enumerate(parts)
        ),
        "batches, prompts read once": lambda: sum(
            sample(part, count, 1, number) for number, part in enumerate(parts)
        ),
    }


if __name__ == "__main__":
    main()
