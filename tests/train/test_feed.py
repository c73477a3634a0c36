"""Batches from the shards: pixels as the processor's, every sample once, the same again after a resume."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from feeding import HERE, share, source, write_shard
from PIL import Image

from clinkd.data.feed import Resources, order_of
from clinkd.data.index import build_index
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.reading import Records
from clinkd.data.sampler import Batch, SamplerOptions
from clinkd.data.shards import Shards, iter_rows
from clinkd.data.tasks import FeedError
from clinkd.model.chat import encode
from clinkd.model.pixels import Numbers, blank, cut, image_tokens, join, load_processor
from clinkd.model.rope import RopeGuidance
from clinkd.train.batches import BatchSpec, batch_maker
from clinkd.train.feed import Feed, FeedSpec, Share
from clinkd.train.tasks import SupervisedTask, VqaSpec

GUIDANCE = RopeGuidance(2.0, 2.0)


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=40), out, test_fraction=0.3, images_per_shard=8)
    return out


def spec_of(prepared: Path, start: Path, folder: Path, options: SamplerOptions, **more) -> FeedSpec:
    made = BatchSpec(str(start), GUIDANCE, packed=options.tokens is not None, **more)
    return source(prepared, folder, made, options, Resources(tasks=2, cpus=0.25))


def feed_of(spec: FeedSpec, steps: int, lanes: int = 1, lane: int = 0, **more) -> Feed:
    vqa = VqaSpec(spec.maker.model, GUIDANCE, train_vision=True)
    return SupervisedTask(vqa, spec).feed(share(steps, lanes, lane, **more), torch.device("cpu"))


def rounds(spec: FeedSpec, lanes: int = 1) -> int:
    return spec.sampler(lanes).rounds(0)


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


def documents(inputs) -> list[list[int]]:
    """Ids of each document of a batch: rows by their mask; packed, text positions start anew at each, and
    padding is a document of pads."""
    if inputs["attention_mask"] is not None:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]
    found = []
    for ids, text in zip(inputs["input_ids"], inputs["position_ids"][0], strict=True):
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
@pytest.mark.parametrize("tokens", [None, 220])
def test_an_epoch_brings_every_sample_once_to_some_lane(prepared, start, tmp_path, tokens):
    spec = spec_of(prepared, start, tmp_path, SamplerOptions(3, 2, 2, tokens, window_bytes=30_000))
    count = rounds(spec, 2)
    lanes = [list(feed_of(spec, count, 2, lane)) for lane in (0, 1)]
    assert [len(batches) for batches in lanes] == [count, count]
    found = [ids for batches in lanes for inputs, *_ in batches for ids in documents(inputs)]
    wanted = expected(prepared, start)
    assert sorted(found) == wanted
    assert sum(samples for batches in lanes for _, _, samples, _ in batches) == len(wanted)
    if tokens:
        longest = max(inputs["input_ids"].shape[1] for batches in lanes for inputs, *_ in batches)
        assert longest <= tokens and sum(len(documents(batches[0][0])) for batches in lanes) > 4


@pytest.mark.slow
def test_tasks_and_the_worker_itself_make_the_same_batches(prepared, start, tmp_path):
    spec = spec_of(prepared, start, tmp_path, SamplerOptions(3, 2, 2, 220))
    found = [list(feed_of(one, 6)) for one in (spec, replace(spec, resources=HERE))]
    for (one, *counts), (other, *same) in zip(*found, strict=True):
        assert counts == same and one.keys() == other.keys()
        assert all(one[name] is other[name] or torch.equal(one[name], other[name]) for name in one)


def test_a_feed_goes_on_with_the_same_batches(prepared, start, tmp_path):
    spec = replace(
        spec_of(prepared, start, tmp_path, SamplerOptions(3, 1, 1, 220, window_bytes=30_000)), resources=HERE
    )
    count = rounds(spec, 2)
    whole = feed_of(spec, count + 3, 2, 1)  # into the second epoch
    before = [next(whole) for _ in range(count - 2)]
    state = json.loads(json.dumps(whole.state()))
    assert state == {"epoch": 0, "round": count - 2}
    rest, again = list(whole), list(feed_of(spec, count + 3, 2, 1, step=count - 2, state=state))
    assert len(before) + len(rest) == count + 3 and len(again) == 5
    for (one, *counts), (other, *same) in zip(rest, again, strict=True):
        assert counts == same and one.keys() == other.keys()
        assert all(one[name] is other[name] or torch.equal(one[name], other[name]) for name in one)
    assert whole.state() == {"epoch": 1, "round": 3}
    assert documents(before[0][0]) != documents(rest[2][0])  # the second epoch begins otherwise


def test_one_worker_works_off_the_lanes_of_two(prepared, start, tmp_path):
    """Each step has the micro-batches that two would have had, and the last of its own places is nobody's."""
    spec = replace(spec_of(prepared, start, tmp_path, SamplerOptions(3, 2)), resources=HERE)
    lanes = [[documents(inputs) for inputs, *_ in feed_of(spec, 4, 2, lane)] for lane in (0, 1)]
    task = SupervisedTask(VqaSpec(spec.maker.model, GUIDANCE, train_vision=True), spec)
    alone = list(task.feed(Share(2, 1, (0, 1, None), 0, 4, 4), torch.device("cpu")))
    assert [documents(inputs) for inputs, _, _, counts in alone if counts] == [
        lanes[lane][step] for step in range(4) for lane in (0, 1)
    ]
    assert [counts for *_, counts in alone] == 4 * [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conversations", "tokens"),
    [
        pytest.param(False, 500, marks=pytest.mark.full),
        pytest.param(True, None, marks=pytest.mark.full),
        (True, 500),
    ],
)
def test_losses_do_not_depend_on_what_shares_a_sequence(prepared, start, tmp_path, tokens, conversations):
    """The same samples packed and padded: the same answer tokens and the same sum of losses."""
    vqa = VqaSpec(str(start), GUIDANCE, train_vision=True, coordinate_weight=3.0)
    ways = {
        "plain": (SamplerOptions(0, 3, 2), False),
        "other": (SamplerOptions(0, 3, 2, tokens), conversations),
    }
    sums: dict[str, dict[str, float]] = {}
    names: dict[str, list[str]] = {}
    for way, (options, whole) in ways.items():
        (tmp_path / way).mkdir()
        spec = replace(spec_of(prepared, start, tmp_path / way, options, conversations=whole), resources=HERE)
        task = SupervisedTask(vqa, spec)
        module = task.build().eval()
        feed = task.feed(share(rounds(spec)), torch.device("cpu"))
        found, names[way] = {"tokens": 0.0, "samples": 0.0}, []
        with torch.no_grad():
            for inputs, count, samples, _ in feed:
                found = {"tokens": found["tokens"] + count, "samples": found["samples"] + samples} | {
                    name: found.get(name, 0.0) + value.item() for name, value in module(**inputs).items()
                }
                names[way] += feed.names()
        sums[way] = found
    assert [sums["other"][key] for key in ("tokens", "samples")] == [
        sums["plain"][key] for key in ("tokens", "samples")
    ]
    first = [name for name in names["plain"] if name.endswith("#0")] if conversations else names["plain"]
    assert sorted(names["other"]) == sorted(first)
    for name in ("loss", "ce"):
        if conversations:  # later turns see the earlier ones: another loss, of the same size
            ratio = sums["other"][name] / sums["plain"][name]
            assert 0.9 < ratio < 1.1 and ratio != pytest.approx(1, rel=1e-6)
        else:
            assert sums["other"][name] == pytest.approx(sums["plain"][name], rel=1e-5)


