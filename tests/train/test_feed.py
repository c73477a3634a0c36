"""Batches from the shards: pixels as the processor's, every sample once, the same again after a resume."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clinkd.data.feed import Asked, FeedError, Resources, Shards, build_index, run_job
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.plan import PlanOptions
from clinkd.data.shards import iter_rows, schema
from clinkd.model.chat import encode
from clinkd.model.pixels import Numbers, blank, cut, image_tokens, join, load_processor
from clinkd.model.rope import RopeGuidance
from clinkd.train.batches import BatchSpec, batch_maker
from clinkd.train.feed import Stream, StreamSpec, StreamTask
from clinkd.train.tasks import SupervisedTask, VqaSpec

GUIDANCE = RopeGuidance(2.0, 2.0)


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=40), out, test_fraction=0.3, images_per_shard=8)
    return out


def spec_of(prepared: Path, start: Path, folder: Path, options: PlanOptions, **batch) -> StreamSpec:
    made = BatchSpec(str(start), GUIDANCE, packed=options.tokens is not None, **batch)
    shards = Shards.of(prepared)
    path = build_index(shards, "train", made.measure).write(folder / "lengths.arrow")
    return StreamSpec(made, options, str(path), shards, Resources(tasks=2, cpus=0.25))


def expected(prepared: Path, start: Path, split: str = "train") -> list[list[int]]:
    """Ids of every sample, encoded one by one."""
    maker = batch_maker(BatchSpec(str(start), GUIDANCE, packed=True))
    found = []
    for row in iter_rows(prepared, split):
        tokens = image_tokens(maker.processor, row["height"], row["width"])
        for turn in row["turns"]:
            prompt, answer = encode(maker.tokenizer, turn["question"], turn["answer"], tokens)
            found.append(prompt + answer)
    return sorted(found)


def documents(arrays) -> list[list[int]]:
    """Ids of each document of a batch: text positions start anew at each, padding is a document of pads."""
    found = []
    for ids, text in zip(arrays["input_ids"], arrays["position_ids"][0], strict=True):
        starts = [*np.flatnonzero(text == 0).tolist(), len(ids)]
        found += [ids[a:b].tolist() for a, b in pairwise(starts)]
    return [ids for ids in found if len(set(ids)) > 1]


def picture(mode: str, size: tuple[int, int], kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


PICTURES = [
    picture("RGB", (90, 61)), picture("L", (200, 40)), picture("P", (64, 64)), picture("1", (50, 80)),
    picture("RGBA", (70, 70)), picture("RGB", (120, 99), "JPEG"), picture("L", (33, 500), "JPEG"),
]  # fmt: skip


@pytest.mark.parametrize("steps", [{}, {"temporal_patch_size": 2, "patch_size": 8}, {"do_normalize": False}])
def test_pixel_values_are_the_processors(steps):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 112**2}, **steps)
    greys = [Image.open(io.BytesIO(PICTURES[1])).convert("RGB")]
    buffer = io.BytesIO()
    greys[0].save(buffer, "PNG")  # grey, but written in three channels
    contents = [*PICTURES, buffer.getvalue()]
    found = join([cut(processor, content) for content in contents])
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    wanted = processor(images=images, return_tensors="pt")
    assert found["image_grid_thw"].tolist() == wanted["image_grid_thw"].tolist()
    torch.testing.assert_close(Numbers(processor)(**found), wanted["pixel_values"], atol=2e-6, rtol=0)
    assert found["channels"].tolist() == (
        [0] * 8 if steps.get("do_normalize") is False else [3, 1, 3, 1, 3, 3, 1, 1]
    )
    for image, grid in zip(images, found["image_grid_thw"], strict=True):
        assert image_tokens(processor, image.height, image.width) == grid.prod() // processor.merge_size**2
    dark = join([blank(processor)])
    assert Numbers(processor)(**dark).shape == (processor.merge_size**2, wanted["pixel_values"].shape[1])


def test_configured_limits_go_before_the_folders(start, tmp_path):
    folder = load_processor(str(start))
    assert image_tokens(folder, 512, 512) == 16
    changed = load_processor(str(start), min_pixels=28 * 28, max_pixels=56 * 56)
    assert image_tokens(changed, 512, 512) == 4 and image_tokens(changed, 28, 28) == 1
    changed.save_pretrained(tmp_path)
    assert (
        image_tokens(load_processor(str(tmp_path)), 512, 512) == 4
    )  # what it trained with goes with the model
    with pytest.raises(ValueError, match=r"model.min_pixels 999999 is above model.max_pixels 12544"):
        load_processor(str(start), min_pixels=999999)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [pytest.param(None, marks=pytest.mark.full), 220])
def test_an_epoch_brings_every_sample_once_to_some_rank(prepared, start, tmp_path, tokens):
    spec = spec_of(prepared, start, tmp_path, PlanOptions(3, 2, tokens, per_group=2, window=2))
    rounds = spec.rounds(0, 2)
    ranks = [list(Stream(spec, rank, 2, rounds)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [rounds, rounds]
    found = [ids for batches in ranks for arrays in batches for ids in documents(arrays)]
    wanted = expected(prepared, start)
    assert sorted(found) == wanted
    assert sum(int(arrays["samples"][0]) for batches in ranks for arrays in batches) == len(wanted)
    if tokens:
        longest = max(arrays["input_ids"].shape[1] for batches in ranks for arrays in batches)
        assert longest <= tokens and sum(len(documents(batches[0])) for batches in ranks) > 4


@pytest.mark.slow
def test_a_resumed_stream_goes_on_with_the_same_batches(prepared, start, tmp_path):
    spec = spec_of(prepared, start, tmp_path, PlanOptions(3, 1, 220, window=2))
    rounds = spec.rounds(0, 2)
    whole = Stream(spec, 1, 2, rounds + 3)  # into the second epoch
    before = [next(whole) for _ in range(rounds - 2)]
    state = json.loads(json.dumps(whole.position.state()))
    assert state == {"epoch": 0, "past": [[2, rounds - 2]]}
    rest, again = list(whole), list(Stream(spec, 1, 2, 5, state))
    assert len(before) + len(rest) == rounds + 3 and len(again) == 5
    for one, other in zip(rest, again, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert whole.position.state() == {"epoch": 1, "past": [[2, 3]]}
    assert documents(before[0]) != documents(rest[2])  # the second epoch begins otherwise


@pytest.mark.slow
def test_other_ranks_bring_what_is_left_of_an_epoch(prepared, start, tmp_path):
    spec = spec_of(prepared, start, tmp_path, PlanOptions(3, 1, 220, window=2))
    ranks = [Stream(spec, rank, 2, 3) for rank in (0, 1)]
    found = [ids for rank in ranks for arrays in rank for ids in documents(arrays)]
    state = ranks[0].position.state()
    left = spec.rounds(0, 1, ((2, 3),))
    alone = Stream(spec, 0, 1, left, state)
    found += [ids for arrays in alone for ids in documents(arrays)]
    assert sorted(found) == expected(prepared, start)
    assert alone.position.state() == {"epoch": 1, "past": [[1, 0]]}


@pytest.mark.slow
def test_where_nothing_is_left_other_ranks_begin_the_next_epoch(prepared, start, tmp_path):
    spec = spec_of(prepared, start, tmp_path, PlanOptions(3, 1, 220, window=2))
    done = {"epoch": 0, "past": [[2, spec.rounds(0, 2)]]}
    assert Stream(spec, 0, 1, 1, done).position.state() == {"epoch": 1, "past": [[1, 0]]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conversations", "tokens"),
    [
        pytest.param(False, None, marks=pytest.mark.full),
        pytest.param(False, 500, marks=pytest.mark.full),
        pytest.param(True, None, marks=pytest.mark.full),
        (True, 500),
    ],
)
def test_losses_are_those_of_the_table(prepared, start, tmp_path, tokens, conversations):
    """The same samples by both ways: the same answer tokens and the same sum of losses."""
    import ray.data

    from clinkd.data.shards import shard_paths

    vqa = VqaSpec(str(start), GUIDANCE, train_vision=True, coordinate_weight=3.0)
    rows = ray.data.read_parquet([str(path) for path in shard_paths(prepared)])
    table = SupervisedTask(rows.filter(expr=ray.data.expressions.col("split") == "train"), tmp_path, vqa)
    module = table.build().eval()
    groups = [(record, tuple(range(count))) for record, count in enumerate(table.turn_counts())]
    spec = spec_of(
        prepared, start, tmp_path, PlanOptions(0, 3, tokens, per_group=2), conversations=conversations
    )
    task = StreamTask(vqa, spec)
    feed = task.feed(0, 1, spec.rounds(0, 1), None, torch.device("cpu"))
    with torch.no_grad():
        wanted, count = table.batch(groups, 0, 1)
        losses = module(**wanted)
        streamed = {"loss": 0.0, "ce": 0.0}
        tokens_seen = 0
        names = []
        for inputs, tokens_here, samples in feed:
            tokens_seen += tokens_here
            names += feed.names()
            assert conversations or len(feed.names()) == samples
            for name, value in module(**inputs).items():
                streamed[name] += value.item()
    assert tokens_seen == count
    documents = [(record, turns[:1]) for record, turns in groups] if conversations else groups
    assert sorted(names) == sorted(table.names(documents))
    for name, value in streamed.items():
        if conversations:  # later turns see the earlier ones: another loss, of the same size
            assert 0.9 < value / losses[name].item() < 1.1 and value != pytest.approx(
                losses[name].item(), rel=1e-6
            )
        else:
            assert value == pytest.approx(losses[name].item(), rel=1e-5)


@pytest.mark.slow
def test_a_filler_costs_nothing_and_runs_the_tower(prepared, start, tmp_path):
    spec = spec_of(prepared, start, tmp_path, PlanOptions(0, 1, 10**6, per_group=9, window=99))
    batches = [list(Stream(spec, rank, 2, spec.rounds(0, 2))) for rank in (0, 1)]
    assert [len(found) for found in batches] == [1, 1]
    task = StreamTask(VqaSpec(str(start), GUIDANCE, train_vision=True), spec)
    module = task.build()
    ran = []
    module.model.model.visual.register_forward_hook(lambda *_: ran.append(True))
    feeds = [task.feed(rank, 2, 1, None, torch.device("cpu")) for rank in (0, 1)]
    found = [next(feed) for feed in feeds]
    filler = next(batch for batch in found if batch[2] == 0)
    assert filler[1] == 0
    loss = module(**filler[0])["loss"]
    loss.backward()
    assert loss.item() == 0 and ran
    for name, value in module.named_parameters():
        assert value.grad is not None and not value.grad.any(), name


def write_shard(folder: Path, rows: list[dict]) -> Path:
    """A prepared folder of one shard, written by hand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "shards").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema()), folder / "shards" / "part-00000.parquet", row_group_size=4
    )
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"name": "part-00000.parquet"}]}))
    return folder


