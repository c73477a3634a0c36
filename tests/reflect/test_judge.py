"""The judge's table: what a model said, and whether it needs correction."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.reflect.judge import REASONS, box_overlap, fault, judge, repeats, score, tidy
from clinkd.reflect.similarity import RougeSimilarity

LIVER = "The liver is located at the <box>(100,100),(300,300)</box>."
TWO = "The kidneys are at <box>(0,0),(100,100)</box> and <box>(500,500),(600,600)</box>."
REGION = "This region contains the liver, a large structure in the upper left of the image."
SCENE = "The CT image displays, from left to right, the liver, the tumor and the left kidney."

# (task, truth, response, the reason or None). ROUGE-L judges here; the encoder's cases: test_encoders.py.
CASES = [
    # Visual grounding: the boxes decide.
    ("vg", LIVER, LIVER, None),
    ("vg", LIVER, "<box>(100,100),(300,300)</box> shows the liver.", None),
    ("vg", LIVER, "<box>(110,110),(310,310)</box>", None),
    ("vg", LIVER, "The liver is at <|box_start|>(100,100),(300,300)<|box_end|>.<|im_end|>", None),
    ("vg", LIVER, "The liver is located at the <box>(100,100),(300,199)</box>.", "low_iou"),
    (
        "vg",
        LIVER,
        "The liver is located at the <box>(100,100),(300,200)</box>.",
        "low_iou",
    ),  # exactly 0.5 misses
    ("vg", LIVER, "The liver is located at the <box>(100,100),(300,201)</box>.", None),
    ("vg", LIVER, "The liver is located at the <box>(600,600),(900,900)</box>.", "low_iou"),
    ("vg", LIVER, "The liver is in the upper left.", "no_box"),
    ("vg", LIVER, "The liver is located at the (100,100),(300,300).", "format"),
    ("vg", LIVER, "The liver is located at the <box>(300,300),(100,100)</box>.", "format"),
    ("vg", LIVER, "The liver is located at the <box>(100,100),(300,1300)</box>.", "format"),
    ("vg", LIVER, "The liver is located at the <box>(100,100),(300,300)", "format"),
    ("vg", LIVER, "The liver is located at the <box>here</box>.", "format"),
    ("vg", LIVER, "The spleen is located at the <box>(100,100),(300,300)</box>.", "wrong_object"),
    (
        "vg",
        "The left hip is at <box>(0,0),(99,99)</box>.",
        "The right hip is at <box>(0,0),(99,99)</box>.",
        "laterality",
    ),
    (
        "vg",
        "The hip left is at <box>(0,0),(99,99)</box>.",
        "The left hip is at <box>(0,0),(99,99)</box>.",
        None,
    ),
    ("vg", LIVER, "There is no liver; see <box>(100,100),(300,300)</box>.", "negation"),
    ("vg", LIVER, "", "empty"),
    ("vg", LIVER, "<|im_end|>", "empty"),
    ("vg", LIVER, "<box>(1,1),(9,9)</box> " * 4, "repetition"),
    ("vg", TWO, TWO, None),
    ("vg", TWO, "They are at <box>(0,0),(100,100)</box>.", "low_iou"),
    ("vg", TWO, "<box>(500,500),(600,600)</box><box>(0,0),(100,100)</box>", None),
    ("vg", LIVER, "The liver: <box>(100,100),(300,300)</box> or <box>(500,500),(700,700)</box>", None),
    (
        "vg",
        LIVER,
        "The liver, beside the spleen, the heart and the kidney, is at <box>(100,100),(300,300)</box>.",
        None,
    ),
    # Referring object classification: the words decide.
    ("roc", "Sacrum", "Sacrum", None),
    ("roc", "Sacrum", "This is the sacrum.", None),
    ("roc", "Left kidney", "The left kidney.", None),
    ("roc", "Left kidney", "Right kidney", "laterality"),
    ("roc", "Left kidney", "Kidney", "laterality"),
    ("roc", "Left kidney", "The left or the right kidney", "laterality"),
    ("roc", "Kidney", "Left kidney", None),
    ("roc", "Left kidney", "Left lung", "wrong_object"),
    ("roc", "Liver", "Spleen", "wrong_object"),
    ("roc", "Liver", "Liver, spleen, kidney or heart", "wrong_object"),
    ("roc", "Edema", "Oedema", None),
    ("roc", "Hemorrhage", "Haemorrhage", None),
    ("roc", "Tumor", "A tumour", None),
    ("roc", "Lungs", "Lung", None),
    ("roc", "Pneumothorax", "No pneumothorax", "negation"),
    ("roc", "No pneumothorax", "Pneumothorax", "negation"),
    ("roc", "L3 vertebra", "L4 vertebra", "number"),
    ("roc", "L3 vertebra", "The L3 vertebra", None),
    ("roc", "Choroid plexus", "Caudate", "wrong_object"),
    ("roc", "Hip", "hip ship", None),
    ("roc", "Hip", "A ship", "wrong_object"),  # whole words, unlike the published metric
    ("roc", "Liver <box>(100,100),(300,300)</box>", "Liver", None),  # its box was the question's
    ("roc", "Sacrum", "   ", "empty"),
    ("roc", "Sacrum", "...", "empty"),
    ("roc", "Sacrum", "sacrum sacrum sacrum sacrum sacrum", "repetition"),
    ("roc", "Sacrum", "Sacrum <|vision_start|>", "format"),
    ("roc", "Sacrum", "It is the <box>(1,1)</box>", "format"),
    # Referring captions and whole images: similarity and the exact checks.
    ("rc", REGION, REGION, None),
    (
        "rc",
        REGION,
        "This region contains the liver, a large structure in the upper left of the picture.",
        None,
    ),
    ("rc", REGION, REGION.replace("liver", "spleen"), "wrong_object"),
    ("rc", REGION, REGION.replace("left", "right"), "laterality"),
    ("rc", REGION, "A nice day.", "low_similarity"),
    ("rc", "An oedema is seen in the centre.", "An edema is seen in the center.", None),
    ("rc", "There is no pneumothorax in the lung.", "There is a pneumothorax in the lung.", "negation"),
    ("rc", "There is a fracture of the rib.", "There is no fracture of the rib.", "negation"),
    (
        "rc",
        "The region shows two nodules in the lung.",
        "The region shows three nodules in the lung.",
        "number",
    ),
    ("rc", REGION, "the liver the liver the liver the liver the liver", "repetition"),
    ("rc", REGION, "", "empty"),
    ("mia", SCENE, SCENE, None),
    ("mia", SCENE, SCENE.replace("left kidney", "right kidney"), "laterality"),
    (
        "mia",
        SCENE,
        "The CT image displays, from left to right, the heart, the spleen and the cyst.",
        "wrong_object",
    ),
    ("mia", SCENE, "The CT image displays, from left to right, the liver and the tumor.", None),
    ("mia", SCENE, "An image of the liver.", "low_similarity"),
    ("mia", "The lungs are clear, without effusion.", "The lungs are clear, with effusion.", "negation"),
    ("mia", "Both lungs are clear.", "The left lung is clear.", "laterality"),
    ("mia", SCENE, "The CT image shows a liver. " * 3, "repetition"),
]


def sample(task: str, answer: str) -> dict:
    return {"task": task, "question": "?", "answer": answer}


def test_the_table_is_large_enough_and_meets_every_reason() -> None:
    assert len(CASES) >= 60
    assert {reason for *_, reason in CASES} == {None, *REASONS}


@pytest.mark.parametrize(("task", "truth", "response", "reason"), CASES)
def test_verdict(task: str, truth: str, response: str, reason: str | None) -> None:
    verdict = judge([sample(task, truth)], [response], RougeSimilarity())[0]
    assert verdict.reason == reason
    assert verdict.needs_correction is (reason is not None)


def test_a_batch_gives_what_single_calls_give() -> None:
    samples = [sample(task, truth) for task, truth, *_ in CASES]
    responses = [response for _, _, response, _ in CASES]
    single = [judge([s], [r], RougeSimilarity())[0] for s, r in zip(samples, responses, strict=True)]
    assert judge(samples, responses, RougeSimilarity()) == single
    assert judge(samples[::-1], responses[::-1], RougeSimilarity()) == single[::-1]


def test_a_conflict_halves_the_score_and_extra_boxes_cost_score() -> None:
    def of(truth: str, response: str, task: str = "roc") -> float:
        return judge([sample(task, truth)], [response], RougeSimilarity())[0].score

    assert of("Left kidney", "Right kidney") == 0.25  # ROUGE-L 0.5
    spare = " <box>(900,900),(999,999)</box>"
    assert of(LIVER, LIVER, "vg") == 1.0
    assert of(LIVER, LIVER + spare, "vg") == 0.75
    assert of(LIVER, "", "vg") == 0.0


def test_a_threshold_is_the_callers() -> None:
    near = "The liver is located at the <box>(100,100),(300,180)</box>."
    kinder = judge([sample("vg", LIVER)], [near], RougeSimilarity(), iou_threshold=0.3)[0]
    assert (kinder.needs_correction, kinder.iou) == (False, 0.4)
    short = judge(
        [sample("mia", SCENE)], ["An image of the liver."], RougeSimilarity(), similarity_threshold=0.1
    )[0]
    assert not short.needs_correction
    exactly = judge(
        [sample("mia", SCENE)], ["An image of the liver."], RougeSimilarity(),
        similarity_threshold=short.similarity or 1.0,
    )  # fmt: skip
    assert exactly[0].reason is None


@pytest.mark.parametrize(
    ("task", "reason"),
    [("roc", None), ("rc", "low_similarity"), ("mia", "low_similarity"), ("vg", "low_similarity")],
)
def test_only_a_classification_is_right_by_the_words_it_contains(task: str, reason: str | None) -> None:
    answer = "Something that may well be, as far as can be told from here, the sacrum of a person."
    assert judge([sample(task, "Sacrum")], [answer], RougeSimilarity())[0].reason == reason


def test_how_many_names_must_agree_is_the_callers() -> None:
    three = "The CT image displays the liver, the tumor and the heart."
    one_wrong = "The CT image displays the liver, the cyst and the heart."
    reasons = [
        judge([sample("mia", three)], [one_wrong], RougeSimilarity(), names_threshold=least)[0].reason
        for least in (0.5, 0.8)
    ]
    assert reasons == [None, "wrong_object"]


def test_another_modality_is_another_object() -> None:
    for answer, reason in ((SCENE.replace("CT", "PET"), "wrong_object"), (SCENE.replace("CT ", ""), None)):
        assert judge([sample("mia", SCENE)], [answer], RougeSimilarity())[0].reason == reason
    film = "An x-ray image of the lung."
    assert judge([sample("mia", film)], ["A radiograph image of the lung."], RougeSimilarity(),
                 similarity_threshold=0.5)[0].reason is None  # fmt: skip


def test_a_grounding_truth_without_a_box_is_judged_by_its_words() -> None:
    absent = sample("vg", "There is no stone in the image.")
    answers = ["No stone is in the image.", "A stone is in the image."]
    same, other = judge([absent] * 2, answers, RougeSimilarity(), similarity_threshold=0.5)
    assert (same.reason, same.iou) == (None, None)
    assert other.reason == "negation"


def test_overlap_of_bare_corners_and_of_one_box_over_two_targets() -> None:
    assert box_overlap(LIVER, "(100,100),(300,300)") == (1.0, 1.0)
    twice = "<box>(0,0),(100,100)</box><box>(0,0),(100,90)</box>"
    assert box_overlap(twice, "<box>(0,0),(100,100)</box>") == (0.95, 0.9)
    assert box_overlap("no box", LIVER) == (None, 1.0)


def test_repetition_needs_a_loop_not_a_list() -> None:
    assert repeats("no no no no")
    assert repeats("a b c a b c a b c") and not repeats("a b c a b c")
    assert repeats("so no no no no") and not repeats("so no no no")  # what stood before it does not count
    lines = [" ".join(f"w{n}" for n in range(count)) for count in (12, 13)]
    assert repeats(" ".join(lines[:1] * 3)) and not repeats(" ".join(lines[1:] * 3))
    assert not repeats("the liver, the spleen, the heart and the lung")
    assert not repeats("very very very large")
    assert not repeats("".join(f"<box>({n},0),({n + 9},9)</box>" for n in range(6)))


def test_who_judges_by_hand_judges_as_published() -> None:
    assert fault(sample("vg", LIVER), LIVER, 0.5) == "low_iou"
    assert fault(sample("vg", LIVER), LIVER, 0.51) is None
    assert fault(sample("roc", "Liver"), "Spleen", 1.0) == "wrong_object"


def test_a_side_must_be_said_where_it_is_asked_for() -> None:
    side = "The left kidney is at <box>(0,0),(99,99)</box>."
    assert fault(sample("vg", side), "The kidney is at <box>(0,0),(99,99)</box>.", 1.0) is None
    for answer in ("kidney", "left kidney and right kidney", "right kidney"):
        assert fault(sample("roc", "left kidney"), answer, 1.0) == "laterality"


def test_wrong_calls_are_named() -> None:
    with pytest.raises(ValueError, match="1 samples but 0 responses"):
        judge([sample("vg", LIVER)], [], RougeSimilarity())
    with pytest.raises(ValueError, match="unknown task 'ocr'"):
        judge([sample("ocr", LIVER)], [LIVER], RougeSimilarity())
    assert judge([], [], RougeSimilarity()) == []


def test_tidy_ends_where_the_answer_ends() -> None:
    assert tidy(" Sacrum.<|im_end|>\n<|endoftext|>") == "Sacrum."
    assert tidy("<|box_start|>(1,2),(3,4)<|box_end|>") == "<box>(1,2),(3,4)</box>"


PIECES = "left right kidney no liver <box> </box> (1,2),(30,40) 2 , . <|im_end|>"
TEXT = st.text(max_size=60) | st.lists(st.sampled_from(PIECES.split()), max_size=12).map(" ".join)


@settings(deadline=None)  # a loaded machine is no failure
@given(st.sampled_from(["vg", "roc", "rc", "mia"]), TEXT, TEXT)
def test_any_text_is_judged_within_range_and_twice_alike(task: str, truth: str, response: str) -> None:
    first, second = (judge([sample(task, truth)], [response], RougeSimilarity())[0] for _ in range(2))
    assert first == second
    assert 0 <= first.score <= 1
    assert 0 <= first.similarity <= 1
    assert first.iou is None or 0 <= first.iou <= 1
    assert first.needs_correction is (first.reason is not None)
    assert first.reason is None or first.reason in REASONS


@settings(deadline=None)  # a loaded machine is no failure
@given(st.floats(0, 1), st.none() | st.floats(0, 1), st.floats(0, 1))
def test_score_stays_in_range(near: float, overlap: float | None, weight: float) -> None:
    assert 0 <= score(near, overlap, weight=weight) <= 1
