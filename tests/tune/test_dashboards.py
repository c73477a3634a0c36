"""What a sweep leaves is read by the tools people have: optuna-dashboard in Chromium, TensorBoard."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_browser import Page, find_browser
from test_study import config, drive

from clinkd.report.sweep import build_sweep
from clinkd.tune.board import Board
from clinkd.tune.study import open_study, sqlite_url, sweep_folder
from clinkd.tune.summary import importances, rows_of


@pytest.fixture
def swept(tmp_path: Path) -> Any:
    """A study by ASHA, cut off in the middle of a trial: it runs, for who looks on."""
    made = config(tmp_path, scheduler="asha", grace=100)
    drive(made, stop_after=14)
    return made


@pytest.fixture
def dashboard(swept: Any) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-c", "from optuna_dashboard._cli import main; main()",
        sqlite_url(sweep_folder(swept)), "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise AssertionError("optuna-dashboard ended")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_optuna_dashboard_shows_the_study_while_it_runs(dashboard: str, swept: Any, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{dashboard}/api/studies") as answer:
        (study,) = json.load(answer)["study_summaries"]
    assert study["study_name"] == "s"
    with urllib.request.urlopen(f"{dashboard}/api/studies/{study['study_id']}") as answer:
        trials = json.load(answer)["trials"]
    states = {trial["state"] for trial in trials}
    assert "Running" in states and "Complete" in states
    if find_browser() is None:
        return
    with Page(find_browser() or "", tmp_path / "profile") as page:
        page.open(f"{dashboard}/dashboard/studies/{study['study_id']}/trials")
        for _ in range(60):
            if "Complete" in str(page.js("document.body.innerText")):
                break
            time.sleep(0.5)
        assert "Running" in page.js("document.body.innerText")


def test_tensorboards_hparams_plugin_has_values_and_scores(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    board = Board(tmp_path)
    for number in range(2):
        for step in (100, 300):
            board.rung(number, {"score": number + step / 1000}, step)
        board.ended(
            number, {"rope.gamma": 0.5, "rope.mode": "pair", "reflect.pixels": [1, 2]}, {"score": 1.0}
        )
    board.rung(2, {"score": 0.1}, 100)
    board.close()
    found = EventAccumulator(str(tmp_path / "trial-0001"))
    found.Reload()
    assert [(event.step, round(event.value, 3)) for event in found.Scalars("score")] == [
        (100, 1.1),
        (300, 1.3),
    ]
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = metadata.parse_session_start_info_plugin_data(content)
    assert info.hparams["rope.gamma"].number_value == 0.5
    assert info.hparams["rope.mode"].string_value == "pair"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial-0000", "trial-0001", "trial-0002"]


def test_the_page_is_whole_and_asks_the_network_for_nothing(swept: Any, tmp_path: Path) -> None:
    study = open_study(swept)
    facts = {
        "shared": {"prepare": 3.0, "teacher": 600.0}, "shared_seconds": 603.0, "saved_seconds": 4221.0,
        "teacher_passes": 1, "trials_that_share": 8, "training_steps": 5400, "steps_not_taken": 1200,
    }  # fmt: skip
    rows = rows_of(study, swept)
    out = build_sweep("s", rows, swept.sweep.metrics, facts, importances(study, swept), tmp_path / "s.html")
    assert out.stat().st_size < 2_000_000
    if find_browser() is None:
        pytest.skip("no Chromium")
    with Page(find_browser() or "", tmp_path / "profile") as page:
        for width, dark in ((1200, False), (390, True)):
            page.open(out.as_uri(), width, dark=dark)
            assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js("document.querySelectorAll('svg.chart').length") >= 3
        page.js("document.querySelector('button.copy').click()")
        assert not page.errors and {url.split(":")[0] for url in page.requests} <= {"file", "data"}


def test_names_from_outside_stay_text(swept: Any, tmp_path: Path) -> None:
    rows = rows_of(open_study(swept), swept)
    for row in rows:
        row["values"] = {"<script>alert(1)</script>": "<img src=x>"} | row["values"]
        row["error"] = "<b>x</b>"
    facts = {"shared": {}, "shared_seconds": 0.0, "saved_seconds": 0.0, "teacher_passes": 1,
             "trials_that_share": 1, "training_steps": 1, "steps_not_taken": 0}  # fmt: skip
    out = build_sweep("<i>s</i>", rows, ["score"], facts, {}, tmp_path / "s.html")
    text = out.read_text()
    assert "<script>alert" not in text and "<img src=x" not in text and "<i>s</i>" not in text
