"""Names: what a file's name says about modality and patient."""

from __future__ import annotations

import pytest

from clinkd.data.records import (
    MODALITIES,
    MODALITY_NAMES,
    TASK_NAMES,
    TASKS,
    Record,
    case_of,
    modality_of,
    sample_id,
)


@pytest.mark.parametrize(
    ("name", "modality", "case"),
    [
        ("ct_00--AMOS2022--amos_0004--x_0123.png", "ct", "AMOS2022--amos_0004"),
        ("mr_t1gd--BraTS--case.1 b--z_0141.png", "mr", "BraTS--case.1 b"),
        ("x_ray--CXR--17--2d_none.png", "x", "CXR--17"),
        ("fundus_photography--D--c--2d_none.png", "fundus", "D--c"),
        ("photo.png", "photo.png", "photo"),
        ("CT_00--D--c--2d_none.png", "CT", "D--c"),
    ],
)
def test_a_name_gives_modality_and_case(name: str, modality: str, case: str) -> None:
    assert modality_of(name) == modality
    assert case_of(name) == case
    assert Record("id", name).modality == modality


def test_slices_and_sequences_of_one_patient_are_one_case() -> None:
    names = ["ct_00--D--p1--x_0001.png", "ct_00--D--p1--z_0141.png", "mr_t1--D--p1--y_0003.png"]
    assert {case_of(name) for name in names} == {"D--p1"}


def test_every_task_and_modality_has_a_name() -> None:
    assert set(TASK_NAMES) == set(TASKS)
    assert set(MODALITY_NAMES) == set(MODALITIES)


def test_a_sample_is_a_turn_of_a_record() -> None:
    assert sample_id("ct_00--D--p1--x_0001", 3) == "ct_00--D--p1--x_0001#3"
