"""Questions about several images: all are seen, in order, by everything that shows a model a record."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import answers, batch, source, write_shard
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from clinkd.data.codec import BoxCodec
from clinkd.data.images import decode
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.model import chat, presets
from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.generate import generate_answers
from clinkd.model.rope import RopeGuidance
from clinkd.train.online_task import prompts_of

torch.set_num_threads(1)
SIZE = presets.TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
SPEC = PhantomSpec(6, size=112)


def shown(index: int) -> bytes:
    """Images of two shapes, so that a mixed-up order does not go unseen."""
    buffer = io.BytesIO()
    decode(draw(SPEC, index)[0]).crop((0, 0, 112, 48 if index % 2 else 112)).save(buffer, "PNG")
    return buffer.getvalue()


def row(name: str, *images: int) -> dict[str, Any]:
    """A row of a shard: two turns about the named phantoms."""
    turns = [
        {"task": "mia", "question": "What do they show?", "answer": "The liver.", "trusted": True},
        {"task": "mia", "question": "Which is larger?", "answer": "The left kidney is.", "trusted": True},
    ]
    first, *more = images
    others = [{"image": f"ct_{image}.png", "width": 56, "height": 56} for image in more]
    return {
        "id": name, "image": f"ct_{first}.png", "modality": "ct", "split": "train", "png": shown(first),
        "width": 56, "height": 56, "turns": turns, "more_images": others,
        "more_png": [shown(image) for image in more],
    }  # fmt: skip


ROWS = [row("a", 0), row("b", 1, 2), row("c", 3), row("d", 2, 1, 4), row("e", 2, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [draw(SPEC, index)[1] for index in range(6)]
    texts = [text for record in records for turn in record.turns for text in (turn.question, turn.answer)]
    out = tmp_path_factory.mktemp("model")
    return presets.write_new_model(texts, SIZE, out, vocab_size=500, seed=0)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def task(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What trains: rows A to E from a shard, with guidance by pair."""
    from clinkd.data.scores import FILE, write_scores
    from clinkd.train.tasks import SupervisedTask, VqaSpec

    scratch = tmp_path_factory.mktemp("scratch")
    names = [f"{one['id']}#{turn}" for one in ROWS for turn in range(2)]
    images = [1 + len(one["more_images"] or []) for one in ROWS for _ in range(2)]
    write_scores(
        scratch, names, [number / 10 for number in range(len(names))],
        relevance=[list(range(4 * count)) for count in images],
        rows=[[2] * count for count in images], columns=[[2] * count for count in images],
    )  # fmt: skip
    guidance = RopeGuidance(1.5, 2.0, gamma=0.5, mode="pair")
    spec = VqaSpec(str(folder), guidance, True, scores=str(scratch / FILE))
    return SupervisedTask(spec, source(write_shard(scratch / "data", ROWS), scratch, answers(spec)))


def shown_by(task: Any, groups: list[Any]) -> dict[str, Any]:
    """A batch, and the prompts of its rows."""
    inputs, _ = batch(task, groups)
    return inputs | {"prompts": prompts_of(inputs["input_ids"], inputs["labels"])}


# Text.


def test_every_image_has_its_place_in_front_of_the_question(tokenizer: Any) -> None:
    pad, start = (tokenizer.convert_tokens_to_ids(token) for token in (presets.IMAGE, presets.VISION_START))
    prompt, _ = chat.encode(tokenizer, "Which is larger?", "", [2, 3])
    places = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    places += "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>Which is larger?"
    assert places in tokenizer.decode(prompt)
    assert (prompt.count(pad), prompt.count(start)) == (5, 2)


def test_one_image_is_told_as_ever(tokenizer: Any) -> None:
    assert chat.encode(tokenizer, "Where?", "There.", [4]) == chat.encode(tokenizer, "Where?", "There.", 4)


@pytest.mark.parametrize("counts", [[], [3, 0], 0])
def test_an_image_without_tokens_is_an_error(tokenizer: Any, counts: Any) -> None:
    with pytest.raises(ValueError, match="image of 0 tokens"):
        chat.encode(tokenizer, "Where?", "", counts)


def test_boxes_go_in_and_come_out_in_the_codecs_unit(tokenizer: Any) -> None:
    codec = BoxCodec("pixels", 560, 1120)
    question, answer = "What is at <box>(100,200),(300,400)</box>?", "It is at <box>(0,0),(1000,1000)</box>."
    prompt, ids = chat.encode(tokenizer, question, answer, 3, codec)
    assert "<|box_start|>(56,224),(168,448)<|box_end|>" in tokenizer.decode(prompt)
    assert "(560,1120)" in tokenizer.decode(ids)
    assert chat.decode_answer(tokenizer, ids, codec) == answer


