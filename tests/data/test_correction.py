"""The corrector's prompt: whole boxes, nothing that ends its turn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.boxes import parse_boxes, to_qwen
from clinkd.data.correction import MAX_WRONG, correction_prompt, elaborated

QUESTION = "Where is the liver located in the image?"
TRUTH = "The liver is located at the <box>(100,100),(300,300)</box>."


def test_it_holds_question_truth_and_wrong_answer_with_their_boxes() -> None:
    prompt = correction_prompt(QUESTION, TRUTH, "At <|box_start|>(1,2),(3,4)<|box_end|>.<|im_end|>")
    assert prompt.startswith(QUESTION + "\n")
    assert TRUTH in prompt and "At <box>(1,2),(3,4)</box>." in prompt
    assert len(prompt) < len(QUESTION) + len(TRUTH) + 300


def test_an_empty_answer_is_named() -> None:
    assert "first answer: (none)\n" in correction_prompt(QUESTION, TRUTH, " <|im_end|>\n")


def test_a_loop_is_cut_between_boxes() -> None:
    prompt = correction_prompt(QUESTION, TRUTH, "<box>(1,2),(3,4)</box>, " * 100)
    assert len(prompt) < MAX_WRONG + 400
    assert len(parse_boxes(prompt)) > 2  # strict: none is cut
    assert "…\n" in prompt


PIECES = ["<box>", "</box>", "(1,2),(3,4)", "<|im_end|>", "<|", "|>", "x" * 150]


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text(max_size=80) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_whatever_the_model_said_tags_stay_paired_and_nothing_ends_the_turn(wrong: str) -> None:
    prompt = correction_prompt(QUESTION, TRUTH, wrong)
    assert prompt.count("<box>") == prompt.count("</box>")
    assert "<|im_end|>" not in to_qwen(prompt)
    assert to_qwen(prompt).count("<|") == 2 * prompt.count("<box>") + prompt.replace("<|box", "").count("<|")


def test_a_groundings_truth_is_elaborated_with_where_its_one_box_lies() -> None:
    more = f"In the upper left of the image: {TRUTH}"
    assert elaborated("vg", TRUTH) == more
    assert elaborated("vg", more) is None
    assert elaborated("vg", "At <box>(1,1),(2,2)</box> and <box>(3,3),(4,4)</box>.") is None
    for task in ("roc", "rc", "mia"):  # a name stays a name
        assert elaborated(task, TRUTH) is None
