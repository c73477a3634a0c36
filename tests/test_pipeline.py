"""The whole way of the data on a few phantoms: real Ray, real DeepSpeed, a real model at every stage."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_run import CONFIG, SMALL, clinkd, here, lines, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


def test_run_trains_distils_evaluates_reports_and_then_skips(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    result = json.loads((run / "eval.json").read_text())
    for task, key in (("vg", "recall_at_50"), ("roc", "recall")):
        assert 0 <= result[task]["mean"][key] <= 1 and len(result[task]["modalities"]) == 8
    assert 0 <= result["baselines"]["vg"] < 0.2 and 0 < result["baselines"]["roc"] < 0.3
    predictions = lines(run / "predictions.jsonl")
    assert [row["id"] for row in predictions] == list(range(len(predictions)))
    stages = {line["stage"] for line in lines(run / "metrics.jsonl")}
    assert {"prepare", "guide", "teacher", "label", "distill", "reflect", "evaluate"} <= stages
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("distill/loss")] == [1, 2, 3, 4]
    assert events.Scalars("evaluate/test/vg/recall_at_50")[0].value == pytest.approx(
        result["vg"]["mean"]["recall_at_50"]
    )
    page = (run / "report.html").read_text()
    trained = ("guide", "teacher", "distill", "reflect-1")
    curves = [page.index(f"<strong>{stage}</strong>") for stage in trained]
    assert curves == sorted(curves)  # as the stages were
    assert "The run's own parameters were not given." not in page
    assert "distill" in page and "Loss certificate: passed" in page

    again = clinkd(finished, "run", str(CONFIG), *SMALL)
    assert again.returncode == 0
    skipped = [line.split()[1] for line in again.stderr.splitlines() if line.startswith("skipped")]
    assert skipped == ["prepare", "guide", "teacher", "label", "distill", "reflect", "evaluate"]
    assert json.loads((run / "eval.json").read_text()) == result


def test_a_guided_model_answers_with_scores_made_on_the_fly_as_with_stored_ones(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    data = next(path for path in (finished / "runs" / "artifacts").glob("prepare-*") if path.is_dir())
    arguments = ["--data", str(data), "--out", str(finished / "fly.jsonl"), "--max-new-tokens", "12"]
    done = here(finished, "predict", "--checkpoint", str(run / "model"), *arguments)
    assert done.returncode == 0, done.stderr
    assert lines(finished / "fly.jsonl") == lines(run / "predictions.jsonl")

    bare = finished / "bare"
    shutil.copytree(run / "model", bare, ignore=shutil.ignore_patterns("guide"))
    failed = here(finished, "predict", "--checkpoint", str(bare), *arguments)
    assert failed.returncode == 2 and "--guide" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.full
def test_pair_and_patch_guidance_each_place_images_differently(finished: Path) -> None:
    """Positions of the test split's questions, by the run's scores, under each mode."""
    none, pair, patch = (positions(finished / "runs", mode) for mode in ("none", "pair", "patch"))
    for one, other in ((none, pair), (none, patch), (pair, patch)):
        differ = [not torch.equal(*both) for both in zip(one, other, strict=True)]
        assert sum(differ) > 0.8 * len(differ) > 10  # a guide of four steps scores some alike


def test_a_share_that_lies_in_one_that_was_asked_for_asks_nothing(finished: Path) -> None:
    """What a changed a or T asks for, a sweep shows: nothing."""
    before = set((finished / "runs" / "artifacts").glob("label-*"))
    fewer = here(finished, "label", str(CONFIG), *SMALL, "distill.share=0.25")
    assert fewer.returncode == 0, fewer.stderr
    made = set((finished / "runs" / "artifacts").glob("label-*")) - before
    listing = next(path for path in made if path.is_dir()) / "artifact.json"
    counts = json.loads(listing.read_text())["counts"]
    assert counts["new"] == counts["teacher_passes"] == 0 < counts["samples"]
    assert counts["truths"] + counts["pseudo_labels"] + counts["refused"] == counts["samples"]


def test_a_student_of_true_answers_alone_asks_no_teacher(finished: Path) -> None:
    artifacts = finished / "runs" / "artifacts"
    before = set(artifacts.glob("*-*"))
    plain = ["distill.a=0", "distill.unlabelled_share=0", "distill.start_quantile=0", "run.name=plain"]
    done = here(finished, "train", "distill", str(CONFIG), *SMALL, *plain)
    assert done.returncode == 0, done.stderr
    (made,) = (path for path in set(artifacts.glob("*-*")) - before if path.is_dir())
    assert made.name.startswith("distill-") and "label" not in done.stderr
    rows = lines(made / "metrics.jsonl")
    assert len(rows) == 4 and all(row["loss"] == pytest.approx(row["ce"]) and "kd" not in row for row in rows)


def positions(runs: Path, mode: str) -> list[torch.Tensor]:
    """[3, L] of the test questions, with the run's model and scores."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from clinkd.data.images import decode
    from clinkd.data.scores import FILE, Scores
    from clinkd.data.shards import iter_rows
    from clinkd.model.chat import encode
    from clinkd.model.clinkd_qwen2vl import guidance_of, load_model
    from clinkd.model.guide import guide_inputs, merged_grids

    folder = runs / "tiny" / "model"
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    data, guide = (
        next(path for path in (runs / "artifacts").glob(f"{stage}-*") if path.is_dir())
        for stage in ("prepare", "guide")
    )
    scores, kept = Scores(guide / FILE), guidance_of(model.config)
    assert kept.guided == "pair"
    model.config.rope_guidance = asdict(replace(kept, mode=mode))
    found = []
    for row in iter_rows(data, "test"):
        grid = processor(images=[decode(row["png"])], return_tensors="pt")["image_grid_thw"]
        for number, turn in enumerate(row["turns"]):
            prompt, _ = encode(tokenizer, turn["question"], "", int(grid.prod()) // 4)
            inputs = guide_inputs(mode, [scores[f"{row['id']}#{number}"]], [merged_grids(grid, 2)])
            placed, _ = model.model.get_rope_index(torch.tensor([prompt]), image_grid_thw=grid, **inputs)
            found.append(placed[:, 0])
    return found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.pth=x", "did you mean path?"),
        ("model.path=/nowhere/qwen", "model.path"),
        ("run.root=s3://lab/runs", "run.root: s3://lab/runs is no folder"),
        ("reflect.corrector=/nowhere/vlm", "reflect.corrector"),
        ("data.source=/nowhere/data", "/nowhere/data"),
        ("compute.workers=999", "compute.workers"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, override: str, said: str) -> None:
    failed = here(tmp_path, "run", str(CONFIG), override)
    assert failed.returncode == 2
    assert said in failed.stderr and "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_ended_and_killed_in_the_middle_of_distillation_it_goes_on(finished: Path) -> None:
    """SIGTERM saves the step under way; kill -9 of all that was started costs those since a checkpoint."""
    changes = ["run.name=killed", "distill.optim.steps=24", "compute.checkpoint_every=4"]
    arguments = ["train", "distill", str(CONFIG), *SMALL, *changes]
    artifacts = finished / "runs" / "artifacts"
    before = set(artifacts.glob("distill-*"))
    first = start(finished, *arguments)
    wait_for_step(artifacts, 6, first)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(timeout=120) == 0
    (partial,) = artifacts.glob("distill-*.partial")
    taken = len(lines(partial / "metrics.jsonl"))
    saved = max(path.name for path in partial.glob("work/distill/step-*"))
    assert 6 <= taken < 24 and saved == f"step-{taken:08d}"

    second = start(finished, *arguments, "compute.workers=1")
    wait_for_step(artifacts, taken + 3, second)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()

    done = clinkd(finished, *arguments)
    assert done.returncode == 0, done.stderr
    made = set(artifacts.glob("distill-*")) - before
    metrics = lines(next(path for path in made if path.is_dir()) / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 25))  # none twice, none missing
    assert "skipped teacher" in done.stderr and "skipped distill" not in done.stderr


def wait_for_step(artifacts: Path, step: int, process: subprocess.Popen) -> int:
    """Waits until distillation has written this step's metrics; returns the step it is at."""
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and process.poll() is None:
        for path in artifacts.glob("distill-*.partial/metrics.jsonl"):
            lines = path.read_text().splitlines()
            if len(lines) >= step:
                return len(lines)
        time.sleep(0.2)
    raise AssertionError(f"distillation did not reach step {step} (exit code {process.poll()})")
