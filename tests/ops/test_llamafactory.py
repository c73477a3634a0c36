"""A LLaMA-Factory file read as ours: what it said is kept, what has no counterpart is listed with why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clinkd import cli
from clinkd.config import ConfigError, RunConfig, load_config
from clinkd.ops.llamafactory import COPIED, REASONS, UNKNOWN, translate
from clinkd.ops.starter import Case, text_of

LORA: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "stage": "sft", "do_train": True,
    "template": "qwen2_vl",
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "dataset": "grit", "cutoff_len": 2048,
    "output_dir": "saves/qwen2_vl-2b/lora/sft", "save_steps": 500, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "deepspeed": "examples/ds_z2_config.json",
}  # fmt: skip


def written(tmp_path: Path, **changes: Any) -> Path:
    values = {key: value for key, value in (LORA | changes).items() if value != "absent"}
    path = tmp_path / "lf.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def loaded(tmp_path: Path, *, task: str = "finetune", **changes: Any) -> RunConfig:
    found = translate(written(tmp_path, **changes))
    out = tmp_path / "config.yaml"
    out.write_text(text_of(Case(task, translated=found), "mine"))
    return load_config(out)


def reason(tmp_path: Path, key: str, value: Any, **changes: Any) -> str:
    [found] = [left for left in translate(written(tmp_path, **changes | {key: value})).left if left[0] == key]
    return found[2]


def test_a_lora_run_keeps_its_numbers(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    optim, lora = config.distill.optim, config.model.lora
    assert lora is not None and (lora.rank, lora.alpha, len(lora.targets)) == (8, 16, 7)
    assert (optim.lr, optim.epochs, optim.batch_size, optim.accumulation) == (1e-4, 3, 1, 8)
    assert (optim.schedule, optim.warmup, optim.weight_decay) == ("cosine", 0.1, 0.0)
    assert (config.run.root, config.run.name, config.run.seed) == ("saves/qwen2_vl-2b/lora", "sft", 42)
    assert (config.compute.precision, config.compute.zero_stage) == ("bf16", 2)
    assert config.compute.checkpoint_every == 500 and config.compute.gradient_checkpointing
    assert (config.data.source, config.data.images) == ("data/grit.json", "data")
    assert config.distill.a == 0 and not config.reflect.rounds


def test_what_the_file_leaves_out_is_what_it_meant_not_what_we_would_take(tmp_path: Path) -> None:
    gone = dict.fromkeys(("learning_rate", "num_train_epochs", "per_device_train_batch_size", "warmup_ratio",
                          "finetuning_type", "lora_rank", "lr_scheduler_type"), "absent")  # fmt: skip
    config = loaded(tmp_path, **gone)
    optim = config.distill.optim
    assert (optim.lr, optim.epochs, optim.batch_size, optim.warmup) == (5e-5, 3, 8, 0)
    assert config.model.lora is not None and config.model.lora.rank == 8
    left = {key: why for key, _, why in translate(written(tmp_path, **gone)).left}
    assert "its default there" in left["lr_scheduler_type"]  # linear, which we have not


def test_a_whole_recipe_takes_the_numbers_to_its_rounds_too(tmp_path: Path) -> None:
    config = loaded(tmp_path, task="recipe", finetuning_type="full")
    assert config.reflect.optim.lr == config.distill.optim.lr == 1e-4
    assert config.model.lora is None and config.reflect.rounds == 1 and config.distill.a > 0


def test_a_dataset_is_found_where_its_index_says(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"grit": {"file_name": "grit/train.jsonl"}}))
    config = loaded(tmp_path, dataset_dir=str(tmp_path), media_dir="/images")
    assert config.data.source == str(tmp_path / "grit/train.jsonl") and config.data.images == "/images"
    left = translate(written(tmp_path, dataset="grit, other,third", dataset_dir=str(tmp_path))).left
    assert ("dataset", "other, third") in [(key, value) for key, value, _ in left]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("deepspeed", "z3_offload.json", {"zero_stage": 3, "cpu_offload": True, "offload_parameters": True}),
        ("deepspeed", "examples/deepspeed/ds_z0_config.json", {"zero_stage": 0, "cpu_offload": False}),
        ("disable_gradient_checkpointing", True, {"gradient_checkpointing": False}),
    ],
)
def test_what_is_computed_for_the_cluster(
    tmp_path: Path, key: str, value: Any, found: dict[str, Any]
) -> None:
    compute = loaded(tmp_path, **{key: value}).compute
    assert {name: getattr(compute, name) for name in found} == found


def test_a_deepspeed_file_that_is_there_goes_before_its_name(tmp_path: Path) -> None:
    path = tmp_path / "ds_z2.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    compute = loaded(tmp_path, deepspeed=str(path)).compute
    assert (compute.zero_stage, compute.cpu_offload, compute.offload_parameters) == (3, True, False)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"max_steps": 200, "warmup_steps": 20, "warmup_ratio": "absent"}, "warmup", 0.1),
        ({"max_steps": 200}, "steps", 200),
        ({"max_steps": -1}, "steps", None),
        ({"lr_scheduler_type": "constant_with_warmup"}, "schedule", "constant"),
        ({"max_grad_norm": 0.5}, "clip", 0.5),
    ],
)
def test_what_is_computed_for_the_optimiser(
    tmp_path: Path, changes: dict[str, Any], key: str, value: Any
) -> None:
    assert getattr(loaded(tmp_path, **changes).distill.optim, key) == value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stage", "dpo", "no preferences"),
        ("cutoff_len", 2048, "never cut"),
        ("finetuning_type", "freeze", "model.lora"),
        ("lr_scheduler_type", "polynomial", "cosine stays"),
        ("warmup_steps", 100, "only max_steps would tell"),
        ("trust_remote_code", True, "no code"),
        ("deepspeed", "mine.json", "set compute.zero_stage"),
        ("lora_target", "lm_head", "adapters go into"),
        ("report_to", ["swanlab", "wandb"], "sinks are"),
        ("val_size", 500, "a share of the cases"),
        ("resume_from_checkpoint", None, "goes on where it was"),
        ("galore_rank", 8, UNKNOWN),
        ("num_train_epochs_", 3, UNKNOWN),
        ("save_steps", "often", "not a value"),
        ("lora_target", 3, "not a value"),
        ("dataset", {"a": 1}, "put them into one folder"),
    ],
)
def test_what_has_no_counterpart_is_listed_with_its_reason(
    tmp_path: Path, key: str, value: Any, said: str
) -> None:
    changes = {"dataset": {"a": 1, "b": 2}} if key == "dataset" else {key: value}
    assert said in reason(tmp_path, key, changes[key])


def test_every_line_of_the_file_is_taken_or_listed(tmp_path: Path) -> None:
    path = written(tmp_path, galore_rank=8, fp16=True, max_samples=10, report_to="tensorboard")
    found = translate(path)
    lines = yaml.safe_load(path.read_text())
    listed = {key for key, _, why in found.left if "its default there" not in why}
    assert found.taken + len(listed) == len(lines)
    text = text_of(Case("finetune", translated=found), "mine")
    assert all(f"#   {key}: " in text for key in listed)


def test_no_key_has_two_ways(tmp_path: Path) -> None:
    from clinkd.ops.llamafactory import _RULES

    assert not (set(COPIED) & set(REASONS)) and not (set(_RULES) & (set(COPIED) | set(REASONS)))


@pytest.mark.parametrize("text", ["- a\n", "stage: sft\n", "a: [1\n"])
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "lf.yaml").write_text(text)
    with pytest.raises(ConfigError):
        translate(tmp_path / "lf.yaml")
    with pytest.raises(ConfigError, match="no file"):
        translate(tmp_path / "absent.yaml")


def test_the_command_says_how_much_was_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, learning_rate="much")
    assert cli.main(["init", str(tmp_path / "a"), "--from", str(path)]) == 2
    assert "distill.optim.lr" in capsys.readouterr().err and not (tmp_path / "a").exists()
    path = written(tmp_path)
    assert cli.main(["init", str(tmp_path / "a"), "--from", str(path), "--data", "s3://lab/grit"]) == 0
    assert "lines taken" in capsys.readouterr().err
    text = (tmp_path / "a" / "config.yaml").read_text()
    assert load_config(tmp_path / "a" / "config.yaml").data.source == "s3://lab/grit"
    assert "--data was given" in text and "no folder of that name here" in text
