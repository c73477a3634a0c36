"""Med-GRIT's question/answer files as a stream of entries.

Decisions:
- Three spellings are read alike: BiRD's ``conversations`` of [question, answer], ClinKD's of {"from",
  "value"}, and ShareGPT's ``messages`` of {"role", "content"} with ``images``; as a JSON array (through
  ijson, so that a file larger than memory streams) or JSON lines.
- Reading only routes: it finds the image, pairs questions with answers, and says where in the file it was.
  Texts are checked later, in parallel (``validate.check_turn``). What cannot even be routed comes out as an
  ``Entry`` with a reason.
- ShareGPT as LLaMA-Factory documents it: a system prompt, as first message or as a column, is left out (the
  prompt is the model's own template's); turns of tools and their results are refused, as are videos and
  sounds; ``<image>`` marks, where there are any, have to be as many as the images.
- All images stand in front of each question. ``<image>`` marks at its beginning or behind its last sentence
  say no more than that; of several images, one inside a sentence becomes "image 2", or the sentence would
  lose its object.
- The images are ``images`` or ``image`` where given, else the text id + ``.png`` (the published evaluation's
  rule), else the name in ``<img>``; several ``<img>`` in a first question are several images.
- A JSON array that breaks in the middle gives what stood before the break and one entry with
  ``invalid_json``.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clinkd.data.validate import Limits, RowError, check_name

FILE_TASKS = {"vg": "vg", "ro": "roc", "roc": "roc", "gc": "rc", "rc": "rc", "mii": "mia", "mia": "mia"}
_IMG = re.compile(r"<img>(.*?)</img>", re.S)
_SUFFIXES = (".png", ".jpg", ".jpeg")
_BUFFER = 1 << 20
_LONGEST_LINE = 1 << 26
"""Bytes of a JSON line beyond which it is refused unread."""
_DEEPEST = 64
"""Brackets within brackets of a JSON array's records beyond which the file is refused from there on."""
_QUESTIONERS = ("user", "human")
_ANSWERERS = ("assistant", "gpt")
_TOOLS = ("function_call", "function", "observation", "tool")
_MARK = "<image>"
# Marks at a question's beginning, or behind the end of its last sentence, and what stands between them.
_AROUND = re.compile(r"((?:\s*<image>)*)(.*?)((?:(?<=[\n.?!>])[ \t]*<image>\s*)*)", re.S)
_BOXED = re.compile(r"<box>|<\|box_start\|>")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a source file: either an image's pairs, still unchecked, or the reason why not.

    ``rows`` counts question/answer pairs, at least 1, so that every entry counts.
    """

    where: str  # "VG.json[3]" (index in an array) or "train.jsonl:4" (line)
    id: str = ""
    image: str = ""  # as the source spells it; may be a relative path
    task: str | None = None
    pairs: tuple[tuple[Any, Any], ...] = ()
    rows: int = 1
    reason: str = ""
    detail: str = ""
    more: tuple[str, ...] = ()  # further images of a conversation about several


def task_of_file(path: Path) -> str | None:
    """The task a file's name gives (VG, RO or ROC, GC or RC, MII or MIA as a word of its own), or None."""
    found = set()
    for word in re.split(r"[^A-Za-z]+", path.stem):
        # "rc" and "ro" in small letters are too common in names ("-rc1") to mean a task.
        if word.lower() in FILE_TASKS and (word.isupper() or word.lower() not in ("rc", "ro")):
            found.add(FILE_TASKS[word.lower()])
    return found.pop() if len(found) == 1 else None


def read(path: Path) -> Iterator[Entry]:
    """Streams the entries of a JSON array or of JSON lines."""
    task = task_of_file(path)
    values = _lines(path) if _is_lines(path) else _array(path)
    for where, value in values:
        if isinstance(value, RowError):
            yield Entry(where, reason=value.code, detail=value.detail)
        else:
            yield _entry(where, value, task)


