"""Med-GRIT's spellings of questions and answers, and what cannot be read of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from clinkd.data.medgrit import Entry, read, task_of_file

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
