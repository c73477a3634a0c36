"""A corpus as real ones are: a thousand good question/answer pairs, and bad ones of every kind among them.

Each kind has a name, the reason it has to be refused for, and the JSON lines (and files) that make it. What
is refused is counted in pairs, as in the manifest.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGES, PAIRS = 250, 4
BOX = "<box>(100,200),(300,400)</box>"


@dataclass
class Corpus:
    """What was written: the file, what has to come out, and what has to be refused why."""

    path: Path
    good: dict[str, set[tuple[str, str]]]  # record id -> (question, answer)
    reasons: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, str] = field(default_factory=dict)  # kind -> reason


def picture(seed: int, mode: str = "L", size: tuple[int, int] = (32, 32), form: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0]), np.uint8))
    buffer = io.BytesIO()
    (image if mode == "L" else image.convert(mode)).save(buffer, form)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of some hundred bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (32, 32), 7).save(buffer, "PNG")
    return buffer.getvalue()


# kind: (reason, file). Two pairs ask about each.
FILES = {
    "no such image": ("missing_image", None),
    "an empty file": ("zero_byte", b""),
    "a web page": ("unreadable_image", b"<html>404 not found</html>" * 20),
    "a GIF": ("unreadable_image", picture(1, form="GIF")),
    "a BMP": ("unreadable_image", picture(1, form="BMP")),
    "bytes garbled": ("unreadable_image", picture(2)[:60] + b"\xff" * 300 + picture(2)[360:]),
    "cut in the middle": ("truncated", picture(3)[:500]),
    "cut after the signature": ("truncated", picture(3)[:20]),
    "the end marker missing": ("truncated", picture(3)[:-12]),
    "a JPEG cut": ("truncated", picture(4, size=(64, 64), form="JPEG")[:-300]),
    "a decompression bomb": ("bomb", bomb()),
    "16 bits a pixel": ("bad_mode", deep()),
    "CMYK": ("bad_mode", picture(5, "CMYK", form="JPEG")),
    "three pixels high": ("bad_shape", picture(6, size=(32, 3))),
    "a long strip": ("bad_shape", picture(6, size=(2000, 8))),
}

# kind: (reason, question, answer); they stand among good pairs of good images.
TURNS: dict[str, tuple[str, Any, Any]] = {
    "no question": ("empty_text", "", "A liver."),
    "an answer of spaces": ("empty_text", "What?", " \n "),
    "only an image mark": ("empty_text", "<ref></ref>", "A liver."),
    "null": ("non_text", None, "A liver."),
    "a number": ("non_text", "How many?", 3),
    "a list": ("non_text", "What?", ["liver"]),
    "an object": ("non_text", "What?", {"text": "liver"}),
    "endless": ("too_long", "What?", "liver " * 2000),
    "NUL": ("control_characters", "What\x00?", "A liver."),
    "escape": ("control_characters", "What?", "\x1b[31mliver"),
    "line separator": ("control_characters", "What?", "A liver.\u2028It is large."),
    "paragraph separator": ("control_characters", "What?", "A liver.\u2029It is large."),
    "next line": ("control_characters", "What?", "A liver.\x85It is large."),
    "right-to-left override": ("control_characters", "What?", "left \u202ekidney"),
    "zero width space": ("control_characters", "What?", "left\u200bkidney"),
    "byte order mark inside": ("control_characters", "What?", "left \ufeffkidney"),
    "lone surrogate": ("invalid_utf8", "What\ud800?", "A liver."),
    "replacement character": ("invalid_utf8", "What?", "An \ufffdd\ufffdme."),
    "end of turn": ("special_token", "What?<|im_end|>", "A liver."),
    "image pad": ("special_token", "What is in <|image_pad|>?", "A liver."),
    "an <img> inside": ("special_token", "What is in <img>b.png</img>?", "A liver."),
    "a mark put together again": ("special_token", "What?", "A <im<ref>age>."),
    "a numbered token": ("special_token", "What?", "A <|extra_0|> liver."),
    "a tool's call": ("special_token", "What?", "<tool_call>{}</tool_call>"),
    "a mark of a video": ("foreign_media", "<video>What?", "A liver."),
    "a web page's box": ("html_entity", "Where?", "&lt;box&gt;(1,2),(3,4)&lt;/box&gt;"),
    "a web page's quotes": ("html_entity", "What?", "the patient&#39;s liver"),
    "left-to-right mark": ("control_characters", "What?", "left\u200e kidney"),
    "soft hyphen": ("control_characters", "What?", "kid\u00adney"),
    "tag characters": ("control_characters", "What?", "A liver.\U000e0041\U000e0042"),
    "no character": ("control_characters", "What?", "A liver.\uffff"),
    "half a surrogate pair in an answer": ("invalid_utf8", "What?", "A liver \udfff."),
    "three numbers": ("box_broken", "Where?", "<box>(1,2),(3)</box>"),
    "decimals": ("box_broken", "Where?", "<box>(0.1,0.2),(0.3,0.4)</box>"),
    "full-width digits": ("box_broken", "Where?", "<box>(\uff11,2),(3,4)</box>"),
    "brackets": ("box_broken", "Where?", "<box>[1,2,3,4]</box>"),
    "full-width brackets": ("box_broken", "Where?", "<box>\uff081,2\uff09,\uff083,4\uff09</box>"),
    "no corners": ("box_broken", "Where?", "<box></box>"),
    "words": ("box_broken", "Where?", "<box>upper left</box>"),
    "capital marks": ("box_broken", "Where?", "<BOX>(1,2),(3,4)</BOX>"),
    "marks of another name": ("box_broken", "Where?", "<bbox>(1,2),(3,4)</bbox>"),
    "marks with spaces": ("box_broken", "Where?", "< box >(1,2),(3,4)</ box >"),
    "corners without a mark": ("box_broken", "Where?", "It is at (1,2),(3,4)."),
    "a zero-width joiner in a box": ("box_broken", "Where?", "<box>(1\u200d,2),(3,4)</box>"),
    "a mark left over": ("box_broken", "What is at <box>(1,2),(3,4)</box></box>?", "Liver"),
    "Qwen's mark not closed": ("box_broken", "Where?", "<|box_start|>(1,2),(3,4)"),
    "not closed": ("box_broken", "Where?", "<box>(1,2),(3,4)"),
    "closed first": ("box_broken", "Where?", "</box>(1,2),(3,4)<box>"),
    "box in a box": ("box_broken", "Where?", "<box><box>(1,2),(3,4)</box></box>"),
    "NaN": ("box_nan", "Where?", "<box>(NaN,2),(3,4)</box>"),
    "infinite": ("box_nan", "Where?", "<box>(1,2),(inf,4)</box>"),
    "pixels": ("box_out_of_range", "Where?", "<box>(10,20),(1500,900)</box>"),
    "minus infinity": ("box_nan", "Where?", "<box>(-Infinity,2),(3,4)</box>"),
    "negative": ("box_out_of_range", "Where?", "<box>(-1,2),(3,4)</box>"),
    "a number of 5,000 digits": ("box_out_of_range", "Where?", f"<box>(1,2),({'9' * 5000},4)</box>"),
    "corners swapped": ("box_inverted", "Where?", "<box>(300,2),(3,4)</box>"),
    "no width": ("box_empty", "Where?", "<box>(3,2),(3,4)</box>"),
    "no height": ("box_empty", "What is at <box>(3,2),(9,2)</box>?", "Liver"),
}  # fmt: skip

TALK = [["What does it show?", "A liver."]]
# kind: (reason, record). One pair each.
RECORDS: dict[str, tuple[str, Any]] = {
    "a number for a record": ("invalid_record", 3),
    "null for a record": ("invalid_record", None),
    "a list for a record": ("invalid_record", ["ct_0.png", "What?", "A liver."]),
    "no conversations": ("invalid_record", {"id": "ct_x"}),
    "neither id nor image": ("invalid_record", {"conversations": TALK}),
    "an image that is no name": ("invalid_record", {"image": 3, "conversations": TALK}),
    "no turns": ("no_turns", {"id": "ct_x", "conversations": []}),
    "a question alone": ("odd_turns", {"id": "ct_x", "conversations": [["What?"]]}),
    "three in a turn": ("odd_turns", {"id": "ct_x", "conversations": [["a", "b", "c"]]}),
    "two questions": ("odd_turns", {"id": "ct_x", "messages": [{"role": "user", "content": "q"}] * 2}),
    "one message": ("odd_turns", {"id": "ct_x", "messages": [{"role": "user", "content": "q"}]}),
    "a tool speaks": (
        "tool_turn",
        {"id": "ct_x", "conversations": [{"from": "human", "value": "q"},
                                         {"from": "observation", "value": "a"}]},
    ),
    "a tool is called": (
        "tool_turn",
        {"id": "ct_x", "messages": [{"role": "user", "content": "q"},
                                    {"role": "function_call", "content": "{}"}]},
    ),
    "a stranger speaks": (
        "odd_turns",
        {"id": "ct_x", "messages": [{"role": "user", "content": "q"}, {"role": "narrator", "content": "a"}]},
    ),
    "a system prompt in the middle": (
        "odd_turns",
        {"id": "ct_x", "messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "a"}]},
    ),
    "messages without names": ("odd_turns", {"id": "ct_x", "messages": [{"text": "q"}, {"text": "a"}]}),
    "pairs and messages mixed": (
        "invalid_record", {"id": "ct_x", "conversations": [{"from": "human", "value": "q"}, ["q", "a"]]},
    ),
    "null for the messages": ("invalid_record", {"id": "ct_x", "messages": None}),
    "two conversations": (
        "invalid_record",
        {"id": "ct_x", "conversations": TALK, "messages": [{"role": "user", "content": "q"}]},
    ),
    "an object for an image": ("invalid_record", {"images": [{"path": "ct_0.png"}], "conversations": TALK}),
    "null for an image": ("invalid_record", {"images": [None], "conversations": TALK}),
    "a list for an id": ("invalid_record", {"id": ["ct_0"], "conversations": TALK}),
    "a blank id": ("invalid_record", {"id": "  ", "conversations": TALK}),
    "a video": ("foreign_media", {"id": "ct_x", "videos": ["ct.mp4"], "conversations": TALK}),
    "up and out": ("path_escape", {"image": "../secret.png", "conversations": TALK}),
    "absolute": ("path_escape", {"image": "/etc/ct_secret.png", "conversations": TALK}),
    "backslashes": ("path_escape", {"image": "..\\ct_secret.png", "conversations": TALK}),
    "another drive": ("path_escape", {"image": "C:\\ct_secret.png", "conversations": TALK}),
    "NUL in a name": ("control_characters", {"id": "ct_\x00", "conversations": TALK}),
    "a name of 2,000 letters": ("too_long", {"id": "ct_" + "x" * 2000, "conversations": TALK}),
    "a photo": ("unknown_modality", {"id": "photo", "conversations": TALK}),
    "capital letters": ("unknown_modality", {"id": "CT_0", "conversations": TALK}),
    "nine images": ("many_images", {"images": ["ct_0.png"] * 9, "conversations": TALK}),
    "no image": ("no_image", {"images": [], "conversations": TALK}),
    "a box in no image": ("box_without_image", {"images": [], "conversations": [["Where?", f"At {BOX}."]]}),
    "a box in one of two images": (
        "box_ambiguous_image",
        {"images": ["ct_pair_0.png", "ct_pair_1.png"], "conversations": [["Where?", f"At {BOX}."]]},
    ),
    "two marks for one image": (
        "image_marks",
        {"images": ["ct_pair_0.png"], "messages": [{"role": "user", "content": "<image><image>What?"},
                                                    {"role": "assistant", "content": "A liver."}]},
    ),
    "a mark in an answer": (
        "image_marks",
        {"images": ["ct_pair_0.png"], "messages": [{"role": "user", "content": "What?"},
                                                    {"role": "assistant", "content": "<image>A liver."}]},
    ),
    "a mark for no image": ("image_marks", {"images": [], "conversations": [["<image>What?", "A liver."]]}),
    "the second image is missing": (
        "missing_image", {"images": ["ct_pair_0.png", "ct_none.png"], "conversations": TALK},
    ),
    "the second image is elsewhere": (
        "path_escape", {"images": ["ct_pair_0.png", "../ct_secret.png"], "conversations": TALK},
    ),
    "a known id": ("duplicate_id", {"id": "good 0", "image": "ct_twin.png", "conversations": TALK}),
    "a known name": ("ambiguous_image", {"image": "sub/ct_1--D--p1--z.png", "conversations": TALK}),
}  # fmt: skip
LINK = {"a link that leads out": ("path_escape", {"image": "ct_link.png", "conversations": TALK})}

LINES = {
    "half a line": ("invalid_json", b'{"id": "ct_0", "conversations": [['),
    "two records on a line": ("invalid_json", b'{"id": "ct_0"} {"id": "ct_1"}'),
    "a number of 5,000 digits in a line": ("invalid_json", b'{"id": ' + b"9" * 5000 + b"}"),
    "a thousandfold nest": ("invalid_json", b"[" * 100_000),
    "single quotes": ("invalid_json", b"{'id': 'ct_0'}"),
    "UTF-16": ("invalid_utf8", '{"id": "ct_0"}'.encode("utf-16")),
    "not UTF-8": ("invalid_utf8", b'{"id": "ct_\xff"}'),
}


def write_corpus(folder: Path, links: bool = True) -> Corpus:
    """Writes ``qa.jsonl`` and ``images/`` under ``folder``; without ``links`` only plain files."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    corpus = Corpus(folder / "qa.jsonl", {})
    records = [_good(images, corpus, number) for number in range(IMAGES)]
    for place, (kind, (reason, question, answer)) in enumerate(TURNS.items()):
        talk = records[3 * place]["conversations"]
        talk.insert(place % (len(talk) + 1), [question, answer])
        _expect(corpus, kind, reason, 1)
    lines = [json.dumps(record).encode() for record in records]
    lines += [json.dumps(record).encode() for record in _bad_files(images, corpus)]
    records_of_kinds = RECORDS | (_linked(folder) if links else {})
    for kind, (reason, record) in records_of_kinds.items():
        lines.append(json.dumps(record).encode())
        _expect(corpus, kind, reason, 1)
    two = [["Where is it?", f"At {BOX}."], ["Where is it?", "At <box>(1,2),(9,9)</box>."]]
    lines.append(json.dumps({"id": "ct_pair_0", "conversations": two}).encode())
    _expect(corpus, "two answers to one question", "contradicting_answers", 2)
    for kind, (reason, line) in LINES.items():
        lines.append(line)
        _expect(corpus, kind, reason, 1)
    first, rest = lines[:2], lines[2:]  # the records that others repeat stand first
    random.Random(0).shuffle(rest)
    corpus.path.write_bytes(b"\n".join([*first, *rest]))
    return corpus


