"""The exact checks, one table each: what contradicts, and what only differs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.phantoms import NAMES as PHANTOM_NAMES
from clinkd.reflect.checks import (
    laterality_conflict,
    named_overlap,
    negation_conflict,
    number_conflict,
    sides_of,
)
from clinkd.reflect.words import american, comparable, content_words, names_in

LATERALITY = [
    ("Left kidney", "Right kidney", True),
    ("Left kidney", "The left kidney.", False),
    ("The hip left is located at the", "The right hip is located at the", True),
    ("The kidney on the left is shown", "The left kidney is shown", False),
    ("The kidney on the left side", "The right-sided kidney", True),
    ("left-sided pleural effusion", "pleural effusion on the right", True),
    ("left pleural effusion", "pleural effusion", False),  # silence contradicts nothing
    ("left kidney", "right lung", False),  # another object, not another side
    ("bilateral pleural effusions", "left pleural effusion", True),
    ("left pleural effusion", "bilateral pleural effusions", True),
    ("bilateral pleural effusions", "effusions in the left and right pleural space", False),
    ("both lungs are clear", "the left lung and the right lung are clear", False),
    ("left and right kidneys", "the right and left kidneys", False),
    ("The left lung shows an opacity; the right lung is clear.",
     "The right lung shows an opacity; the left lung is clear.", True),
    ("The left lung shows an opacity; the right lung is clear.",
     "The right lung is clear. The left lung shows an opacity.", False),
    ("The left lung shows an opacity; the right lung is clear.", "The left lung shows an opacity.", False),
    ("This region contains the tumor, a small structure in the upper left of the image.",
     "This region contains the tumor, a small structure in the upper right of the image.", True),
    ("This region contains the left kidney, a large structure in the lower right of the image.",
     "The left kidney, a large structure in the lower right of the image.", False),
    ("It displays, from left to right, liver and spleen.", "It displays the liver, the spleen.", False),
    ("from left to right, the left kidney and a cyst", "from left to right, right kidney and a cyst", True),
    ("the left half of the liver", "the right half of the liver", True),
    ("left upper lobe", "right lower lobe", True),
    ("left", "right", True),
    ("", "left kidney", False),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "answer", "expected"), LATERALITY)
def test_laterality(truth: str, answer: str, expected: bool) -> None:
    assert laterality_conflict(truth, answer) is expected
    assert laterality_conflict(answer, truth) is expected


NEGATION = [
    ("No pneumothorax.", "Pneumothorax.", True),
    ("There is no pneumothorax.", "A pneumothorax is seen.", True),
    ("No evidence of acute fracture.", "There is an acute fracture.", True),
    ("no signs of a fracture", "No fracture is identified.", False),
    ("The liver is without focal lesions.", "The liver has focal lesions.", True),
    ("A pleural effusion is absent.", "There is a pleural effusion.", True),
    ("A pleural effusion is absent.", "No pleural effusion.", False),
    ("The spleen is not seen.", "The spleen is seen.", True),
    ("The kidney is not enlarged.", "The kidney is enlarged.", True),
    ("This isn't a tumor.", "This is a tumor.", True),
    ("Pneumothorax has been ruled out.", "There is a pneumothorax.", True),
    ("The lungs are free of consolidation.", "There is no consolidation in the lungs.", False),
    ("The lungs are free of consolidation.", "There is consolidation in the lungs.", True),
    ("no effusion, consolidation, or pneumothorax is seen", "There is a pneumothorax.", True),
    ("No effusion or pneumothorax.", "No pneumothorax or effusion.", False),
    ("No effusion, and the heart is enlarged.", "The heart is enlarged without effusion.", False),
    ("No pleural effusion.", "Pleural thickening without effusion.", False),
    ("Pneumothorax on the right, none on the left.", "A pneumothorax on the right.", False),
    ("The heart is normal.", "The heart is abnormal.", True),
    ("The heart is normal.", "The lung is abnormal.", False),
    ("The heart is not normal.", "The heart is abnormal.", False),
    ("a benign lesion", "a malignant lesion", True),
    ("a non-enhancing lesion", "an enhancing lesion", True),
    ("Yes.", "No.", True),
    ("No stone was found yesterday.", "No cyst was found; scanned yesterday.", False),
    ("No oedema.", "Edema.", True),
    ("A hepatic cyst.", "No cyst in the liver.", True),
    ("The liver.", "The spleen.", False),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "answer", "expected"), NEGATION)
def test_negation(truth: str, answer: str, expected: bool) -> None:
    assert negation_conflict(truth, answer) is expected
    assert negation_conflict(answer, truth) is expected


NUMBERS = [
    ("two nodules", "three nodules", True),
    ("two nodules", "2 nodules", False),
    ("a single nodule", "two nodules", True),
    ("L3 vertebra", "L4 vertebra", True),
    ("T1-weighted MR", "T2-weighted MR", True),
    ("a 3 cm mass", "a 30 mm mass", False),
    ("a 3 cm mass", "a 3 mm mass", True),
    ("a mass of 3 x 4 cm", "a mass of 30 by 40 millimetres", False),
    ("a mass of 3 x 4 cm", "a mass of 3 x 5 cm", True),
    ("two cysts and three stones", "three cysts and two stones", True),
    ("two cysts and three stones", "three stones and two cysts", False),
    ("two cysts", "three stones", False),  # other things are counted
    ("two cysts", "cysts", False),
    ("grade 2 tumor", "grade 3 tumor", True),
    ("one of the kidneys", "two kidneys", False),
    ("at <box>(1,2),(3,4)</box>", "at <box>(5,6),(7,8)</box>", False),  # corners are not numbers of the text
]


@pytest.mark.parametrize(("truth", "answer", "expected"), NUMBERS)
def test_numbers(truth: str, answer: str, expected: bool) -> None:
    assert number_conflict(truth, answer) is expected
    assert number_conflict(answer, truth) is expected


@pytest.mark.parametrize(
    ("british", "common"),
    [
        ("Oedema", "edema"), ("Haemorrhage", "hemorrhage"), ("tumours", "tumors"),
        ("oesophagus", "esophagus"),
        ("caecum", "cecum"), ("anaemia", "anemia"), ("ischaemic", "ischemic"), ("centre", "center"),
        ("localised", "localized"), ("visualisation", "visualization"), ("fibre", "fiber"), ("grey", "gray"),
        ("naevus", "nevus"), ("dyspnoea", "dyspnea"), ("X-ray", "xray"), ("5 millimetres", "5 millimeters"),
        ("analysed", "analyzed"), ("coeliac", "celiac"), ("foetal", "fetal"), ("haemangioma", "hemangioma"),
        ("raised noise in the disease, otherwise precise", "raised noise in the disease, otherwise precise"),
        ("aorta, pelvis, diagnosis", "aorta, pelvis, diagnosis"),
    ],
)  # fmt: skip
def test_spelling(british: str, common: str) -> None:
    assert american(british) == common
    assert american(common) == common


def test_names_meet_across_plurals_adjectives_and_spelling() -> None:
    assert names_in("renal cysts and a haemorrhage") == {"kidney", "cyst", "hemorrhage"}
    assert content_words("The Vertebrae, and the lungs.") == ["vertebra", "lung"]


def test_every_phantom_object_is_a_name() -> None:
    assert [name for name in PHANTOM_NAMES if not names_in(name)] == []


def test_named_overlap_says_nothing_about_unknown_words() -> None:
    assert named_overlap("a structure", "the liver") is None
    assert named_overlap("liver", "spleen") == (0.0, 0.0)
    assert named_overlap("liver", "the liver and the spleen") == (1.0, pytest.approx(2 / 3))


def test_sides() -> None:
    assert sides_of("bilateral hips") == {"left", "right"}
    assert sides_of("from left to right") == frozenset()


def test_comparable_drops_boxes_and_control_tokens() -> None:
    text = "The <ref>Tumour</ref> is at <|box_start|>(1,2),(3,4)<|box_end|>.<|im_end|>"
    assert comparable(text) == "the tumor is at ."


VOCABULARY = "no not left right both kidney lung cyst is are absent , . and or of the 3 two mm bilateral"
WORDS = st.lists(st.sampled_from(VOCABULARY.split()), max_size=12).map(" ".join)


@settings(deadline=None)  # a loaded machine is no failure
@given(WORDS | st.text(max_size=40))
def test_no_text_contradicts_itself(text: str) -> None:
    for check in (laterality_conflict, negation_conflict, number_conflict):
        assert check(text, text) is False


@settings(deadline=None)  # a loaded machine is no failure
@given(WORDS, WORDS)
def test_checks_are_symmetric(a: str, b: str) -> None:
    for check in (laterality_conflict, negation_conflict, number_conflict):
        assert check(a, b) is check(b, a)
