"""The teacher is asked once about each sample, whatever is killed, changed or asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from faulty_s3 import BUCKET, faulty_s3
from phantom_rows import phantom_row

from clinkd import storage
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.distill.forms import Form
from clinkd.distill.labeller import Labeller, LabelSpec
from clinkd.distill.losses import distill_loss
from clinkd.distill.teacher_cache import Store, TeacherCache, sample_key, teacher_key, write_index
from clinkd.model import presets

torch.set_num_threads(1)
SIZE = presets.TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
SPEC = PhantomSpec(5, size=56)


def row(number: int, untrusted: bool = False) -> dict[str, Any]:
    return phantom_row(SPEC, number, trusted=not untrusted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [draw(SPEC, index)[1] for index in range(5)]
    texts = [text for record in records for turn in record.turns for text in (turn.question, turn.answer)]
    return presets.write_new_model(texts, SIZE, tmp_path_factory.mktemp("model"), vocab_size=500, seed=0)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with faulty_s3() as found:
        yield found[0]


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path / "stores")
    monkeypatch.setenv(storage.ENDPOINT, request.getfixturevalue("server"))
    return f"s3://{BUCKET}/{tmp_path.name}"


def ask(folder: Path, root: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, list[Any]]:
    spec = LabelSpec(str(folder), root, "teacher", batch_size=4, **options)
    Store(root, "teacher").open({})
    return told(Labeller(spec), rows)


def told(labeller: Labeller, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return pa.concat_tables(labeller.tables([rows])).to_pydict()


def listed(found: dict[str, list[Any]], root: str, out: Path, form: Form | None = None) -> TeacherCache:
    out.mkdir(exist_ok=True)
    asked = pa.table({name: found[name] for name in ("sample", "task", "key")})
    write_index(out, asked, Store(root, "teacher"), form or Form())
    return TeacherCache(out, out / "copies")


def answers_of(cache: TeacherCache) -> dict[str, str]:
    return {name: cache.answer(place) for place, name in enumerate(cache.samples.to_pylist())}


def test_a_second_time_costs_no_pass(folder: Path, root: str, tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    first = ask(folder, root, rows)
    assert all(first["new"]) and sum(first["passes"]) > 0
    again = ask(folder, root, rows)
    assert not any(again["new"]) and sum(again["passes"]) == 0 and again["key"] == first["key"]
    cache = listed(again, root, tmp_path / "list")
    turns = {f"{one['id']}#{at}": turn for one in rows for at, turn in enumerate(one["turns"])}
    assert answers_of(cache) == {name: turn["answer"] for name, turn in turns.items()}
    assert ((cache.margins >= 0) & (cache.margins <= 1)).all() and len(cache.margins) == len(cache)
    with pytest.raises(KeyError, match="sample p9#0 is not in it"):
        cache.read(["p0#0", "p9#0"])


def test_states_are_the_teachers_own(folder: Path, root: str, tmp_path: Path) -> None:
    """A student that is the teacher learns nothing from it."""
    cache = listed(ask(folder, root, [row(0)]), root, tmp_path / "list")
    assert cache.head is not None
    names = cache.samples.to_pylist()
    states = cache.read(names)["teacher_hidden"].float()
    one_by_one = torch.cat([cache.read([name])["teacher_hidden"] for name in names])
    assert torch.equal(states, one_by_one.float())
    targets = torch.zeros(len(states), dtype=torch.long)
    own = distill_loss(states, cache.head, targets, states, cache.head, a=1.0, temperature=0.5)
    assert own.kd.item() == pytest.approx(0, abs=1e-6)


def test_only_what_changed_is_asked_again(folder: Path, root: str) -> None:
    rows = [row(0), row(1), row(2)]
    first = ask(folder, root, rows)
    rows[1]["turns"][0]["answer"] += " Or so."
    rows[2]["png"] = row(3)["png"]
    again = ask(folder, root, rows)
    new = {name for name, fresh in zip(again["sample"], again["new"], strict=True) if fresh}
    assert new == {"p1#0"} | {f"p2#{turn}" for turn in range(len(rows[2]["turns"]))}
    parts = Store(root, "teacher").parts()
    assert len(parts) == 2
    assert ask(folder, root, rows[:1])["key"] == first["key"][: len(rows[0]["turns"])]


def test_a_build_goes_on_with_what_is_in_no_part(folder: Path, tmp_path: Path) -> None:
    """As after a kill: one batch was written, of another a torn file is left."""
    root = str(tmp_path / "stores")
    ask(folder, root, [row(0)])
    (tmp_path / "stores" / "teacher" / ".torn.arrow.1.tmp").write_bytes(b"ARROW1")
    both = ask(folder, root, [row(0), row(1)])
    assert {name[:2] for name, new in zip(both["sample"], both["new"], strict=True) if new} == {"p1"}
    cache = listed(both, root, tmp_path / "list")
    assert set(cache.samples.to_pylist()) == set(both["sample"])


def test_two_builders_at_once_leave_one_row_that_counts(folder: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "stores")
    Store(root, "teacher").open({})
    early = [Labeller(LabelSpec(str(folder), root, "teacher")) for _ in range(2)]
    told(early[0], [row(0)])
    found = told(early[1], [row(0), row(1)])  # knew of nothing when it began
    assert all(found["new"]) and len(Store(root, "teacher").light()) > len(found["key"])
    cache = listed(found, root, tmp_path / "list")
    assert set(cache.samples.to_pylist()) == set(found["sample"])


def test_hidden_truths_are_answered_by_the_teacher(folder: Path, root: str, tmp_path: Path) -> None:
    """A teacher that was taught nothing never ends its answers."""
    found = ask(folder, root, [row(0, untrusted=True), row(1)], max_new_tokens=6)
    cache = listed(found, root, tmp_path / "list")
    table = Store(root, "teacher").light()
    sources = dict(zip(table.column("key").to_pylist(), table.column("source").to_pylist(), strict=True))
    reasons = dict(zip(table.column("key").to_pylist(), table.column("reason").to_pylist(), strict=True))
    for name, key in zip(found["sample"], found["key"], strict=True):
        assert sources[key] == ("teacher" if name.startswith("p0") else "truth")
        assert (name in cache) == (reasons[key] is None)
    refused = [reason for reason in reasons.values() if reason]
    assert refused and set(refused) <= {"too_long", "empty", "no_box"}
    assert not any(ask(folder, root, [row(0, untrusted=True)], max_new_tokens=6)["new"])


def test_of_several_answers_one_is_chosen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clinkd.distill import labeller

    seen: list[list[Any]] = []
    choose = labeller.choose

    def watched(task: str, found: list[Any]) -> tuple[int, str | None]:
        seen.append(found)
        return choose(task, found)

    monkeypatch.setattr(labeller, "choose", watched)
    root = str(tmp_path / "stores")
    found = ask(folder, root, [row(0, untrusted=True)], best_of=3, max_new_tokens=4, temperature=2.0)
    assert len(seen) == len(found["key"]) and all(len(candidates) == 3 for candidates in seen)
    assert any(len({candidate.text for candidate in candidates}) > 1 for candidates in seen)
    assert all(candidate.confidence < 0 for candidates in seen for candidate in candidates)


def test_parts_are_written_as_they_become_large(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clinkd.distill import teacher_cache

    root, rows = str(tmp_path / "stores"), [row(number) for number in range(3)]
    spec = LabelSpec(str(folder), root, "teacher")
    Store(root, "teacher").open({})
    list(Labeller(spec).tables([[one] for one in rows]))
    assert len(Store(root, "teacher").parts()) == 1  # of a piece one, however many batches it came in
    monkeypatch.setattr(teacher_cache, "PART_BYTES", 1)
    other = str(tmp_path / "others")
    Store(other, "teacher").open({})
    tables = list(Labeller(replace(spec, root=other)).tables([[one] for one in rows]))
    assert len(Store(other, "teacher").parts()) == 3
    cache = listed(pa.concat_tables(tables).to_pydict(), other, tmp_path / "list")
    assert len(cache) == sum(len(one["turns"]) for one in rows)


FORMS = [Form("bfloat16"), Form("int8"), Form("topk", 16, 200)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_other_forms_are_read_as_they_were_kept(form: Form, folder: Path, tmp_path: Path) -> None:
    plain = listed(ask(folder, str(tmp_path / "a"), [row(0)]), str(tmp_path / "a"), tmp_path / "list-a")
    found = ask(folder, str(tmp_path / "b"), [row(0)], form=form)
    other = listed(found, str(tmp_path / "b"), tmp_path / "list-b", form)
    names = plain.samples.to_pylist()
    states, kept = plain.read(names)["teacher_hidden"].float(), other.read(names)
    if form.name != "topk":
        torch.testing.assert_close(kept["teacher_hidden"].float(), states, atol=0.03, rtol=0.03)
        return
    assert other.head is None and plain.head is not None
    logits = states @ plain.head[:200].T
    chosen = logits.gather(1, kept["top_ids"].long())
    torch.testing.assert_close(chosen, kept["top_logits"].float(), atol=0.02, rtol=0)
    assert (kept["top_logits"][:, 0] >= logits.max(1).values - 0.02).all()


def test_a_key_follows_from_all_that_decides_a_row() -> None:
    base = sample_key([b"image"], "Where?", "Here.")
    others = [
        sample_key([b"other"], "Where?", "Here."), sample_key([b"image"], "What?", "Here."),
        sample_key([b"image"], "Where?", "There."), sample_key([b"image", b"image"], "Where?", "Here."),
        sample_key([b"image"], "Where?", {"best_of": 1}), sample_key([b"image"], "Where?", {"best_of": 2}),
    ]  # fmt: skip
    assert len({base, *others}) == 7 and base == sample_key([b"image"], "Where?", "Here.")


def test_a_store_follows_from_the_teachers_files_and_the_form(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert teacher_key(copy, {"form": "int8"}) == teacher_key(folder, {"form": "int8"})
    assert teacher_key(copy, {"form": "int8"}) != teacher_key(copy, {"form": "topk"})
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert teacher_key(copy, {"form": "int8"}) != teacher_key(folder, {"form": "int8"})


def test_a_part_that_is_gone_or_torn_is_said_to_be(folder: Path, tmp_path: Path) -> None:
    found = ask(folder, str(tmp_path / "a"), [row(0)])
    cache = listed(found, str(tmp_path / "a"), tmp_path / "list")
    for part in (tmp_path / "a" / "teacher").glob("*.arrow"):
        part.write_bytes(part.read_bytes()[:-1])
        with pytest.raises(ValueError, match="were written; delete it and the stage label's folder"):
            cache.read([found["sample"][0]])
        part.unlink()
    with pytest.raises(FileNotFoundError, match="is gone; delete it and"):
        cache.read([found["sample"][0]])