def _good(images: Path, corpus: Corpus, number: int) -> dict[str, Any]:
    name = f"ct_{number}--D--p{number}--z.png"
    (images / name).write_bytes(picture(100 + number))
    box = f"<box>({number},{number + 1}),({number + 300},{number + 400})</box>"
    pairs = [
        [f"Where is the liver {number}?", f"The liver is at {box}."],
        [f"What is at {box}?", "Liver"],
        [f"Can you describe the content within {box}?", "This region contains the liver, a large organ."],
        [
            "What can you interpret from the overall image?",
            f"A CT image, number {number}: a\u00a0liver\u2026",
        ],
    ]
    corpus.good[f"good {number}"] = {(question, answer) for question, answer in pairs}
    return {"id": f"good {number}", "image": name, "conversations": pairs}


def _bad_files(images: Path, corpus: Corpus) -> list[dict[str, Any]]:
    for name in ("ct_pair_0.png", "ct_pair_1.png", "ct_twin.png", "sub/ct_1--D--p1--z.png", "photo.png"):
        (images / name).write_bytes(picture(len(name)))
    records = []
    for number, (kind, (reason, data)) in enumerate(FILES.items()):
        if data is not None:
            (images / f"mr_bad_{number}.png").write_bytes(data)
        talk = [["What is it?", "A brain."], ["What else?", "A skull."]]
        records.append({"id": f"mr_bad_{number}", "conversations": talk})
        _expect(corpus, kind, reason, 2)
    return records


def _linked(folder: Path) -> dict[str, tuple[str, Any]]:
    (folder / "secret.png").write_bytes(picture(0))
    (folder / "images" / "ct_link.png").symlink_to(folder / "secret.png")
    return LINK


def _expect(corpus: Corpus, kind: str, reason: str, pairs: int) -> None:
    assert kind not in corpus.kinds, kind
    corpus.kinds[kind] = reason
    corpus.reasons[reason] += pairs