def _open(path: Path) -> IO[bytes]:
    """A file to stream, with a buffer that makes few requests of a bucket."""
    return io.BufferedReader(path.open("rb"), _BUFFER)  # type: ignore[arg-type]


def _is_lines(path: Path) -> bool:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    with _open(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
            where = f"{path.name}:{number}"
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield where, RowError("too_long", f"a line of more than {_LONGEST_LINE} bytes")
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                yield where, RowError("invalid_utf8", f"byte {error.start} of the line")
            except (ValueError, RecursionError) as error:
                yield where, RowError("invalid_json", str(error)[:200])


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import ijson
    except ImportError:  # without ijson the file has to fit in memory
        yield from _array_in_memory(path)
        return
    index = 0
    with _open(path) as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        try:
            events = _shallow(ijson.basic_parse(file, use_float=True), ijson.JSONError)
            for value in ijson.items(ijson.parse(events), "item"):
                yield f"{path.name}[{index}]", value
                index += 1
        except (ijson.JSONError, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())[:200]
            code = (
                "invalid_utf8" if isinstance(error, UnicodeDecodeError) or "UTF" in text else "invalid_json"
            )
            yield f"{path.name}[{index}]", RowError(code, f"the file breaks here: {text}")


def _shallow(events: Any, error: type[Exception]) -> Iterator[tuple[str, Any]]:
    """JSON events as they come, up to a depth: 100,000 brackets would take all memory there is."""
    depth = 0
    for kind, value in events:
        if kind in ("start_map", "start_array"):
            depth += 1
            if depth > _DEEPEST:
                raise error(f"nested more than {_DEEPEST} deep")
        elif kind in ("end_map", "end_array"):
            depth -= 1
        yield kind, value


def _array_in_memory(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield f"{path.name}[0]", RowError("invalid_utf8", f"byte {error.start} of the file")
    except (ValueError, RecursionError) as error:
        yield f"{path.name}[0]", RowError("invalid_json", str(error)[:200])
    else:
        for index, value in enumerate(values if isinstance(values, list) else [values]):
            yield f"{path.name}[{index}]", value


def _entry(where: str, value: Any, task: str | None) -> Entry:
    if not isinstance(value, dict):
        return Entry(where, reason="invalid_record", detail=f"{type(value).__name__}, not an object")
    rows = 1
    try:
        talk = _talk(value)
        rows = max(1, _count(talk))
        pairs = _pairs(talk)
        images = _images(value, pairs)
        name = check_name(_text(value.get("id")).strip() or "+".join(map(_stem, images)))
    except RowError as error:
        return Entry(where, _text(value.get("id")), rows=rows, reason=error.code, detail=error.detail)
    if not pairs:
        return Entry(where, name, images[0], reason="no_turns", detail="no question")
    if len(images) > 1:
        pairs = _numbered(pairs)
    return Entry(where, name, images[0], task, pairs, len(pairs), more=images[1:])


def _talk(value: dict) -> list:
    """The conversation of a record, whichever name it has."""
    found = [value[key] for key in ("messages", "conversations") if value.get(key) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise RowError("invalid_record", "messages and conversations that differ")
    if not found or not isinstance(found[0], list):
        raise RowError("invalid_record", "no list of conversations or messages")
    return found[0]


def _stem(image: str) -> str:
    return re.sub(r"\.(png|jpe?g)$", "", image.rsplit("/", 1)[-1], flags=re.I)


def _count(talk: list) -> int:
    """Pairs in a conversation, whole or not."""
    return len(talk) if talk and isinstance(talk[0], list) else (len(talk) + 1) // 2


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _pairs(talk: list) -> tuple[tuple[Any, Any], ...]:
    if all(isinstance(turn, list) for turn in talk):
        if any(len(turn) != 2 for turn in talk):
            raise RowError("odd_turns", "a turn that is not [question, answer]")
        return tuple((question, answer) for question, answer in talk)
    if not all(isinstance(turn, dict) for turn in talk):
        raise RowError("invalid_record", "turns that are neither pairs nor messages")
    said = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in talk]
    if said and said[0][0] == "system":
        said = said[1:]
    for role, _ in said:
        if role in _TOOLS:
            raise RowError("tool_turn", f"a message of {role!r}")
    if len(said) % 2:
        raise RowError("odd_turns", f"{len(said)} messages")
    for (asker, _), (answerer, _) in zip(said[::2], said[1::2], strict=True):
        if asker not in _QUESTIONERS or answerer not in _ANSWERERS:
            raise RowError("odd_turns", f"{str(asker)[:20]!r} before {str(answerer)[:20]!r}")
    return tuple((asked[1], answered[1]) for asked, answered in zip(said[::2], said[1::2], strict=True))


def _images(value: dict, pairs: tuple[tuple[Any, Any], ...]) -> tuple[str, ...]:
    """The paths of a record's images, as the source spells them."""
    for kind in ("videos", "video", "audios", "audio"):
        if value.get(kind):
            raise RowError("foreign_media", f"{kind}: only images are read")
    given = value["images"] if value.get("images") is not None else value.get("image")
    if isinstance(given, list):
        if not all(isinstance(one, str) and one for one in given):
            raise RowError("invalid_record", "images that are not all names")
        if not given:
            _as_marked((), pairs)
            boxes = any(isinstance(text, str) and _BOXED.search(text) for pair in pairs for text in pair)
            raise RowError("box_without_image" if boxes else "no_image", "images is an empty list")
        if len(given) > Limits.max_images:
            raise RowError("many_images", f"{len(given)} images, at most {Limits.max_images}")
        return _as_marked(tuple(given), pairs)
    if isinstance(given, str) and given:
        return _as_marked((given,), pairs)
    if given is not None:
        raise RowError("invalid_record", f"an image that is no name but {type(given).__name__}")
    named = _IMG.findall(pairs[0][0]) if pairs and isinstance(pairs[0][0], str) else []
    if len(named) > 1:  # "Picture 1: <img>..</img>\nPicture 2: <img>..</img>\n"
        if len(named) > Limits.max_images:
            raise RowError("many_images", f"{len(named)} images, at most {Limits.max_images}")
        return tuple(name.strip() for name in named)
    if isinstance(value.get("id"), str) and value["id"].strip():
        name = value["id"]
        return _as_marked((name if name.lower().endswith(_SUFFIXES) else f"{name}.png",), pairs)
    if named:
        return (named[0].strip(),)
    if _text(value.get("id")).strip():
        return (f"{_text(value['id'])}.png",)
    raise RowError("invalid_record", "neither id nor image")


def _as_marked(images: tuple[str, ...], pairs: tuple[tuple[Any, Any], ...]) -> tuple[str, ...]:
    """``images``, where their number is that of the ``<image>`` marks (or there are no marks).

    ShareGPT's readers put an image at each mark; here all stand before the first question.
    """
    if any(isinstance(answer, str) and _MARK in answer for _, answer in pairs):
        raise RowError("image_marks", "an <image> mark in an answer")
    marks = sum(question.count(_MARK) for question, _ in pairs if isinstance(question, str))
    if marks not in (0, len(images)):
        raise RowError("image_marks", f"{marks} <image> marks for {len(images)} images")
    return images


def _numbered(pairs: tuple[tuple[Any, Any], ...]) -> tuple[tuple[Any, Any], ...]:
    """Questions about several images whose ``<image>`` marks inside a sentence say which image they are."""
    numbers = itertools.count(1)
    found = []
    for question, answer in pairs:
        if isinstance(question, str) and (parts := _AROUND.fullmatch(question)):
            before, text, after = parts.groups()
            for _ in range(before.count(_MARK)):
                next(numbers)
            text = re.sub(_MARK, lambda _: f"image {next(numbers)}", text)
            for _ in range(after.count(_MARK)):
                next(numbers)
            question = f"{before}{text}{after}"
        found.append((question, answer))
    return tuple(found)