def record(name: str, pngs: list[bytes], turns: int) -> dict:
    sizes = [Image.open(io.BytesIO(png)).size for png in pngs]
    asked = [
        {"task": "roc", "question": f"What is number {turn}?", "answer": f"It is {turn}.", "trusted": True}
        for turn in range(turns)
    ]
    more = [{"image": f"{name}-{at}", "width": w, "height": h} for at, (w, h) in enumerate(sizes[1:])]
    return {
        "id": name, "image": f"{name}.png", "modality": "ct", "split": "train", "png": pngs[0],
        "width": sizes[0][0], "height": sizes[0][1], "turns": asked,
        "more_images": more, "more_png": pngs[1:],
    }  # fmt: skip


@pytest.mark.slow
def test_records_of_several_images_show_all_of_them(ray_session, start, tmp_path):
    """Alone or packed with others, each document has its own images, in order, once in the batch."""
    rows = [record("a", PICTURES[:1], 1), record("b", PICTURES[1:4], 2), record("c", PICTURES[4:6], 1)]
    folder = write_shard(tmp_path / "data", rows)
    spec = spec_of(folder, start, tmp_path, PlanOptions(0, 1, 600, per_group=2))
    (arrays,) = Stream(spec, 0, 1, 1)
    assert int(arrays["samples"][0]) == 4 and len(documents(arrays)) == 4
    maker = batch_maker(spec.batch)
    cuts = {row["id"]: [cut(maker.processor, png) for png in (row["png"], *row["more_png"])] for row in rows}
    assert len(arrays["image_grid_thw"]) == 6  # the three of "b" once, though two documents show them
    image_id = maker.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    segments = [arrays["image_grid_thw"][at].prod() // 4 for at in arrays["image_index"]]
    assert sum(segments) == (arrays["input_ids"] == image_id).sum() and len(segments) == 1 + 3 + 3 + 2
    at = 0
    for ids in documents(arrays):
        name = {1: "a", 3: "b", 2: "c"}[ids.count(maker.tokenizer.convert_tokens_to_ids("<|vision_start|>"))]
        for image in cuts[name]:
            shown = arrays["image_index"][at]
            assert tuple(arrays["image_grid_thw"][shown]) == image.grid
            starts = [0, *np.cumsum(arrays["image_grid_thw"].prod(1) * arrays["channels"] * 14 * 14)]
            assert np.array_equal(
                arrays["pixels"][starts[shown] : starts[shown + 1]], image.values.reshape(-1)
            )
            at += 1


@pytest.mark.slow
def test_a_bad_image_ends_the_stream_with_the_records_id(ray_session, start, tmp_path):
    rows = [record(f"r{at}", [PICTURES[0]], 1) for at in range(6)]
    rows[4]["png"] = rows[4]["png"][:60]
    spec = spec_of(write_shard(tmp_path / "data", rows), start, tmp_path, PlanOptions(0, 1))
    with pytest.raises(FeedError, match=r"^record r4: its image cannot be decoded .*clinkd prepare") as error:
        list(Stream(spec, 0, 1, 6))
    assert "\n" not in str(error.value)


def test_an_image_of_another_size_than_the_shard_says_is_refused(start):
    row = record("r0", [picture("L", (300, 40))], 1)
    maker = batch_maker(BatchSpec(str(start), GUIDANCE, packed=False))
    tokens = maker.lengths(row)[0]
    maker.batch([[Asked(row, (0,), tokens)]])
    stated = row | {"id": "r1", "width": 40}
    with pytest.raises(FeedError, match=r"record r1: \d+ tokens instead of \d+"):
        maker.batch([[Asked(stated, (0,), maker.lengths(stated)[0])]])


def test_a_shard_that_is_gone_is_named(ray_session, start, tmp_path):
    rows = [record(f"r{at}", [PICTURES[0]], 1) for at in range(3)]
    folder = write_shard(tmp_path / "data", rows)
    spec = spec_of(folder, start, tmp_path, PlanOptions(0, 1))
    (folder / "shards" / "part-00000.parquet").unlink()
    with pytest.raises(FeedError, match=r"part-00000.parquet: row group 0 cannot be read"):
        list(run_job([[[((0, 0, 0), (0,), 9)]]], spec.shards, spec.batch.make))
