"""Progress: few plain lines, a metrics.jsonl with every number, and a thread that follows a worker."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest

from clinkd.progress import Progress, duration, tail_metrics


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_plain_lines_come_at_intervals_and_every_step_is_in_the_metrics(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(tmp_path / "metrics.jsonl", stream=out, clock=clock, interval=5) as progress:
        progress.start("teacher", 100)
        for step in range(1, 21):
            clock.now += 1
            progress.update(step, loss=1 / step, samples_per_s=8.0)
        progress.finish()
    assert out.getvalue().splitlines() == [
        "teacher: started, 100 steps",
        "teacher: step 5/100, loss 0.2, 8.0 samples/s, 1 min 35 s left",
        "teacher: step 10/100, loss 0.1, 8.0 samples/s, 1 min 30 s left",
        "teacher: step 15/100, loss 0.06667, 8.0 samples/s, 1 min 25 s left",
        "teacher: step 20/100, loss 0.05, 8.0 samples/s, 1 min 20 s left",
        "teacher: done 20 steps (loss 0.05, 8.0 samples/s, 20 s)",
    ]
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written[:-1]] == list(range(1, 21))
    assert written[0] == {"stage": "teacher", "step": 1, "loss": 1.0, "samples_per_s": 8.0}
    assert written[-1]["event"] == "done" and written[-1]["seconds"] == 20


@pytest.mark.parametrize(
    ("rate", "shown"), [(812.4, "812.4"), (1234, "1.2k"), (999_940, "999.9k"), (2_500_000, "2.5M")]
)
def test_tokens_a_second_stand_beside_samples_a_second(rate: float, shown: str) -> None:
    out = io.StringIO()
    progress = Progress(stream=out, interval=0)
    progress.start("teacher", 4)
    progress.update(1, loss=0.5, samples_per_s=8.0, tokens_per_s=rate, seconds=0.3, memory_gib=1.5)
    assert out.getvalue().splitlines()[-1] == f"teacher: step 1/4, loss 0.5, 8.0 samples/s, {shown} tokens/s"


def test_time_left_is_reckoned_from_the_first_step_seen_not_from_the_start_of_workers() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(stream=out, clock=clock)
    progress.start("distill", 100, first=90)
    clock.now = 60
    progress.update(91)
    assert out.getvalue().splitlines()[-1] == "distill: step 91/100"
    clock.now = 68
    progress.update(95)
    assert out.getvalue().splitlines()[-1] == "distill: step 95/100, 10 s left"


def test_a_skipped_stage_says_what_it_saved(tmp_path: Path) -> None:
    out = io.StringIO()
    Progress(tmp_path / "m.jsonl", stream=out).skipped("teacher", 34.2)
    assert out.getvalue() == "skipped teacher (whole, 34 s saved)\n"
    assert lines(tmp_path / "m.jsonl") == [{"stage": "teacher", "event": "skipped", "seconds_saved": 34.2}]


def test_the_live_bar_shows_stage_step_and_numbers() -> None:
    out = io.StringIO()
    with Progress(stream=out, live=True) as progress:
        progress.start("label", 4)
        progress.update(2, loss=0.5, samples_per_s=3.0)
        progress.say("between [brackets]")
        progress._bar.refresh()
        progress.finish()
    text = out.getvalue()
    for shown in ("label", "2/4", "between [brackets]", "label: done"):
        assert shown in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (125, "2 min 05 s"), (4320, "1 h 12 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_workers_lines_are_shown_and_kept_but_not_those_of_a_former_attempt(tmp_path: Path) -> None:
    worker, out = tmp_path / "worker.jsonl", io.StringIO()
    worker.write_text('{"stage": "distill", "step": 1, "loss": 9.0}\n')
    progress, stop = Progress(tmp_path / "metrics.jsonl", stream=out, interval=0), threading.Event()
    thread = tail_metrics(worker, progress, stop, poll=0.02)
    with worker.open("a") as file:
        file.write('{"stage": "distill", "step": 2, "loss": 0.5}\nnot json\n{"stage": "distill", "st')
        file.flush()
        wait_for(lambda: "step 2" in out.getvalue())
        file.write('ep": 3, "loss": 0.25}\n')
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [2, 3]
    assert "loss 9" not in out.getvalue() and "step 3" in out.getvalue()


def test_lines_written_to_the_views_own_file_are_not_written_twice(tmp_path: Path) -> None:
    metrics, out = tmp_path / "metrics.jsonl", io.StringIO()
    progress, stop = Progress(metrics, stream=out, interval=0), threading.Event()
    thread = tail_metrics(metrics, progress, stop, poll=0.02)
    metrics.write_text(
        '{"stage": "distill", "step": 1, "loss": 0.5}\n{"stage": "reflect", "event": "judged"}\n'
    )
    wait_for(lambda: "step 1" in out.getvalue())
    stop.set()
    thread.join(5)
    assert len(lines(metrics)) == 2


def test_a_file_that_shrinks_is_followed_on(tmp_path: Path) -> None:
    worker, out = tmp_path / "worker.jsonl", io.StringIO()
    progress, stop = Progress(tmp_path / "metrics.jsonl", stream=out, interval=0), threading.Event()
    thread = tail_metrics(worker, progress, stop, poll=0.02)
    first = '{"stage": "distill", "step": 1, "loss": 0.5}\n'
    worker.write_text(first + '{"stage": "distill", "step": 2, "loss": 0.4}\n')
    wait_for(lambda: "step 2" in out.getvalue())
    worker.write_text(first)
    time.sleep(0.2)
    with worker.open("a") as file:
        file.write('{"stage": "distill", "step": 2, "loss": 0.3}\n')
    wait_for(lambda: "loss 0.3" in out.getvalue())
    stop.set()
    thread.join(5)
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [0.5, 0.4, 0.3]
