"""Med-GRIT's spellings of questions and answers, and what cannot be read of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from clinkd.data.medgrit import Entry, read, task_of_file
from clinkd.data.validate import check_turn

NAME = "ct_00--AMOS2022--amos_0004--x_0123"
ASKED, ANSWERED = "Where is the liver?", "At the <box>(1,2),(3,4)</box>."


def entries(folder: Path, value: Any, name: str = "qa.json") -> list[Entry]:
    path = folder / name
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif name.endswith("l"):
        path.write_text("\n".join(json.dumps(line) for line in value))
    else:
        path.write_text(json.dumps(value))
    return list(read(path))


def test_three_spellings_say_the_same(tmp_path: Path) -> None:
    bird = {"id": NAME, "conversations": [[ASKED, ANSWERED], ["And?", "No."]]}
    clinkd = {
        "id": NAME,
        "conversations": [
            {"from": "user", "value": ASKED},
            {"from": "assistant", "value": ANSWERED},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "No."},
        ],
    }
    sharegpt = {
        "images": [f"{NAME}.png"],
        "messages": [
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": ANSWERED},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No."},
        ],
    }
    read_back = entries(tmp_path, [bird, clinkd, sharegpt])
    assert [entry.where for entry in read_back] == ["qa.json[0]", "qa.json[1]", "qa.json[2]"]
    for entry in read_back:
        assert (entry.id, entry.image, entry.reason, entry.rows) == (NAME, f"{NAME}.png", "", 2)
        assert entry.pairs == ((ASKED, ANSWERED), ("And?", "No."))


def test_lines_are_read_as_well_also_under_a_json_name(tmp_path: Path) -> None:
    lines = [{"id": "ct_1", "conversations": [["q", "a"]]}, {"id": "ct_2", "conversations": [["q", "a"]]}]
    assert [entry.where for entry in entries(tmp_path, lines, "qa.jsonl")] == ["qa.jsonl:1", "qa.jsonl:2"]
    text = "\n\n".join(json.dumps(line) for line in lines).encode()
    assert [entry.where for entry in entries(tmp_path, text)] == ["qa.json:1", "qa.json:3"]


@pytest.mark.parametrize("name", ["qa.json", "qa.jsonl"])
def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path, name: str) -> None:
    body = json.dumps([{"id": "ct_1", "conversations": [["q", "a"]]}])
    body = body[1:-1] if name.endswith("l") else body
    assert entries(tmp_path, b"\xef\xbb\xbf" + body.encode(), name)[0].id == "ct_1"


@pytest.mark.parametrize(
    ("value", "image", "name"),
    [
        ({"id": "ct_1"}, "ct_1.png", "ct_1"),
        ({"id": "ct_1.v2"}, "ct_1.v2.png", "ct_1.v2"),
        ({"id": "ct_1.jpg"}, "ct_1.jpg", "ct_1.jpg"),
        ({"id": 7, "image": "ct_1.png"}, "ct_1.png", "7"),
        ({"id": 7}, "ct_9.png", "7"),
        ({"images": ["sub/ct_1.png"]}, "sub/ct_1.png", "ct_1"),
    ],
)
def test_the_image_is_found(tmp_path: Path, value: dict, image: str, name: str) -> None:
    value["conversations"] = [["Picture 1: <img>ct_9.png</img>\nq", "a"]]
    (entry,) = entries(tmp_path, [value])
    assert (entry.image, entry.id) == (image, name)


@pytest.mark.parametrize(
    ("value", "reason", "rows"),
    [
        ("text", "invalid_record", 1),
        (None, "invalid_record", 1),
        ({"id": "ct_1"}, "invalid_record", 1),
        ({"id": "ct_1", "conversations": "q"}, "invalid_record", 1),
        ({"id": "ct_1", "conversations": ["q", "a"]}, "invalid_record", 1),
        ({"conversations": [["q", "a"], ["q2", "a"]]}, "invalid_record", 2),
        ({"id": True, "conversations": [["q", "a"]]}, "invalid_record", 1),
        ({"id": "ct_1", "conversations": []}, "no_turns", 1),
        ({"id": "ct_1", "conversations": [["q", "a"], ["q"]]}, "odd_turns", 2),
        ({"id": "ct_1", "messages": [{"role": "user", "content": "q"}]}, "odd_turns", 1),
        ({"id": "ct_1", "messages": [{"role": r, "content": "q"} for r in ("user", "user")]}, "odd_turns", 1),
        ({"id": "ct_1", "messages": [{"role": r} for r in ("assistant", "user")]}, "odd_turns", 1),
        ({"images": ["a.png"] * 9, "conversations": [["q", "a"]]}, "many_images", 1),
        ({"id": "ct_\x001", "conversations": [["q", "a"]]}, "control_characters", 1),
        ({"id": "ct_\ud8001", "conversations": [["q", "a"]]}, "invalid_utf8", 1),
    ],
)
def test_what_cannot_be_routed_says_why_and_how_much_it_is(
    tmp_path: Path, value: Any, reason: str, rows: int
) -> None:
    good = {"id": "ct_2", "conversations": [["q", "a"]]}
    bad, after = entries(tmp_path, [value, good], "qa.jsonl")
    assert (bad.reason, bad.rows) == (reason, rows)
    assert (after.reason, after.id) == ("", "ct_2")


# ShareGPT as LLaMA-Factory documents it.


def said(*texts: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def test_a_system_prompt_is_left_out_wherever_it_stands(tmp_path: Path) -> None:
    system, talk = {"role": "system", "content": "Be brief."}, said("q", "a")
    tagged = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "q"},
              {"from": "gpt", "value": "a"}]  # fmt: skip
    for record in (
        {"messages": [system, *talk]},
        {"messages": talk, "system": "Be brief.", "tools": ""},
        {"conversations": tagged, "system": "Be brief."},
        {"messages": None, "conversations": tagged},
        {"messages": tagged, "conversations": tagged},
    ):
        (entry,) = entries(tmp_path, [record | {"images": ["ct_1.png"]}])
        assert (entry.reason, entry.pairs, entry.image) == ("", (("q", "a"),), "ct_1.png")


@pytest.mark.parametrize(
    ("images", "texts", "reason"),
    [
        (1, ["<image>q", "a"], ""),
        (1, ["q", "a"], ""),  # no marks: the images stand in front of the question anyhow
        (2, ["<image><image>q", "a"], ""),
        (2, ["<image>q", "a", "and <image>?", "a"], ""),
        (2, ["q", "a"], ""),
        (1, ["<image>q", "a", "<image>q", "a"], "image_marks"),
        (2, ["<image>q", "a"], "image_marks"),
        (1, ["q", "<image>a"], "image_marks"),
        (0, ["<image>q", "a"], "image_marks"),
        (0, ["q", "a"], "no_image"),
        (0, ["Where is the box?", "a"], "no_image"),
        (0, ["q", ANSWERED], "box_without_image"),
        (0, ["q", "<|box_start|>(1,2),(3,4)<|box_end|>"], "box_without_image"),
    ],
)
def test_marks_are_as_many_as_images(tmp_path: Path, images: int, texts: list[str], reason: str) -> None:
    names = [f"ct_{number}.png" for number in range(images)]
    (entry,) = entries(tmp_path, [{"id": "ct_0", "images": names, "messages": said(*texts)}])
    assert (entry.reason, entry.rows) == (reason, len(texts) // 2)
    if not reason:
        assert (entry.image, *entry.more) == tuple(names)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (["<image>\n<image>\nWhat differs?"], ["What differs?"]),
        (["What differs between <image> and <image>?"], ["What differs between image 1 and image 2?"]),
        (["Compare the first, <image>, with <image>"], ["Compare the first, image 1, with image 2"]),
        (["What differs? <image> <image>"], ["What differs?"]),
        (["<image>What is it?", "And in <image>?"], ["What is it?", "And in image 2?"]),
        (["What is it?<image>", "<image>And here?"], ["What is it?", "And here?"]),
    ],
)
def test_a_mark_inside_a_sentence_says_which_image_it_is(
    tmp_path: Path, asked: list[str], shown: list[str]
) -> None:
    talk = said(*(text for question in asked for text in (question, "a")))
    (entry,) = entries(tmp_path, [{"id": "r", "images": ["ct_1.png", "ct_2.png"], "messages": talk}])
    assert [check_turn(question, answer).question for question, answer in entry.pairs] == shown


def test_several_images_come_from_a_list_or_from_the_first_question(tmp_path: Path) -> None:
    opening = "Picture 1: <img>ct_1.png</img>\nPicture 2: <img>ct_2.png</img>\nWhat differs?"
    bird = {"id": "pair", "conversations": [[opening, "a"], ["And?", "b"]]}
    listed = {"images": ["ct_1.png", "sub/ct_2.png"], "image": None, "messages": said("q", "a")}
    first, second = entries(tmp_path, [bird, listed])
    assert (first.id, first.image, first.more) == ("pair", "ct_1.png", ("ct_2.png",))
    assert check_turn(*first.pairs[0]).question == "What differs?"
    assert (second.id, second.image, second.more) == ("ct_1+ct_2", "ct_1.png", ("sub/ct_2.png",))


@pytest.mark.parametrize("key", ["videos", "video", "audios", "audio"])
def test_what_is_no_image_is_refused(tmp_path: Path, key: str) -> None:
    record = {"images": ["ct_1.png"], "messages": said("q", "a")}
    bad, empty = entries(tmp_path, [record | {key: ["a.mp4"]}, record | {key: []}])
    assert (bad.reason, empty.reason) == ("foreign_media", "")


@pytest.mark.parametrize("role", ["function_call", "function", "observation", "tool"])
def test_tools_are_refused_by_name(tmp_path: Path, role: str) -> None:
    talk = [*said("q"), {"role": role, "content": "{}"}, *said("q", "a")]
    (entry,) = entries(tmp_path, [{"id": "ct_1", "messages": talk}])
    assert (entry.reason, entry.rows) == ("tool_turn", 2) and role in entry.detail


@pytest.mark.parametrize("name", ["qa.json", "qa.jsonl"])
def test_of_a_key_given_twice_the_last_counts_as_in_every_json_reader(tmp_path: Path, name: str) -> None:
    body = b'{"id": "ct_1", "id": "ct_2", "conversations": [["q", "a"]]}'
    (entry,) = entries(tmp_path, body if name.endswith("l") else b"[" + body + b"]", name)
    assert (entry.id, entry.image) == ("ct_2", "ct_2.png")


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    line = json.dumps({"id": "ct_1", "conversations": [["q\r\nmore", "a"]]}).encode()
    found = entries(tmp_path, line + b"\r\n\r\n" + line + b"\r\n", "qa.jsonl")
    assert [entry.reason for entry in found] == ["", ""]
    assert check_turn(*found[0].pairs[0]).question == "q\nmore"


def test_a_bad_line_takes_no_other_along(tmp_path: Path) -> None:
    good = json.dumps({"id": "ct_1", "conversations": [["q", "a"]]}).encode()
    read_back = entries(tmp_path, b"\n".join([good, b'{"id": ', b"{\xff}", good]), "qa.jsonl")
    assert [entry.reason for entry in read_back] == ["", "invalid_json", "invalid_utf8", ""]


def test_a_file_that_breaks_gives_what_stood_before(tmp_path: Path) -> None:
    body = json.dumps([{"id": f"ct_{n}", "conversations": [["q", "a"]]} for n in range(3)]).encode()
    assert [entry.reason for entry in entries(tmp_path, body[:-5])] == ["", "", "invalid_json"]
    broken = body.replace(b"ct_2", b"ct\xff2")
    assert [entry.reason for entry in entries(tmp_path, broken)] == ["", "", "invalid_utf8"]


def test_without_ijson_the_same_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"id": f"ct_{n}", "conversations": [["q", "a"]]} for n in range(3)]
    streamed = entries(tmp_path, values)
    monkeypatch.setitem(sys.modules, "ijson", None)
    assert entries(tmp_path, values) == streamed
    assert [entry.reason for entry in entries(tmp_path, b"[{")] == ["invalid_json"]
    assert [entry.reason for entry in entries(tmp_path, b'["\xff"]')] == ["invalid_utf8"]


def test_an_empty_file_has_nothing_to_give(tmp_path: Path) -> None:
    assert entries(tmp_path, []) == []
    assert [entry.reason for entry in entries(tmp_path, b"")] == ["invalid_json"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Med-GRIT-VG-test.json", "vg"),
        ("vg.json", "vg"),
        ("RO_test.json", "roc"),
        ("roc_train.json", "roc"),
        ("GC.json", "rc"),
        ("Test_RC.jsonl", "rc"),
        ("MII.json", "mia"),
        ("mia-270k.json", "mia"),
        ("medgrit.json", None),
        ("release-rc1.json", None),
        ("VG_and_RO.json", None),
        ("provgram.json", None),
    ],
)
def test_a_file_may_name_its_task(name: str, task: str | None) -> None:
    assert task_of_file(Path(name)) == task


@pytest.mark.parametrize("streams", [True, False])
def test_a_nesting_bomb_is_a_file_that_breaks(
    tmp_path: Path, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not streams:
        monkeypatch.setitem(sys.modules, "ijson", None)
    good = json.dumps({"id": "ct_1", "conversations": [["q", "a"]]})
    path = tmp_path / "qa.json"
    path.write_text(f"[{good}, " + "[" * 100_000)
    *before, last = read(path)
    assert last.reason == "invalid_json" and [entry.id for entry in before] == (["ct_1"] if streams else [])