@pytest.mark.parametrize("tokens", [None, 10**6])
def test_a_filler_costs_nothing_and_runs_the_tower(prepared, start, tmp_path, tokens):
    spec = replace(spec_of(prepared, start, tmp_path, SamplerOptions(0, 10**6, 9, tokens)), resources=HERE)
    assert rounds(spec, 2) == 1
    task = SupervisedTask(VqaSpec(str(start), GUIDANCE, train_vision=True), spec)
    module = task.build()
    ran = []
    module.model.model.visual.register_forward_hook(lambda *_: ran.append(True))
    ((inputs, count, samples, counts),) = task.feed(Share(2, 1, (None,), 0, 1, 1), torch.device("cpu"))
    assert (count, samples, counts) == (0, 0, False)
    loss = module(**inputs)["loss"]
    loss.backward()
    assert loss.item() == 0 and ran
    for name, value in module.named_parameters():
        assert value.grad is not None and not value.grad.any(), name


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


def test_records_of_several_images_show_all_of_them(start, tmp_path):
    """Alone or packed with others, each document has its own images, in order, once in the batch."""
    rows = [record("a", PICTURES[:1], 1), record("b", PICTURES[1:4], 2), record("c", PICTURES[4:6], 1)]
    folder = write_shard(tmp_path / "data", rows)
    maker = batch_maker(BatchSpec(str(start), GUIDANCE, packed=True))
    sequences = (((0, (0,)), (1, (0, 1)), (2, (0,))),)
    index = build_index(Shards.of(folder), "train")
    order = order_of(index, Batch((0, 0), sequences), 0)
    arrays = maker.batch(order, Records(Shards.of(folder), 1 << 20))
    shown = documents({"attention_mask": None} | arrays)
    assert int(arrays["samples"][0]) == 4 and len(shown) == 4
    cuts = {row["id"]: [cut(maker.processor, png) for png in (row["png"], *row["more_png"])] for row in rows}
    assert len(arrays["image_grid_thw"]) == 6  # the three of "b" once, though two documents show them
    image_id = maker.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    segments = [arrays["image_grid_thw"][at].prod() // 4 for at in arrays["image_index"]]
    assert sum(segments) == (arrays["input_ids"] == image_id).sum() and len(segments) == 1 + 3 + 3 + 2
    at = 0
    for ids in shown:
        name = {1: "a", 3: "b", 2: "c"}[ids.count(maker.tokenizer.convert_tokens_to_ids("<|vision_start|>"))]
        for image in cuts[name]:
            place = arrays["image_index"][at]
            assert tuple(arrays["image_grid_thw"][place]) == image.grid
            starts = [0, *np.cumsum(arrays["image_grid_thw"].prod(1) * arrays["channels"] * 14 * 14)]
            assert np.array_equal(
                arrays["pixels"][starts[place] : starts[place + 1]], image.values.reshape(-1)
            )
            at += 1


@pytest.mark.slow
def test_a_bad_image_ends_the_feed_with_the_records_id(ray_session, start, tmp_path):
    rows = [record(f"r{at}", [PICTURES[0]], 1) for at in range(6)]
    rows[4]["png"] = rows[4]["png"][:60]
    spec = spec_of(write_shard(tmp_path / "data", rows), start, tmp_path, SamplerOptions(0, 1))
    for resources in (spec.resources, HERE):
        with pytest.raises(
            FeedError, match=r"^record r4: its image cannot be decoded .*clinkd prep"
        ) as error:
            list(feed_of(replace(spec, resources=resources), 6))
        assert "\n" not in str(error.value)


def test_an_image_of_another_size_than_the_shard_says_is_refused(start, tmp_path):
    row = record("r0", [picture("L", (300, 40))], 1)
    spec = spec_of(write_shard(tmp_path / "a", [row]), start, tmp_path, SamplerOptions(0, 1, 1, 400))
    assert len(list(feed_of(replace(spec, resources=HERE), 1))) == 1
    folder = write_shard(tmp_path / "b", [row | {"id": "r1", "width": 40}])
    spec = spec_of(folder, start, tmp_path, SamplerOptions(0, 1, 1, 400))
    with pytest.raises(FeedError, match=r"record r1: images of \[\d+\] tokens instead of \[\d+\]"):
        list(feed_of(replace(spec, resources=HERE), 1))


@pytest.mark.parametrize("how", ["gone", "torn", "replaced"])
def test_a_shard_that_is_gone_torn_or_replaced_is_named(start, tmp_path, how):
    rows = [record(f"r{at}", [PICTURES[0]], 1) for at in range(3)]
    folder = write_shard(tmp_path / "data", rows)
    spec = replace(spec_of(folder, start, tmp_path, SamplerOptions(0, 1)), resources=HERE)
    shard = folder / "shards" / "part-00000.parquet"
    content = shard.read_bytes()
    shard.unlink()
    if how != "gone":
        shard.write_bytes(content[: len(content) // 2] if how == "torn" else content)
    with pytest.raises(FeedError, match=r"part-00000.parquet: row group 0 cannot be read .* changed since"):
        list(feed_of(spec, 1))


def test_a_record_above_every_budget_is_read_alone(start, tmp_path):
    """A row group and an image larger than what is kept: both are there, one at a time."""
    rows = [record(f"r{at}", [picture("RGB", (400, 400))], 1) for at in range(6)]
    spec = spec_of(
        write_shard(tmp_path / "data", rows), start, tmp_path, SamplerOptions(0, 1, window_bytes=1)
    )
    found = list(feed_of(replace(spec, resources=Resources(tasks=0, kept_bytes=1)), 6))
    assert sorted(ids for inputs, *_ in found for ids in documents(inputs)) == expected(
        tmp_path / "data", start
    )
