"""Row checks: what may enter a shard, and the stable reason code of what may not.

Decisions:
- A bad row raises ``RowError(code, detail)`` (boxes raise ``BoxError``, which has a code too); whoever reads
  the row writes it to the quarantine. A code, once published in ``REASONS``, keeps its name.
- A question/answer pair is checked alone: one bad turn does not take the image's other turns along. What is
  wrong with the image (missing, truncated, too large) takes all of them.
- Nothing is repaired silently, except what every reader of Med-GRIT takes away: the ``Picture 1:
  <img>..</img>`` prefix, ``<image>``, ``<ref>`` marks, and Qwen's spelling of ``<box>``. A good box is
  written in one way, without spaces, so that a model learns one.
- What hides a box (another spelling of the mark, HTML's entities, corners without a mark) is refused: the
  pair would pass as one without a box, and as another task.
- Of characters without a width only the two joiners pass: Persian, Hindi and emoji are written with them. No
  tag, no soft hyphen, nothing that turns the direction of text: it reads other than it is.
- An image is decoded once, fully: a header alone does not show a truncated file. The size is read from the
  header before any pixel is decoded, so a decompression bomb costs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import warnings
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from clinkd import storage
from clinkd.data.boxes import BoxError, format_box, from_qwen, parse_boxes
from clinkd.data.records import MODALITIES, TASKS, Box, Turn, modality_of

if TYPE_CHECKING:
    from PIL import Image

REASONS = {
    "missing_image": "the image file is not there",
    "zero_byte": "the image file is empty",
    "unreadable_image": "the file is not a PNG or JPEG that can be decoded",
    "truncated": "the image file ends too early",
    "bomb": "more pixels than the limit",
    "too_many_bytes": "an image file larger than the limit",
    "bad_mode": "a pixel format other than grey, RGB or palette, 8 bits deep",
    "bad_shape": "an image too small, or too long for its width, for the vision tower",
    "path_escape": "an image name that leaves the images' folder",
    "no_image": "a record that says it has no image",
    "many_images": "a conversation about more images than the limit",
    "image_marks": "<image> marks whose number is not that of the images",
    "foreign_media": "a video or a sound",
    "tool_turn": "a message of a tool, or a call of one",
    "ambiguous_image": "two image files of one name in different folders",
    "unknown_modality": "an image name that begins with none of the eight modalities",
    "non_text": "a question or answer that is not text",
    "empty_text": "a question or answer without text",
    "too_long": "a question or answer longer than the limit",
    "control_characters": "NUL or other control characters, or Unicode line separators",
    "special_token": "text that the tokenizer would read as a control token",
    "html_entity": "text of a web page: &lt;box&gt; for <box>",
    "invalid_utf8": "bytes or code points that are not UTF-8",
    "invalid_json": "a line or rest of a file that is not JSON",
    "invalid_record": "JSON that is not an object with an image and conversations",
    "odd_turns": "questions and answers that do not alternate",
    "no_turns": "a record that asks nothing",
    "duplicate_id": "an id already used for another image",
    "contradicting_answers": "one question with different answers",
    "box_broken": "a box that is not four integers",
    "box_nan": "a box with a coordinate that is not finite",
    "box_out_of_range": "a box outside the 0-1000 grid",
    "box_inverted": "a box whose corners are swapped",
    "box_empty": "a box without area",
    "box_missing": "no box where the task needs one",
    "box_without_image": "a box in a record that has no image",
    "box_ambiguous_image": "a box in a conversation about several images: which one is not said",
    "mask_missing": "a listed mask file that is not there",
    "mask_orphan": "a mask without its image",
    "mask_unreadable": "a mask that cannot be decoded",
    "mask_wrong_size": "a mask whose size is not the image's",
    "mask_empty": "a mask without foreground",
    "mask_inverted": "a mask that marks the background",
    "mask_full": "a mask over nearly the whole image",
    "mask_bad_name": "a mask whose name does not say its class",
    "mask_unknown_class": "a mask whose class is not in the class mapping",
    "no_masks": "an image without masks",
}

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_PNG = b"\x89PNG\r\n\x1a\n"
_PREFIX = re.compile(r"^[ \t\r\n]*(?:(?:Picture \d+:[ \t]*)?<img>[^<]*</img>[ \t\r\n]*)+")
_MARKS = re.compile(r"</?ref>|<\|object_ref_(?:start|end)\|>|<image>\n?")
_SPECIAL = re.compile(r"<\|\w+\|>|</?(?:img|ref|image|tool_call|tool_response)>")
_MEDIA = re.compile(r"<(?:video|audio)>")
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")
_ODD_MARK = re.compile(r"[<＜]\s*/?\s*(?:b?box|bounding[ _-]?box)\s*/?\s*[>＞]", re.I)
_NO_MARK = re.compile(r"[(（]\s*-?[\d.]+\s*[,，]\s*-?[\d.]+\s*[)）]\s*[,，]?\s*[(（]\s*-?[\d.]+\s*[,，]")
# All controls but tab and line feed; line separators; what turns the direction of text or has no width.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
_BOX = re.compile(r"<box>.*?</box>", re.S)
_LONGEST_NAME = 1024
FETCHED_AHEAD = 16
"""Files of a bucket that are on their way at one time."""


class RowError(ValueError):
    """A row that cannot be used; ``code`` is a key of ``REASONS``."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def reason(error: RowError | BoxError) -> tuple[str, str]:
    """(code, detail) of a refused row."""
    return error.code, str(error).removeprefix(f"{error.code}: ")


