"""Selection: which candidate becomes the target, and what every other was refused for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.reflect.select import VETOES, Selection, select, select_batch
from clinkd.reflect.similarity import RougeSimilarity

LIVER = "The liver is located at the <box>(100,100),(300,300)</box>."
GOOD = "The liver is located at the <box>(100,100),(300,300)</box>, below the diaphragm."
REGION = "This region contains the liver, a large structure in the upper left of the image."
RICHER = "This region contains the liver, a large dark structure in the upper left of the image."


def sample(task: str, answer: str) -> dict:
    return {"task": task, "question": "?", "answer": answer}


# (task, truth, wrong answer, candidate, the veto or None)
CASES = [
    ("vg", LIVER, "none", GOOD, None),
    ("vg", LIVER, "none", "The liver lies below the diaphragm.", "no_box"),
    ("vg", LIVER, "none", GOOD.replace("300,300", "300,180"), "low_iou"),
    ("vg", LIVER, "none", GOOD.replace("</box>", ""), "format"),
    ("vg", LIVER, "none", LIVER, "parrot"),
    ("vg", LIVER, "none", "the LIVER is shown in the region <box>(100,100),(300,301)</box>", "parrot"),
    ("vg", LIVER, "none", "Spleen at <box>(100,100),(300,300)</box>", "wrong_object"),
    ("vg", LIVER, "none", "Look: <box>(100,100),(300,300)</box>", "floor"),
    ("vg", LIVER, "none", GOOD + " <box>(500,500),(600,600)</box> <box>(0,0),(50,50)</box>", "floor"),
    ("roc", "Left kidney", "Liver", "Right kidney with a cyst", "laterality"),
    ("roc", "Left kidney", "Liver", "This is the left kidney.", "parrot"),
    ("roc", "Left kidney", "Liver", "left kidney, healthy", None),
    ("roc", "Oedema", "Liver", "An edema.", "parrot"),
    ("rc", REGION, "?", RICHER, None),
    ("rc", REGION, "?", REGION.upper(), "parrot"),
    ("rc", REGION, "?", "The correct answer is that " + REGION, "format"),
    ("rc", REGION, "?", RICHER + " The student overlooked it.", "format"),
    ("rc", REGION, "?", RICHER.replace("left", "right"), "laterality"),
    ("rc", REGION, RICHER, RICHER.replace("This", "The"), "unchanged"),
    ("rc", REGION, "?", "A liver.", "floor"),
    ("rc", REGION, "?", "", "empty"),
    ("rc", REGION, "?", "liver " * 5, "repetition"),
    ("rc", "No pneumothorax is seen in the lung.", "?", "A pneumothorax is seen in the lung.", "negation"),
    ("rc", "Two nodules are seen in the lung.", "?", "Three small nodules are seen in the lung.", "number"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "truth", "wrong", "candidate", "veto"), CASES)
def test_veto(task: str, truth: str, wrong: str, candidate: str, veto: str | None) -> None:
    selection = select(sample(task, truth), wrong, [candidate], RougeSimilarity())
    assert selection.candidates[0].veto == veto
    assert selection.source == ("candidate" if veto is None else "truth")
    assert selection.chosen == (candidate.strip() if veto is None else truth)


@pytest.mark.parametrize(
    ("box", "veto"),
    [
        ("<box>(580,625),(1000,850)</box>", None),  # that which was asked about, or nearly
        ("<box>(839,54),(1000,277)</box>", "low_iou"),
        ("<box>(580,625),(1000,850)</box> and <box>(839,54),(1000,277)</box>", "low_iou"),
    ],
)
def test_a_name_that_points_elsewhere_than_the_question_is_no_target(box: str, veto: str | None) -> None:
    asked = sample("roc", "Left lung") | {"question": "What is at <box>(580,625),(1000,857)</box>?"}
    (candidate,) = select(asked, "Hemorrhage", [f"{box} shows the left lung."], RougeSimilarity()).candidates
    assert candidate.veto == veto
    (unasked,) = select(sample("mia", "The left lung."), "?", [f"{box} shows the left lung."],
                        RougeSimilarity()).candidates  # fmt: skip
    assert unasked.veto == "low_iou"


def test_every_veto_but_duplicate_is_in_the_table() -> None:
    assert {veto for *_, veto in CASES} == {None, *VETOES} - {"duplicate"}


def test_the_best_score_wins_and_all_are_kept_in_order() -> None:
    further = GOOD.replace("100,100", "120,120")
    selection = select(sample("vg", LIVER), "none", [further, "nonsense", GOOD], RougeSimilarity())
    assert selection.chosen == GOOD
    assert [candidate.text for candidate in selection.candidates] == [further, "nonsense", GOOD]
    best = selection.candidates[2]
    assert best.score == pytest.approx(0.5 * best.similarity + 0.5 * 1.0, abs=1e-6)


def test_the_weight_moves_between_words_and_boxes() -> None:
    words = "The liver is located at the <box>(100,100),(300,260)</box>, right there."
    boxes = "Here, below the diaphragm, one sees a liver: <box>(100,100),(300,300)</box>"
    chosen = [
        select(
            sample("vg", LIVER), "none", [words, boxes], RougeSimilarity(), weight=weight, floor=0.0
        ).chosen
        for weight in (1.0, 0.0)
    ]
    assert chosen == [words, boxes]


def test_without_boxes_in_the_truth_the_score_is_the_similarity() -> None:
    candidate = select(sample("rc", REGION), "?", [RICHER], RougeSimilarity(), weight=0.1).candidates[0]
    assert candidate.iou is None
    assert candidate.score == candidate.similarity


def test_near_duplicates_leave_the_better_one() -> None:
    worse = "This region here contains the liver, a large dark structure in the upper left of the image."
    selection = select(sample("rc", REGION), "?", [worse, RICHER, RICHER], RougeSimilarity())
    assert [candidate.veto for candidate in selection.candidates] == ["duplicate", None, "duplicate"]
    assert selection.chosen == RICHER


def test_the_same_words_around_another_box_are_no_duplicate() -> None:
    moved = GOOD.replace("100,100", "130,130")
    assert [c.veto for c in select(sample("vg", LIVER), "", [GOOD, moved], RougeSimilarity()).candidates] == [
        None,
        None,
    ]


def test_ties_go_to_the_first_text_in_order() -> None:
    a, b = (REGION.replace("large", f"large {word}") for word in ("dark", "grey"))
    assert select(sample("rc", REGION), "?", [b, a], RougeSimilarity()).chosen == a
    assert select(sample("rc", REGION), "?", [a, b], RougeSimilarity()).chosen == a


def test_no_candidates_leave_the_truth() -> None:
    assert select(sample("rc", REGION), "?", [], RougeSimilarity()) == Selection(REGION, "truth", ())


def test_a_batch_gives_what_single_calls_give() -> None:
    groups = [[candidate, RICHER, GOOD] for *_, candidate, _ in CASES]
    samples, wrongs = [sample(task, truth) for task, truth, *_ in CASES], [wrong for _, _, wrong, *_ in CASES]
    single = [select(*row, RougeSimilarity()) for row in zip(samples, wrongs, groups, strict=True)]
    assert select_batch(samples, wrongs, groups, RougeSimilarity()) == single


def test_wrong_calls_are_named() -> None:
    with pytest.raises(ValueError, match="1 samples, 0 wrong answers, 1 candidate lists"):
        select_batch([sample("rc", REGION)], [], [[]], RougeSimilarity())
    with pytest.raises(ValueError, match=r"weight 1\.5"):
        select(sample("rc", REGION), "", [], RougeSimilarity(), weight=1.5)


@settings(deadline=None)  # a loaded machine is no failure
@given(
    st.sampled_from([("vg", LIVER), ("rc", REGION), ("roc", "Left kidney")]),
    st.lists(st.sampled_from([candidate for *_, candidate, _ in CASES]) | st.text(max_size=30), max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_choice_does_not_depend_on_the_order(
    truth: tuple[str, str], texts: list[str], rng: random.Random
) -> None:
    shuffled = list(texts)
    rng.shuffle(shuffled)
    first, second = (
        select(sample(*truth), "liver?", group, RougeSimilarity()) for group in (texts, shuffled)
    )
    assert (first.chosen, first.source) == (second.chosen, second.source)
    assert sorted(first.candidates, key=repr) == sorted(second.candidates, key=repr)
    for candidate in first.candidates:
        assert 0 <= candidate.score <= 1
        assert candidate.veto is None or candidate.veto in VETOES
        assert candidate.veto is not None or candidate.score >= 0.6
