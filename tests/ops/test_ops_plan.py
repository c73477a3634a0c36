"""The plan as a user sees it, and as machines do."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clinkd import cli
from clinkd.config import load_config
from clinkd.ops.calibrate import Measured, read, small
from clinkd.ops.plan import Options, plan
from clinkd.ops.show import show
from clinkd.ops.workload import pieces, workload_of

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, LARGE = CONFIGS / "tiny.yaml", CONFIGS / "qwen2_vl_7b.yaml"


@cache
def planned(path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return plan(load_config(path, list(overrides)), Options(**options))


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in found["stages"] if row["name"] == name)


def test_a_7b_on_eight_gpus_of_80_gb() -> None:
    found = planned(LARGE)
    assert found["models"][1]["parameters"] == 8_291_375_616
    row = stage(found, "distill")
    trained = found["models"][1]["trained"]
    assert row["memory"]["optimizer"] == pytest.approx(12 * trained / 8)
    assert row["total"] < 80e9 and stage(planned(LARGE, "compute.zero_stage=0"), "distill")["total"] > 120e9
    assert found["zero"][0]["best"] == (3, 2) and found["zero"][0]["best_here"] == (2, 8)
    assert any("ZeRO-2 fits distill" in line for line in found["warnings"])


def test_what_does_not_fit_is_said_with_what_does() -> None:
    (line,) = [one for one in planned(LARGE, "compute.workers=1")["warnings"] if one.startswith("distill")]
    assert "of each GPU" in line and "ZeRO-3 on 2 GPUs fits" in line


def test_hours_and_price_follow_from_the_work() -> None:
    one, two = planned(LARGE, price=2.0), planned(LARGE, questions=480_000, records=120_000, price=4.0)
    row, double = stage(one, "distill"), stage(two, "distill")
    work = row["flops_a_step"] * row["steps"]
    assert row["hours"] == [pytest.approx(work / (8 * 989e12 * mfu) / 3600) for mfu in (0.35, 0.15)]
    assert row["price"] == [pytest.approx(2.0 * 8 * hours) for hours in row["hours"]]
    assert double["hours"][0] == pytest.approx(2 * row["hours"][0], rel=0.01)
    assert double["price"][0] == pytest.approx(4 * row["price"][0], rel=0.01)


def test_operations_are_six_for_each_weight_and_token_and_two_of_the_frozen_tower() -> None:
    """An image of 512 x 512 is 36 x 36 patches, 18 x 18 tokens; attention and heads come to little here."""
    found = planned(LARGE)
    row, data = stage(found, "distill"), found["data"]
    tokens = 18 * 18 + data["text"] + data["answer"]
    rough = 128 * (6 * 6.525e9 * tokens + 2 * 0.63e9 * 36 * 36)
    assert rough < row["flops_a_step"] < 1.07 * rough


def test_adapters_and_a_frozen_tower_take_less() -> None:
    small = CONFIGS / "qwen2_vl_2b.yaml"
    full, adapted = (stage(planned(small, *more), "distill") for more in ((), ("model.lora.rank=16",)))
    assert adapted["memory"]["optimizer"] < 0.05 * full["memory"]["optimizer"]
    assert adapted["memory"]["logits"] < full["memory"]["logits"]  # the head has no gradient
    tower = stage(planned(small, "model.train_vision=true"), "distill")
    assert tower["memory"]["activations"] > full["memory"]["activations"]


def test_checkpointing_and_a_teacher_beside() -> None:
    kept = stage(planned(LARGE, "compute.gradient_checkpointing=false"), "distill")["memory"]["activations"]
    assert kept > 5 * stage(planned(LARGE), "distill")["memory"]["activations"]
    beside = stage(planned(LARGE, "distill.teacher=online"), "distill")["memory"]["teacher"]
    assert beside - stage(planned(LARGE), "distill")["memory"]["teacher"] == 2 * 8_291_375_616 / 8


def test_without_gpus_memory_is_a_workers_and_nothing_is_priced() -> None:
    found = planned(TINY)
    row = stage(found, "teacher")
    assert found["price"] is None and found["zero"] == [] and row["memory"]["images"] > 0
    assert row["total"] < 1e9
    # The images of longer training fill the worker's cache, up to all of them.
    long = stage(planned(TINY, "sft.steps=25000"), "teacher")["memory"]["images"]
    assert row["memory"]["images"] < long < 3 * row["memory"]["images"]


def test_measurements_take_the_place_of_guesses() -> None:
    config = load_config(TINY)
    measured = {"teacher": Measured(2.0, 2.1, 6, 9e8, 3e8, 8)}
    found = plan(config, Options(), measured)
    row = stage(found, "teacher")
    assert row["hours"] == [pytest.approx(2.0 * config.sft.steps / 3600)] * 2
    assert row["measured"]["grown_at_end"] > 3e8  # what it holds of images is still to come
    assert row["measured"]["grown_at_end"] < 3e8 + row["memory"]["images"]
    assert "measured: 2 s a step" in show(found)
    assert stage(found, "distill")["measured"] is None


def test_metrics_are_read_by_stage_without_the_first_steps() -> None:
    lines = [
        {"stage": "teacher", "step": step, "seconds": 9.0 if step < 3 else float(step),
         "memory_gib": 1.0 + step, "libraries_gib": 0.5}
        for step in range(1, 6)
    ]  # fmt: skip
    lines += [{"stage": "reflect-1", "step": 1, "seconds": 3.0, "memory_gib": 1.0}]
    lines += [{"stage": "label", "event": "done", "step": 1, "seconds": 3.0}]
    found = read(lines)
    assert found["teacher"] == Measured(4.0, 4.0, 3, 6 * 2**30, 5.5 * 2**30, 5)
    assert found["reflect"].counted == 1 and set(found) == {"teacher", "reflect"}


def test_a_calibration_trains_the_same_batches_for_a_few_steps(tmp_path: Path) -> None:
    config = small(load_config(TINY, ["reflect.rounds=3", "sinks.tensorboard=true"]), 5, tmp_path)
    whole = load_config(TINY)
    assert config.sft == whole.sft.model_copy(update={"steps": 5})
    assert config.distill.optim.steps == config.reflect.optim.steps == config.guide.steps == 5
    assert config.reflect.rounds == 1 and not config.sinks.tensorboard and config.run.root == str(tmp_path)
    assert config.model == whole.model and config.compute.workers == whole.compute.workers


def test_phantoms_are_counted_and_other_data_said_to_be_assumed(tmp_path: Path) -> None:
    load = workload_of(load_config(TINY))
    assert load.records == 5920 and 8 <= load.turns <= 10 and "drawn" in load.known
    # Steps of a run log some 59 tokens a question, 16 of them the image's.
    assert 30 < load.text + load.answer < 50 < load.longest < 90
    away = workload_of(load_config(LARGE))
    assert "assumed" in away.known and "not prepared" in away.known
    told = workload_of(load_config(LARGE), records=100, questions=1000)
    assert (told.records, told.turns) == (100, 10) and "as given" in told.known


def test_words_numbers_and_box_tags_are_one_token_each() -> None:
    # Where, is, it, ?, a space; two tags; ( 80 , 36 ),( 384 , 366 )
    assert pieces("Where is it? <box>(80,36),(384,366)</box>") == 5 + 2 + 9
    assert pieces("") == 0


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(list(map(str, arguments)))
    done = capsys.readouterr()
    return code, done.out, done.err


def test_json_is_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", TINY, "--json")
    found = json.loads(out)
    assert code == 0 and {"stages", "disk", "checkpoints", "warnings", "models"} <= found.keys()
    row = stage(found, "teacher")
    assert row["total"] == pytest.approx(sum(row["memory"].values()))
    assert found["disk"]["total"] == pytest.approx(sum(v for k, v in found["disk"].items() if k != "total"))


def test_the_text_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", LARGE, "--gpu", "a100-40", "--price", "1.5", "--mtbf", "1")
    assert code == 0
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "buffers",
                 "total", "ZeRO", "a100-40", "12 dollars an hour", "disk:",
                 "checkpoints of distill", "hours"):  # fmt: skip
        assert word in out, word


def test_mistakes_are_one_line_and_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "plan", LARGE, "--gpu", "abacus")
    assert code == 2 and err.startswith("error: --gpu: unknown accelerator 'abacus'") and err.count("\n") == 1
    code, _, err = run(capsys, "plan", LARGE, f"model.path={tmp_path}")
    assert code == 2 and "holds no config.json" in err and err.count("\n") == 1


def test_a_sweep_still_says_its_trials() -> None:
    found = planned(CONFIGS / "sweeps" / "tiny.yaml")
    assert any(line.startswith("sweep:") for line in found["sweep"]) and found["disk"]["trials"] > 0


@pytest.mark.parametrize("name", ["joint", "rope_guidance", "distillation", "reflection", "population"])
def test_a_preset_says_the_hours_that_are_planned(name: str) -> None:
    path = CONFIGS / "sweeps" / f"{name}.yaml"
    line = planned(path)["sweep"][-1].removeprefix("sweep: ")
    assert line.startswith("its trials take")
    assert f"# On two CPU cores, no GPU, by `clinkd plan`: {line}." in path.read_text()


def test_a_trials_hours_are_its_own_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the trials take twice the time, what they share stays; ASHA ends some of them."""

    def hours(*overrides: str) -> tuple[float, float]:
        line = planned(CONFIGS / "sweeps" / "rope_guidance.yaml", *overrides)["sweep"][-1]
        found = re.search(r"take ([\d.]+) to .* share ([\d.]+) to", line)
        assert found
        return float(found[1]), float(found[2])

    few, many = (hours(f"sweep.trials={count}", "sweep.scheduler=none") for count in (24, 48))
    assert many[0] == pytest.approx(2 * few[0], rel=0.06) and many[1] == few[1]
    assert hours("sweep.trials=24")[0] < few[0]


