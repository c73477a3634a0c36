"""The report in a real browser: nothing is fetched, all works by keyboard, nothing is wider than a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from report_browser import Page, find_browser

from clinkd.report.html import ReportInputs, build_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(find_browser() or "", tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(page: Page, report: Path) -> Page:
    page.requests.clear()
    page.errors.clear()
    page.open(report.as_uri())
    return page


def test_it_opens_without_any_request_or_error(opened: Page, report: Path):
    opened.js("document.querySelectorAll('details').forEach(item => item.open = true)")
    shown = opened.js(
        "Promise.all([...document.images].map(i => i.decode())).then(() => document.images.length)"
    )
    assert shown > 80
    assert {url for url in opened.requests if not url.startswith("data:")} == {report.as_uri()}
    assert opened.errors == []


@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_the_page_is_never_wider_than_its_screen(page: Page, report: Path, width: int):
    page.open(report.as_uri(), width, 800)
    page.js("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert page.js("document.documentElement.scrollWidth") <= width


def test_an_empty_report_opens_on_a_phone(page: Page, tmp_path: Path):
    page.errors.clear()
    page.open(build_report(ReportInputs("nothing"), tmp_path / "empty.html").as_uri(), 320, 700)
    assert page.js("document.documentElement.scrollWidth") <= 320
    assert page.errors == []


def test_dark_is_dark_and_its_charts_are_legible(page: Page, report: Path):
    shade = "c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (r + g + b) / 765 }"
    for dark in (False, True):
        page.open(report.as_uri(), dark=dark)
        paper = page.js(f"({shade})(getComputedStyle(document.body).backgroundColor)")
        texts = page.js(
            f"[...document.querySelectorAll('.chart text')].map(t => ({shade})(getComputedStyle(t).fill))"
        )
        assert (paper < 0.2) == dark
        assert all(abs(tone - paper) > 0.6 for tone in texts)


def test_filters_work_by_keyboard(opened: Page):
    opened.js("document.querySelector('button[data-value=roc]').focus()")
    opened.press("Enter")
    cards = "[...document.querySelectorAll('#images .card')].filter(card => !card.hidden)"
    visible = cards + ".map(card => card.dataset.task + card.dataset.good)"
    assert set(opened.js(visible)) == {"rocyes", "rocno"}
    opened.js("document.querySelector('button[data-filter=good][data-value=no]').focus()")
    opened.press(" ")
    assert set(opened.js(visible)) == {"rocno"}
    pressed = opened.js("[...document.querySelectorAll('button[aria-pressed=true]')].map(b => b.textContent)")
    assert pressed == ["ROC", "Wrong"]
    assert opened.js("document.getElementById('said').textContent").endswith("examples shown")


def test_the_first_tab_skips_to_the_content_and_all_controls_can_be_reached(opened: Page):
    opened.press("Tab")
    assert opened.js("document.activeElement.className") == "skip"
    opened.press("Enter")
    assert opened.js("document.activeElement.id") == "main"
    reached = set()
    for _ in range(100):
        opened.press("Tab")
        tag = opened.js("document.activeElement.tagName")
        if tag == "BODY":  # past the last control
            break
        reached.add(tag)
        assert opened.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert tag == "BODY"
    assert {"SUMMARY", "BUTTON"} <= reached


def test_copy_says_that_it_copied(opened: Page):
    opened.js("document.querySelector('button.copy').focus()")
    opened.press("Enter")
    opened.js("new Promise(done => setTimeout(done, 300))")
    said = opened.js("document.querySelector('button.copy').textContent")
    assert said in ("Copied", "Select and copy")


def test_a_script_from_outside_would_be_stopped_by_the_policy(opened: Page):
    opened.js(
        "const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s)"
    )
    assert opened.js("window.ran === undefined")
    assert any("Content Security Policy" in error for error in opened.errors)