# The model.


@torch.no_grad()
def test_logits_about_two_images_are_those_of_transformers(folder: Path, tokenizer: Any) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    found = processor(images=[decode(shown(1)), decode(shown(2))], return_tensors="pt")
    counts = (found["image_grid_thw"].prod(-1) // 4).tolist()
    assert found["image_grid_thw"][0].tolist() != found["image_grid_thw"][1].tolist()
    prompt, answer = chat.encode(tokenizer, "Which is larger?", "The liver.", counts)
    ids = torch.tensor([[*prompt, *answer]])
    ours = load_model(folder, RopeGuidance()).eval()
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    wanted = theirs(
        input_ids=ids, mm_token_type_ids=(ids == ours.config.image_token_id).int(), **found
    ).logits
    hidden = ours.forward_hidden(ids, torch.ones_like(ids), found["image_grid_thw"], found["pixel_values"])
    torch.testing.assert_close(ours.lm_head(hidden), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mixed_batch_trains_on_what_each_row_shows_alone(task: Any) -> None:
    model = task.load().eval()

    def states(groups: list) -> list[torch.Tensor]:
        inputs, _ = batch(task, groups)
        labels = inputs.pop("labels")
        hidden = model.forward_hidden(**inputs)
        return [hidden[number][labels[number] != -100] for number in range(len(labels))]

    mixed = states([(0, (0, 1)), (1, (1,)), (3, (0,)), (2, (0,)), (4, (1, 0)), (1, (0,))])
    asked = [(0, 0), (0, 1), (1, 1), (3, 0), (2, 0), (4, 1), (4, 0), (1, 0)]
    for found, (record, turn) in zip(mixed, asked, strict=True):
        (alone,) = states([(record, (turn,))])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    # The same images in another order are another question.
    assert not torch.allclose(mixed[2], mixed[5], atol=1e-3)


def test_a_batch_names_each_image_once(task: Any) -> None:
    pictures, _ = batch(task, [(1, (0, 1)), (0, (0,)), (3, (1,))])
    assert pictures["image_index"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert len(pictures["image_grid_thw"]) == 6
    assert len(pictures["pixel_values"]) == int(pictures["image_grid_thw"].prod(-1).sum())


@torch.no_grad()
def test_alignment_is_a_rows_and_guides_all_its_images(task: Any) -> None:
    """Pair guidance widens the gap before each image of the row, and no other row's."""
    inputs, _ = batch(task, [(0, (0,)), (1, (0,))])
    model = task.load()
    grids = inputs["image_grid_thw"][inputs["image_index"]]

    def reached(low: float, high: float) -> list[float]:
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], image_grid_thw=grids, attention_mask=inputs["attention_mask"],
            alignment=torch.tensor([[low], [high]]),
        )  # fmt: skip
        return positions.amax((0, 2)).tolist()

    aligned, strange = reached(1.0, 1.0), reached(1.0, 0.0)
    assert aligned[0] == strange[0]
    assert strange[1] - aligned[1] == pytest.approx(2 * 2 * 0.5 * 2.0)  # 2 images, 2 gaps, gamma, lambda_w


@pytest.mark.parametrize("repeat", [1, 2])
def test_generation_with_images_of_several_rows(folder: Path, tokenizer: Any, task: Any, repeat: int) -> None:
    model = load_model(folder, RopeGuidance(1.5, 2.0)).eval()
    groups = [(1, (0,)), (0, (1,)), (3, (0,)), (4, (0,))]
    options = {"max_new_tokens": 8, "do_sample": repeat > 1, "num_return_sequences": repeat, "seed": 3}

    def answers(chosen: list, new: dict) -> list[list[str]]:
        shown = shown_by(task, chosen)
        return generate_answers(
            model, tokenizer, shown["prompts"], shown["pixel_values"], shown["image_grid_thw"],
            shown["image_index"], **new,
        )  # fmt: skip

    together = answers(groups, options)
    assert [len(found) for found in together] == [repeat] * 4
    if repeat == 1:
        assert together == [answers([group], options)[0] for group in groups]
    with pytest.raises(ValueError, match="5 image numbers for 4 images"):
        shown = shown_by(task, [(1, (0,)), (3, (0,))])
        generate_answers(
            model, tokenizer, [shown["prompts"][0]] * 2, shown["pixel_values"], shown["image_grid_thw"],
            shown["image_index"], max_new_tokens=1,
        )  # fmt: skip


# Who shows records to a model.


def test_predictions_are_the_same_alone_and_in_company(folder: Path) -> None:
    from clinkd.evaluate.predict import Answerer, PredictSpec

    answerer = Answerer(PredictSpec(str(folder), batch_size=4, max_new_tokens=6))
    together = {found["sample"]: found["responses"] for found in answerer.answer(ROWS)}
    alone = {found["sample"]: found["responses"] for one in ROWS for found in answerer.answer([one])}
    assert len(together) == 10 and together == alone


def test_records_that_are_read_bring_all_images(folder: Path, tmp_path: Path) -> None:
    from clinkd.data.reading import Place, Wanted
    from clinkd.data.shards import Shards
    from clinkd.evaluate.pool import Desk
    from clinkd.evaluate.predict import PredictSpec

    spec, desk = PredictSpec(str(folder), max_new_tokens=3), Desk()
    for name, rows in (("several", ROWS), ("one", ROWS[:1])):
        shards = Shards.of(write_shard(tmp_path / name, rows))
        wanted = [Wanted(Place(0, number // 4, number % 4)) for number in range(len(rows))]
        assert len(desk.answer(spec, shards, wanted, 0)) == 2 * len(rows)


def test_the_teachers_states_are_the_same_alone_and_in_company(folder: Path, tmp_path: Path) -> None:
    from clinkd.distill.forms import Form
    from clinkd.distill.labeller import Labeller, LabelSpec
    from clinkd.distill.teacher_cache import Store, TeacherCache, write_index

    def asked(rows: list[dict[str, Any]], name: str) -> TeacherCache:
        out, spec = tmp_path / name, LabelSpec(str(folder), str(tmp_path), name)
        store = Store(tmp_path, name)
        store.open({})
        (table,) = Labeller(spec).tables([rows])
        out.mkdir(exist_ok=True)
        write_index(out, table.drop_columns(["new", "passes"]), store, Form())
        return TeacherCache(out)

    together = asked(ROWS, "together")
    for at, one in enumerate(ROWS):
        alone = asked(ROWS[at : at + 1], f"alone-{at}")
        for turn in range(2):
            sample = [f"{one['id']}#{turn}"]
            states = [cache.read(sample)["teacher_hidden"] for cache in (together, alone)]
            torch.testing.assert_close(*states, atol=5e-3, rtol=5e-3)


def test_the_guides_score_is_that_of_the_image_that_shows_it_best(folder: Path, tmp_path: Path) -> None:
    from clinkd.evaluate.alignment import Scorer, ScoreSpec
    from clinkd.model.tiny_guide import TinyGuide, save_guide

    model = load_model(folder)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_guide(TinyGuide(model), tmp_path)
    scorer = Scorer(ScoreSpec(str(tmp_path), names=("liver", "spleen")))
    found = scorer.scored([row("one", 1), row("other", 2), row("both", 1, 2)]).to_pydict()
    one, other, both = (found["own"][at : at + 2] for at in (0, 2, 4))
    assert both == pytest.approx([max(pair) for pair in zip(one, other, strict=True)], abs=1e-5)
    assert one != pytest.approx(other, abs=1e-5)


def test_the_images_of_a_record_are_found_in_the_shards(tmp_path: Path, ray_session: None) -> None:
    import json

    from clinkd.data.index import build_index
    from clinkd.data.prepare import prepare
    from clinkd.data.reading import Place, Records
    from clinkd.data.shards import Shards

    (tmp_path / "images").mkdir()
    names = [f"ct_00--D--p{index}--z.png" for index in range(4)]
    for index, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(shown(index))
    talk = [["What do they show?", "Livers."]]
    rows = [{"id": "both", "images": names[:2], "conversations": talk}]
    rows += [{"image": name, "conversations": talk} for name in names[2:]]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    prepare(tmp_path, tmp_path / "out")
    shards = Shards.of(tmp_path / "out")
    index, records = build_index(shards, None), Records(shards, 1 << 20)
    both, other, nobody = index.find(["both", names[2][:-4], "nobody"]).tolist()
    assert records.images(Place(*index.place[both].tolist())) == [shown(0), shown(1)]
    assert records.images(Place(*index.place[other].tolist())) == [shown(2)] and nobody == -1
