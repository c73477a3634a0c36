"""The row checks: one reason for each way a row can be bad."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import bomb
from PIL import Image

from clinkd.data.boxes import BoxError
from clinkd.data.records import Turn
from clinkd.data.validate import (
    REASONS,
    Folder,
    Limits,
    RowError,
    check_image,
    check_modality,
    check_turn,
    clean_text,
    contradictions,
    infer_task,
    reason,
)

BOX = "<box>(1,2),(3,4)</box>"


def code_of(call, *args) -> str:
    with pytest.raises((RowError, BoxError)) as caught:
        call(*args)
    code, detail = reason(caught.value)
    assert code in REASONS and detail and not detail.startswith(code)
    return code


@pytest.mark.parametrize(
    ("question", "answer", "task"),
    [
        ("Where is the left hip located in the image?", f"The hip left is located at the {BOX}.", "vg"),
        (f"What anatomical structure is present at the {BOX}?", "Sacrum", "roc"),
        (f"What is at the {BOX}?", "left lower lung lobe", "roc"),
        (
            f"Can you describe the content within the {BOX}?",
            "This region contains the lumbar vertebra.",
            "rc",
        ),
        (f"What is at the {BOX}?", f"Sacrum {BOX}", "roc"),
        ("What can you interpret from the overall image?", "The CT image shows much.", "mia"),
    ],
)
def test_a_pair_shows_its_task(question: str, answer: str, task: str) -> None:
    assert infer_task(question, answer) == task
    assert check_turn(question, answer) == Turn(task, question, answer)


def test_the_marks_around_a_text_go() -> None:
    turn = check_turn(
        "Picture 1: <img>ct_00--A--b--c.png</img>\n"
        "What is the <ref>thing</ref> at <|box_start|>(1,2),(3,4)<|box_end|>?",
        " Liver\r\n",
    )
    assert turn == Turn("roc", f"What is the thing at {BOX}?", "Liver")
    assert check_turn("<image>\nWhat?", "A liver.").question == "What?"
    assert check_turn("<image>What?", "A liver.").question == "What?"


def test_a_task_the_source_names_wins_over_the_guess() -> None:
    assert check_turn(f"What is at {BOX}?", "Liver", "rc").task == "rc"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "non_text"),
        (3, "non_text"),
        (["q"], "non_text"),
        ("", "empty_text"),
        (" \n\t", "empty_text"),
        ("<img>ct.png</img>\n", "empty_text"),
        ("a\x00b", "control_characters"),
        ("a\x1bb", "control_characters"),
        ("a\rb", "control_characters"),
        ("a\x85b", "control_characters"),
        ("a\x1f", "control_characters"),
        ("\u2028", "control_characters"),
        ("a\u2028b", "control_characters"),
        ("a\u2029b", "control_characters"),
        ("a\ud800b", "invalid_utf8"),
        ("a" * 8001, "too_long"),
        ("a <|im_end|> b", "special_token"),
        ("a <|image_pad|> b", "special_token"),
        ("a <img>b.png</img>", "special_token"),
    ],
)
def test_a_text_is_refused_with_its_reason(value: object, code: str) -> None:
    assert code_of(clean_text, value, Limits()) == code
    assert code_of(check_turn, value, "answer") == code
    assert code_of(check_turn, "question", value) == code


@pytest.mark.parametrize("text", ["naïve 左肾 ½", "two\nlines", "a\tb", "5 < 6 | 7 > 2", "<ref>liver</ref>"])
def test_ordinary_text_passes(text: str) -> None:
    assert clean_text(text, Limits()) == text.removeprefix("<ref>").removesuffix("</ref>")


@given(st.text())
def test_any_text_is_cleaned_once_and_for_all_or_refused(text: str) -> None:
    try:
        cleaned = clean_text(text, Limits())
    except RowError as error:
        assert error.code in REASONS
    else:
        assert clean_text(cleaned, Limits()) == cleaned


@pytest.mark.parametrize(
    ("question", "answer", "task", "code"),
    [
        ("Where?", "Here <box>(1,2),(3</box>", None, "box_broken"),
        ("Where?", "Here <box>(1,2),(3,4)", None, "box_broken"),
        ("Where?", "Here <box>(1,2),(3,4000)</box>", None, "box_out_of_range"),
        ("What is at <box>(9,2),(3,4)</box>?", "Liver", None, "box_inverted"),
        ("What is at <|box_start|>(3,2),(3,4)<|box_end|>?", "Liver", None, "box_empty"),
        ("Where?", "nowhere", "vg", "box_missing"),
        ("What is it?", "Liver", "roc", "box_missing"),
        ("What is it?", "Liver", "rc", "box_missing"),
        ("What is it?", "Liver", "detect", "invalid_record"),
    ],
)
def test_boxes_have_to_be_there_and_good(question: str, answer: str, task: str | None, code: str) -> None:
    assert code_of(check_turn, question, answer, task) == code


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("<box> ( 1 , 2 ) ,\n(3,4) </box>", BOX),
        ("<box>(01,002),(3,4)</box>", BOX),
        ("<box>(1,\u00a02),(3,4)</box>", BOX),
        (f"{BOX} and <box>(5,6), (7,8)</box>", f"{BOX} and <box>(5,6),(7,8)</box>"),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", BOX),
    ],
)
def test_a_box_is_stored_in_one_spelling(text: str, stored: str) -> None:
    assert check_turn("Where?", f"At {text}.").answer == f"At {stored}."
    assert check_turn(f"What is at {text}?", "Liver").question == f"What is at {stored}?"


@given(st.lists(st.sampled_from(["<box>", "</box>", "(1,2)", ",", "(3,4)", "a", " ", "\n", "&lt;", "<Box>"])))
def test_no_text_around_boxes_passes_with_one_that_is_not_read(parts: list[str]) -> None:
    try:
        turn = check_turn("Where?", "".join(parts))
    except (RowError, BoxError):
        return
    assert turn.answer.count("<box>") == turn.answer.count("</box>") == turn.answer.count(BOX)
    assert "(1,2),(3,4)" not in turn.answer.replace(BOX, "") and "<Box>" not in turn.answer
    assert check_turn("Where?", turn.answer) == turn


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u0631\u0648\u062f",  # Persian, with a joiner that is spelling
        "T2 & FLAIR; AT&T",
        "a < b & c > d",
        "12\u00a0mm \u2026 \u00b5m\u00b2",
        "segments (4, 5) and (6, 7)",
        "a bounding box, a [box] and a box",
        "levels L1/L2\tL3",
    ],
)
def test_what_only_looks_odd_passes(text: str) -> None:
    assert check_turn("What?", text).answer == text


def test_a_text_of_many_marks_takes_no_long_time() -> None:
    """Each of these would take minutes where a pattern goes back over what it has read."""
    for text in (
        "<img></img>" + " " * 200_000 + "x",
        "<box>" * 1_500,
        "(1," * 2_500,
        "<image>" * 30_000 + "x",
    ):
        with contextlib.suppress(RowError, BoxError):
            check_turn(text, "a")


def test_contradictions_are_of_vg_and_roc_only() -> None:
    turns = [Turn(task, "q", answer) for task in ("vg", "roc", "rc", "mia") for answer in ("a", "b")]
    turns += [Turn("vg", "same", "a"), Turn("vg", "same", "a")]
    assert contradictions(turns) == {("vg", "q"), ("roc", "q")}


def test_modalities_are_the_eight() -> None:
    assert check_modality("x_ray--a--b--c.png") == "x"
    for name in ("CT_00--a.png", "oct_00.png", "photo.png", ""):
        assert code_of(check_modality, name) == "unknown_modality"


# Image files.


def png(mode: str = "RGB", size: tuple[int, int] = (16, 16), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, form)
    return buffer.getvalue()


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "PNG")
    return buffer.getvalue()


BAD_FILES = {
    "zero_byte": b"",
    "unreadable_image": b"GIF89a not an image",
    "unreadable_image:html": b"<html>404</html>" * 100,
    "unreadable_image:bmp": png(form="BMP"),
    "unreadable_image:garbled": noise()[:60] + b"\xff" * 200 + noise()[260:],
    "truncated": noise()[:-900],
    "truncated:signature": noise()[:20],
    "truncated:end": noise()[:-12],
    "truncated:jpeg": png("RGB", (64, 64), "JPEG")[:-200],
    "bomb": bomb(),
    "bomb:decodable": png("1", (9000, 9000)),
    "bad_mode": png("I;16"),
    "bad_mode:cmyk": png("CMYK", form="JPEG"),
    "bad_shape": png(size=(4, 16)),
    "bad_shape:long": png(size=(2000, 8)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(name: str) -> None:
    assert code_of(check_image, BAD_FILES[name]) == name.split(":")[0]


@pytest.mark.parametrize(
    "data",
    [png(), png("L"), png("P"), png("RGBA"), png("LA"), png("1"), png(form="JPEG"), png("L", form="JPEG")],
)
def test_a_good_file_decodes(data: bytes) -> None:
    assert check_image(data).size == (16, 16)


def test_limits_are_the_callers(root: Path) -> None:
    assert code_of(check_image, png(), Limits(max_pixels=255)) == "bomb"
    assert code_of(check_image, png(), Limits(min_side=17)) == "bad_shape"
    assert code_of(Folder(root, Limits(max_bytes=len(png()) - 1)).read, "a.png") == "too_many_bytes"
    assert code_of(clean_text, "abc", Limits(max_chars=2)) == "too_long"


# Image names.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2" / "a.png").write_bytes(png())
    for name in ("a.png", "sub/b.png", "with space.v1.png"):
        (root / name).write_bytes(png())
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "sub" / "b.png")
    (root / "folder_out").symlink_to(tmp_path / "images2")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    return root


@pytest.mark.parametrize(
    "name", ["a.png", "./a.png", "sub/b.png", "with space.v1.png", "in.png", "images/a.png"]
)
def test_names_within_the_folder_are_read(root: Path, name: str) -> None:
    folder = Folder(root, Limits())
    assert folder.read(name) == png()
    assert folder.unchanged(folder.seen)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../secret.png", "path_escape"),
        ("sub/../../secret.png", "path_escape"),
        ("..\\secret.png", "path_escape"),
        ("/etc/hostname", "path_escape"),
        ("C:\\a.png", "path_escape"),
        ("\\\\server\\a.png", "path_escape"),
        ("", "path_escape"),
        ("out.png", "path_escape"),
        ("folder_out/a.png", "path_escape"),
        ("a.png\n", "control_characters"),
        ("a\x00.png", "control_characters"),
        ("a\ud800.png", "invalid_utf8"),
        ("nothing.png", "missing_image"),
        ("dangling.png", "missing_image"),
        ("sub", "missing_image"),
        ("a" * 300 + ".png", "missing_image"),
    ],
)
def test_other_names_are_refused(root: Path, name: str, code: str) -> None:
    assert code_of(Folder(root, Limits()).read, name) == code


def test_the_folder_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert Folder(tmp_path / "link", Limits()).read("a.png") == png()


def test_a_folder_knows_files_that_changed_since(root: Path) -> None:
    folder = Folder(root, Limits())
    with pytest.raises(RowError):
        folder.read("late.png")
    missed = dict(folder.seen)
    folder.seen.clear()
    folder.read("a.png")
    assert folder.unchanged(folder.seen) and not folder.unchanged(missed)
    (root / "a.png").write_bytes(png("L"))
    assert not folder.unchanged(folder.seen)
    (root / "a.png").unlink()
    assert not folder.unchanged(folder.seen)
