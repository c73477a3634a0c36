"""Which answers of a teacher become labels."""

from __future__ import annotations

import pytest

from clinkd.distill.pseudo import REASONS, Candidate, choose, fault, is_hidden

BOX = "<box>(1,2),(30,40)</box>"


@pytest.mark.parametrize(
    "task, text, ended, reason",
    [
        ("vg", f"Here: {BOX}.", True, None),
        ("vg", f"Here: {BOX}.", False, "too_long"),
        ("vg", "Here.", True, "no_box"),
        ("vg", "<box>(1,2),(30</box>", True, "no_box"),
        ("vg", "<box>(30,2),(1,40)</box>", True, "no_box"),
        ("roc", "liver", True, None),
        ("rc", "", True, "empty"),
        ("mia", " \n", True, "empty"),
        ("vg", "", False, "too_long"),
    ],
)
def test_reasons(task, text, ended, reason):
    assert fault(task, Candidate(text, ended, 0.0)) == reason
    assert reason is None or reason in REASONS


def test_the_surest_that_passes_is_chosen_and_the_greedy_one_at_a_draw():
    sure, box, other = Candidate("Here.", True, -0.1), Candidate(BOX, True, -0.5), Candidate(BOX, True, -0.2)
    assert choose("vg", [sure, box, other]) == (2, None)
    assert choose("roc", [sure, box, other]) == (0, None)
    assert choose("vg", [box, box, box]) == (0, None)


def test_where_none_passes_the_surest_says_why():
    answers = [Candidate("", True, -3.0), Candidate("on and on", False, -1.0)]
    assert choose("rc", answers) == (1, "too_long")
    with pytest.raises(ValueError, match="no candidate"):
        choose("rc", [])


def test_what_is_hidden_follows_from_the_name_and_grows_with_the_share():
    names = [f"record-{number}#0" for number in range(2000)]
    few, many = ({name for name in names if is_hidden(name, share, 7)} for share in (0.2, 0.5))
    assert few < many and 0.17 < len(few) / 2000 < 0.23
    assert not any(is_hidden(name, 0.0, 7) for name in names) and all(is_hidden(name, 1, 7) for name in names)
    assert few != {name for name in names if is_hidden(name, 0.2, 8)}
