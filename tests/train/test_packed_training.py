"""Packed batches in training: two Ray Train workers, DeepSpeed, a resume, a bad image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import CONFIG, here
from tiny_training import train

from clinkd.data.phantoms import PhantomSpec
from clinkd.data.sampler import SamplerOptions
from clinkd.data.shards import DataError, samples
from clinkd.model.rope import RopeGuidance
from clinkd.train.tasks import VqaSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=32), out, test_fraction=0.3, images_per_shard=8)
    return out


def spec_of(start: Path) -> VqaSpec:
    return VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True, coordinate_weight=3.0)


def how(tokens: int, **more: Any) -> dict[str, Any]:
    feed = {"tokens": tokens, "window_bytes": 20_000}
    return {"feed": feed, "optim": {"batch_size": 1, "questions_per_image": 2}, "checkpoint_every": 5} | more


def test_packed_batches_train_and_a_resume_changes_nothing(prepared, start, tmp_path) -> None:
    from feeding import answers, source

    spec = spec_of(start)
    options = SamplerOptions(0, 1, 2, 400, 20_000)
    sampler = source(prepared, tmp_path, answers(spec, packed=True), options).sampler(2)
    epochs = [sampler.rounds(epoch) for epoch in range(3)]
    packed = how(400, zero=1, steps=sum(epochs))
    calm = train(prepared, tmp_path / "calm", spec, **packed)
    assert [line["step"] for line in calm] == list(range(1, sum(epochs) + 1))
    assert sum(line["ce"] for line in calm[-5:]) < 0.8 * sum(line["ce"] for line in calm[:5])
    # Each epoch trains on every answer token of every sample: no sample is lost, none comes twice.
    at, tokens = 0, []
    for rounds in epochs:
        tokens.append(sum(line["tokens"] for line in calm[at : at + rounds]))
        at += rounds
    assert tokens == [answer_tokens(prepared, start)] * 3
    train(prepared, tmp_path / "torn", spec, **packed, until=epochs[0] + 1)  # in the middle of an epoch
    torn = train(prepared, tmp_path / "torn", spec, **packed)
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
    """All records fit one sequence: one rank has fillers alone, and ZeRO-3 would hang without the tower."""
    whole = how(100_000, zero=3, steps=4) | {"feed": {"tokens": 100_000}}
    lines = train(prepared, tmp_path / "three", spec_of(start), **whole)
    losses = [line["loss"] for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert {line["tokens"] for line in lines} == {answer_tokens(prepared, start)}


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
        train(data, tmp_path / "bad", spec_of(start), zero=0, steps=20, optim={"batch_size": 8})
    assert "\n" not in str(error.value)


def test_packing_by_the_configuration_from_its_epochs_to_its_refusal(tmp_path: Path) -> None:
    overrides = ["data.phantoms=24", "data.test_fraction=0.34", "guide.steps=2", "sft.steps=null",
                 "sft.epochs=1", "sft.batch_size=1", "model.max_pixels=12544",
                 "model.min_pixels=3136"]  # fmt: skip

    def clinkd(*more: str):
        return here(tmp_path, "train", "teacher", str(CONFIG), *overrides, *more)

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