def test_a_nodes_memory_holds_what_gpus_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    found, offloaded = planned(LARGE), planned(LARGE, "compute.cpu_offload=true", "compute.zero_stage=2")
    trained = found["models"][1]["trained"]
    assert offloaded["node"]["offloaded"] == 12 * trained and "offloaded" not in found["node"]
    assert stage(offloaded, "distill")["memory"]["optimizer"] == 0
    assert found["node"]["making_batches"] > 0 and "making_batches" not in planned(TINY)["node"]
    wider = planned(LARGE, "feed.window_mib=256")["node"]["making_batches"]
    assert wider > found["node"]["making_batches"]


def test_a_saved_plan_is_where_the_report_looks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from clinkd.report.planned import read_plan

    code, _, _ = run(capsys, "plan", TINY, f"run.root={tmp_path}", "run.name=one", "--save")
    assert code == 0 and stage(read_plan(tmp_path / "one"), "teacher")["steps"] == load_config(TINY).sft.steps


def test_true_answers_alone_ask_no_teacher_and_keep_no_cache() -> None:
    plain = ("distill.a=0", "distill.unlabelled_share=0", "distill.start_quantile=0")
    for changes, asked in (((), True), (plain, False), ((*plain, "distill.unlabelled_share=0.1"), True)):
        found = planned(TINY, *changes)
        assert ("label" in {row["name"] for row in found["stages"]}) == asked
        assert (found["disk"]["teacher_cache"] > 0) == asked
