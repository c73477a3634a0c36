"""A whole small training, real but for Ray: what it tells the metrics, from its first step to its last copy.

In a process of its own, which may have torch.distributed for itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def train_and_listen(out: Path) -> None:
    """Twelve steps on one rank, the third of which is not finite; prints (name, value, tags) of all."""
    import torch.distributed as dist
    from line_task import LineTask

    from clinkd import metrics
    from clinkd.config import ComputeSection, OptimSection
    from clinkd.train.loop import TrainJob, Worker

    told: list[tuple[str, float, dict[str, str]]] = []

    class Listener:
        def __init__(self, quantity: metrics.Quantity) -> None:
            self.name = quantity.name

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append((self.name, value, tags))

        inc = set

    metrics._in_ray, metrics._made = lambda: True, Listener  # type: ignore[assignment]
    metrics.about(run="mine", stage="line", rank="0")
    dist.init_process_group("gloo", rank=0, world_size=1)
    job = TrainJob(
        stage="line", make_task=lambda: LineTask(2, nan=(3,)),
        optim=OptimSection(batch_size=2, lr=0.05), compute=ComputeSection(workers=1, checkpoint_every=5),
        zero_stage=1, steps=12, seed=3, out=str(out), work=str(out / "work"), run="mine",
        store=str(out / "store"),
    )  # fmt: skip
    Worker(job, job.make_task(), 0, 1).run()
    (out / "told.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_each_step_checkpoint_and_copy_of_a_training_is_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "train")]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    values = {name: [value for other, value, _ in told if other == name] for name, _, _ in told}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert values["clinkd_train_done_steps"] == [line["step"] for line in lines] == list(range(1, 13))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 11 and values["clinkd_train_loss_nats"] == pytest.approx(losses, abs=1e-5)
    assert sum(values["clinkd_train_seen_samples"]) == 24
    assert values["clinkd_train_nonfinite_steps"] == [1]
    assert len(values["clinkd_train_finite_step_timestamp_seconds"]) == 11
    assert len(values["clinkd_checkpoint_saved_timestamp_seconds"]) == 2  # after steps 5 and 10
    assert len(values["clinkd_checkpoint_sent_timestamp_seconds"]) == 2
    assert values["clinkd_checkpoint_size_bytes"][0] > 1000
    assert {tuple(tags.items()) for _, _, tags in told} == {(("run", "mine"), ("stage", "line"))}


if __name__ == "__main__":
    train_and_listen(Path(sys.argv[1]))
