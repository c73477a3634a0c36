"""Answers a second: in batches ordered by length, as `clinkd predict` gives them, against one at a time.

    python benchmarks/predict.py [--images N] [--tokens N] [--batch N] [--rounds N] [--threads N]
                                 [--checkpoint FOLDER]

All questions of --images phantoms, answered greedily with at most --tokens tokens by the model in
--checkpoint, or by one made here as large as configs/tiny.yaml's student. Both sides are the same actor with
another batch size; their answers are compared. Both run in every round, one after the other; the ratio is of
the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from phantom_task import phantom_table, write_model

from clinkd.evaluate.predict import Answerer, PredictSpec
from clinkd.model.presets import TinySize

STUDENT = TinySize(
    hidden=128, layers=3, heads=4, mlp=192, vision_hidden=96, vision_layers=3, patch=14, image_size=112
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("images", 24), ("tokens", 64), ("batch", 64), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--checkpoint", type=Path)
    chosen = parser.parse_args()
    table = phantom_table(chosen.images)
    records = [{**row, "image": row["id"], "more_png": []} for row in table.to_pylist()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.checkpoint or write_model(table, STUDENT, Path(scratch) / "model")
        sides = {
            "one at a time" if size == 1 else f"batches of {size}": Answerer(
                PredictSpec(str(folder), size, chosen.tokens, threads=chosen.threads)
            )
            for size in (1, chosen.batch)
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        answers: list[dict[str, Any]] = []
        for number in range(chosen.rounds + 1):
            answers = []
            for name, side in sides.items():
                start = time.perf_counter()
                answers.append({row["sample"]: row["responses"] for row in side.answer(records)})
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    alike = sum(answers[0][name] == answers[1][name] for name in answers[0])
    medians = [statistics.median(found) for found in times.values()]
    print(f"{len(answers[0])} questions, {alike} answered alike")
    for name, seconds in zip(times, medians, strict=True):
        rate = len(answers[0]) / seconds
        print(f"{name:20}{seconds:8.2f} s {rate:9.1f} answers/s {medians[0] / seconds:6.2f}x")


if __name__ == "__main__":
    main()