@dataclass(frozen=True)
class Limits:
    """What is too large or too small."""

    max_pixels: int = 64_000_000
    max_bytes: int = 256_000_000  # of one image file
    min_side: int = 8  # pixels
    max_aspect: int = 200  # longer side over shorter; Qwen2-VL's processor refuses more
    max_chars: int = 8_000  # of one question or answer; the recipe cuts at 2,048 tokens
    max_images: int = 8  # of one conversation


def clean_text(value: object, limits: Limits) -> str:
    """A question or answer as it is stored: marks stripped, ``<box>`` spelled Med-GRIT's way.

    Raises:
        RowError: non_text, invalid_utf8, control_characters, too_long, special_token, foreign_media,
            html_entity or empty_text.
    """
    if not isinstance(value, str):
        raise RowError("non_text", f"{type(value).__name__}: {str(value)[:60]!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("invalid_utf8", f"a lone surrogate at character {error.start}") from None
    if "\ufffd" in value:
        raise RowError("invalid_utf8", f"a replacement character at character {value.index(chr(0xFFFD))}")
    text = from_qwen(_MARKS.sub("", _PREFIX.sub("", value))).replace("\r\n", "\n")
    if len(text) > limits.max_chars:
        raise RowError("too_long", f"{len(text)} characters, at most {limits.max_chars}")
    control = _CONTROL.search(text)
    if control:
        raise RowError("control_characters", f"U+{ord(control.group()):04X} at character {control.start()}")
    text = text.strip()  # only now: stripping takes some control characters along
    for code, pattern in (("special_token", _SPECIAL), ("foreign_media", _MEDIA), ("html_entity", _ENTITY)):
        if found := pattern.search(text):
            raise RowError(code, found.group()[:60])
    if not text:
        raise RowError("empty_text", "no text")
    return text


def infer_task(question: str, answer: str) -> str:
    """A pair's task from its boxes: asked for (vg), asked about (roc to four words, else rc), none (mia)."""
    if "<box>" in question:
        return "roc" if len(_BOX.sub(" ", answer).split()) <= 4 else "rc"
    return "vg" if "<box>" in answer else "mia"


def _boxes(text: str) -> tuple[str, list[Box]]:
    """``text`` with its boxes written the one way, and the boxes.

    Raises:
        BoxError: a bad box, or one that its marks do not show.
    """
    boxes = parse_boxes(text)
    spelled = map(format_box, boxes)
    text = _BOX.sub(lambda _: next(spelled), text)
    rest = _BOX.sub(" ", text)
    if found := _ODD_MARK.search(rest):
        raise BoxError("box_broken", f"a mark spelled {found.group()[:40]}")
    if found := _NO_MARK.search(rest):
        raise BoxError("box_broken", f"corners without a mark: {found.group()[:40]}")
    return text, boxes


def check_turn(
    question: object,
    answer: object,
    task: str | None = None,
    limits: Limits | None = None,
    images: int = 1,
) -> Turn:
    """One question/answer pair as a ``Turn``.

    Args:
        task: the task the source names, or None to infer it.
        images: how many images the question is about.

    Raises:
        RowError, BoxError: with the reason's code.
    """
    limits = limits or Limits()
    asked, answered = clean_text(question, limits), clean_text(answer, limits)
    (asked, in_question), (answered, in_answer) = _boxes(asked), _boxes(answered)
    if images > 1 and (in_question or in_answer):
        raise RowError("box_ambiguous_image", f"{images} images")
    task = task or infer_task(asked, answered)
    if task not in TASKS:
        raise RowError("invalid_record", f"task {task!r}")
    if task == "vg" and not in_answer:
        raise RowError("box_missing", "a VG answer without a box")
    if task in ("roc", "rc") and not in_question:
        raise RowError("box_missing", f"an {task.upper()} question without a box")
    return Turn(task, asked, answered)


def contradictions(turns: list[Turn]) -> set[tuple[str, str]]:
    """(task, question) of VG and ROC pairs with different answers; captions may differ and both be true."""
    answers: dict[tuple[str, str], set[str]] = {}
    for turn in turns:
        if turn.task in ("vg", "roc"):
            answers.setdefault((turn.task, turn.question), set()).add(turn.answer)
    return {key for key, given in answers.items() if len(given) > 1}


def check_modality(image: str) -> str:
    modality = modality_of(image)
    if modality not in MODALITIES:
        raise RowError("unknown_modality", f"{modality[:40]!r}: expected one of {', '.join(MODALITIES)}")
    return modality


def check_name(name: str) -> str:
    """An id or file name that can be stored and printed on one line.

    Raises:
        RowError: too_long, control_characters or invalid_utf8.
    """
    if len(name) > _LONGEST_NAME:
        raise RowError("too_long", f"a name of {len(name)} characters, at most {_LONGEST_NAME}")
    control = re.search("[\t\n]", name) or _CONTROL.search(name)
    if control:
        raise RowError("control_characters", f"U+{ord(control.group()):04X} in the name {name[:60]!r}")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("invalid_utf8", f"a lone surrogate in the name {name[:60]!r}") from None
    return name


def resolve(root: Path, name: str) -> list[Path]:
    """Where the file ``name`` (a relative path with ``/``) under ``root`` may lie, likeliest first; a leading
    folder named like ``root`` may be left out.

    Raises:
        RowError: path_escape for absolute paths, ``..`` and links that lead out of ``root``; missing_image
            where the name cannot be a file's; those of ``check_name``.
    """
    check_name(name)
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or path.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise RowError("path_escape", repr(name[:120]))
    tries = [root / str(path)]
    if len(path.parts) > 1 and path.parts[0] == root.name:
        tries.append(root.joinpath(*path.parts[1:]))
    if storage.is_remote(root):
        return tries
    real_root = root.resolve()
    for candidate in tries:
        try:
            inside = candidate.resolve().is_relative_to(real_root)
        except (OSError, RuntimeError) as error:  # too long a name, links in a circle
            raise RowError("missing_image", f"{name[:120]!r}: {error}"[:200]) from None
        if not inside:
            raise RowError("path_escape", f"{name[:120]!r} is a link out of the folder")
    return tries


class Folder:
    """A folder that files are read from by names a stranger wrote; ``seen`` keeps what each file was.

    From a bucket, whose answers take their time, the next files of ``expect`` are fetched ahead. There a file
    that cannot be read for another reason than not being there raises OSError: an outage is no row's fault.
    """

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        self.seen: dict[str, str | None] = {}
        self._coming: deque[str] = deque()
        self._fetched: dict[str, Future[tuple[bytes, str]]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, names: Iterable[str]) -> None:
        """Files that will be read, in about this order."""
        if storage.is_remote(self.root):
            self._coming = deque(dict.fromkeys(names))
            self._pool = self._pool or ThreadPoolExecutor(FETCHED_AHEAD)

    def read(self, name: str) -> bytes:
        """The bytes of file ``name``.

        Raises:
            RowError: missing_image, unreadable_image, too_many_bytes; those of ``resolve``.
        """
        if name in self._fetched:  # what was to come before it is not wanted any more
            for passed in list(self._fetched)[: list(self._fetched).index(name)]:
                del self._fetched[passed]
        while self._pool and self._coming and len(self._fetched) < FETCHED_AHEAD:
            ahead = self._coming.popleft()
            self._fetched[ahead] = self._pool.submit(self._fetch, ahead)
        future = self._fetched.pop(name, None)
        self.seen[name] = None
        try:
            data, self.seen[name] = future.result() if future else self._fetch(name)
        except OverflowError as error:
            raise RowError("too_many_bytes", str(error)) from None
        except FileNotFoundError:
            raise RowError("missing_image", repr(name[:120])) from None
        except OSError as error:
            if storage.is_remote(self.root):
                raise
            code = "missing_image" if error.errno == errno.ENAMETOOLONG else "unreadable_image"
            raise RowError(code, f"{name[:120]!r}: {error.strerror}") from None
        return data

    def _fetch(self, name: str) -> tuple[bytes, str]:
        for path in resolve(self.root, name):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return storage.read_stamped(path, self.limits.max_bytes)
        raise FileNotFoundError(name)

    def unchanged(self, seen: dict[str, str | None]) -> bool:
        """Whether the files are what they were when a former run read them."""
        for name, stamp in seen.items():
            stamps = (storage.stamp(path) for path in resolve(self.root, name))
            if stamp is None or next((found for found in stamps if found), None) != stamp:
                return False
        return True


def check_image(data: bytes, limits: Limits | None = None) -> Image.Image:
    """A PNG or JPEG that decodes whole, decoded.

    Raises:
        RowError: zero_byte, unreadable_image, truncated, bomb, bad_mode or bad_shape.
    """
    from PIL import Image

    limits = limits or Limits()
    if not data:
        raise RowError("zero_byte", "an empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        except Image.DecompressionBombError as error:
            raise RowError("bomb", str(error)[:120]) from None
        except (OSError, ValueError, SyntaxError) as error:
            raise RowError(_broken(data, ""), type(error).__name__) from None
        _check_header(image.size, image.mode, limits)
        try:
            image.load()
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise RowError(_broken(data, str(error)), str(error)[:120]) from None
    if (
        data.startswith(_PNG) and _broken(data, "") == "truncated"
    ):  # the decoder does not miss a PNG's last chunk
        raise RowError("truncated", "no end of the PNG")
    return image


def _broken(data: bytes, message: str) -> str:
    """The code of a file that does not decode: truncated where its format's end marker is missing."""
    cut = data.startswith(_PNG) and b"IEND" not in data[-4096:]
    cut |= data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" not in data[-4096:]
    return "truncated" if cut or "truncated" in message else "unreadable_image"


def _check_header(size: tuple[int, int], mode: str, limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise RowError("bomb", f"{width} x {height} pixels, at most {limits.max_pixels}")
    if mode not in MODES:
        raise RowError("bad_mode", mode)
    if min(size) < limits.min_side or max(size) > limits.max_aspect * min(size):
        raise RowError("bad_shape", f"{width} x {height} pixels")
