"""The teacher from the stream: two Ray Train workers, DeepSpeed, packed batches, a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import crew

from clinkd import cluster
from clinkd.config import ComputeSection, OptimSection
from clinkd.data.feed import Resources, Shards, build_index
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.plan import PlanOptions, plan_epoch
from clinkd.data.shards import DataError, samples
from clinkd.model.rope import RopeGuidance
from clinkd.train.batches import BatchSpec
from clinkd.train.feed import StreamSpec, StreamTask
from clinkd.train.loop import TrainJob
from clinkd.train.tasks import VqaSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=32), out, test_fraction=0.3, images_per_shard=8)
    return out


def train(
    prepared: Path, start: Path, out: Path, *, zero: int, steps: int | None = None, until: int | None = None,
    tokens: int = 400, ids: list[str] | None = None, failures: int = 2,
):  # fmt: skip
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    out.mkdir(exist_ok=True)
    vqa = VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True, coordinate_weight=3.0)
    batch = BatchSpec(vqa.model, vqa.guidance, packed=True)
    shards = Shards.of(prepared)
    index = build_index(shards, "train", batch.measure, ids=ids).write(out / "lengths.arrow")
    compute = ComputeSection(workers=2, checkpoint_every=5, max_failures=failures)
    cpus = cluster.feed_cpus(2, compute.cpus_per_worker, 2)
    source = StreamSpec(batch, PlanOptions(0, 1, tokens, 2, 2), str(index), shards, Resources(2, cpus))

    def make(rows, scratch):
        assert rows is None
        return StreamTask(vqa, source, zero)

    optim = OptimSection(batch_size=1, lr=5e-3)
    steps = steps or source.steps(3, 1, 2)
    job = TrainJob(
        stage="teacher", make_task=make, optim=optim, compute=compute, zero_stage=zero, steps=steps, seed=0,
        out=str(out), work=str(out / "work"), until=until,
    )  # fmt: skip
    crew(compute).fit(job, None)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], source


def test_packed_batches_train_and_a_resume_changes_nothing(prepared, start, tmp_path) -> None:
    calm, source = train(prepared, start, tmp_path / "calm", zero=1)
    epochs = [source.rounds(epoch, 2) for epoch in range(3)]
    assert [line["step"] for line in calm] == list(range(1, sum(epochs) + 1))
    assert sum(line["ce"] for line in calm[-5:]) < 0.8 * sum(line["ce"] for line in calm[:5])
    # Each epoch trains on every answer token of every sample: no sample is lost, none comes twice.
    at, tokens = 0, []
    for rounds in epochs:
        tokens.append(sum(line["tokens"] for line in calm[at : at + rounds]))
        at += rounds
    assert tokens == [answer_tokens(prepared, start)] * 3
    train(prepared, start, tmp_path / "torn", zero=1, until=epochs[0] + 1)  # in the middle of an epoch
    torn, _ = train(prepared, start, tmp_path / "torn", zero=1)
    assert [line["loss"] for line in torn] == [line["loss"] for line in calm]


def answer_tokens(prepared: Path, start: Path) -> int:
    from transformers import AutoTokenizer

    from clinkd.model.chat import encode

    tokenizer = AutoTokenizer.from_pretrained(start)
    return sum(
        len(encode(tokenizer, sample["question"], sample["answer"], 1)[1])
        for sample in samples(prepared, "train")
    )


def test_sharded_parameters_bear_a_rank_without_samples(prepared, start, tmp_path) -> None:
    """Two records fit one sequence: one rank has fillers alone, and ZeRO-3 would hang without the tower."""
    ids = sorted({sample["id"] for sample in samples(prepared, "train")})[:2]
    lines, source = train(prepared, start, tmp_path / "three", zero=3, steps=4, tokens=4000, ids=ids)
    ranks = plan_epoch(source.lengths, source.options, 0, 2)
    assert sorted(len(rank[0].sequences) for rank in ranks) == [0, 1] and len(ranks[0]) == 1
    losses = [line["loss"] for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0] and len({line["tokens"] for line in lines}) == 1


def test_a_bad_image_ends_training_with_the_records_id(prepared, start, tmp_path) -> None:
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    shard = data / "shards" / json.loads((data / "manifest.json").read_text())["shards"][0]["name"]
    table = pq.read_table(shard)
    row = table.column("split").to_pylist().index("train")
    pngs = table.column("png").to_pylist()
    pngs[row] = pngs[row][:100]
    place = table.schema.get_field_index("png")
    pq.write_table(table.set_column(place, "png", pa.array(pngs, pa.binary())), shard)
    name = table.column("id")[row].as_py()
    with pytest.raises(
        DataError, match=f"^record {name}: its image cannot be decoded .*clinkd prepare"
    ) as error:
        train(data, start, tmp_path / "bad", zero=0, failures=0)
    assert "\n" not in str(error.value)


def test_the_stage_teacher_streams_where_the_configuration_says_so(tmp_path: Path) -> None:
    tiny = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    overrides = ["data.phantoms=24", "data.test_fraction=0.34", "guide.steps=2", "sft.steps=null",
                 "sft.epochs=1", "sft.batch_size=1", "feed.mode=stream", "model.max_pixels=12544",
                 "model.min_pixels=3136"]  # fmt: skip

    def clinkd(*more: str):
        command = [sys.executable, "-m", "clinkd", "train", "teacher", str(tiny), *overrides, *more]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    done = clinkd("feed.pack_tokens=300")
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "runs" / "artifacts").glob("teacher*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(lines) == lines[-1]["total"] > 2
    processor = json.loads((metrics.parent / "model" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 3136, "longest_edge": 12544}
    refused = clinkd("feed.pack_tokens=64")
    assert refused.returncode == 2
    assert "feed.pack_tokens is 64; raise it" in refused.stderr and "Traceback" not in refused.stderr
