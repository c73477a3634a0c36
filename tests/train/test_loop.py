"""The training loop on real Ray Train and DeepSpeed: a worker that dies, the number of workers."""

import pytest
from line_task import train_line as train

from clinkd.train.resume import keep_lines


@pytest.mark.slow
def test_a_worker_that_dies_changes_nothing(ray_session, tmp_path):
    calm = train(tmp_path / "calm", zero=1)
    assert [line["step"] for line in calm] == list(range(1, 13)) and calm[-1]["loss"] < 0.5 * calm[0]["loss"]
    assert all(line["samples_per_s"] > 0 for line in calm)
    assert all(line["seconds"] > 0 and line["memory_gib"] > 0 and line["grad_norm"] > 0 for line in calm)
    assert all("tokens_per_s" not in line for line in calm)  # what it learns from has no tokens
    torn = train(tmp_path / "torn", zero=1, fail_once=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert [line["loss"] for line in torn] == [line["loss"] for line in calm]


@pytest.mark.slow
def test_one_worker_sees_what_two_see(ray_session, tmp_path):
    two = train(tmp_path / "two", zero=0, workers=2, batch=2)
    one = train(tmp_path / "one", zero=0, workers=1, batch=4)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
