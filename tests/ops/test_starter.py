"""``clinkd init``: a configuration for every case, in the schema's own words, over nothing that is there."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from clinkd import cli
from clinkd.config import ConfigError, RunConfig, load_config
from clinkd.config_schema import keys
from clinkd.ops import starter
from clinkd.ops.starter import TASKS, Case
from clinkd.tune.space import check_space

ROOT = Path(__file__).parent.parent.parent
CASES = [
    Case(task, "mine", data, images, model, teacher, gpus)
    for task, (data, images), (model, teacher), gpus in product(
        TASKS,
        [(None, None), ("s3://lab/grit", None), ("my data/train.json", "my data/images")],
        [(None, None), ("models/2B", None), ("models/2B", "models/7B")],
        [0, 1, 8],
    )
    if model or task != "finetune"
]


def at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize("task", TASKS)
def test_what_is_written_loads_and_says_what_was_asked_for(tmp_path: Path, task: str) -> None:
    cases = [case for case in CASES if case.task == task]
    assert len(cases) >= 18
    for case in cases:
        path = tmp_path / "config.yaml"
        path.write_text(starter.text_of(case, "mine"), encoding="utf-8")
        config = load_config(path)
        assert config.data.source == (case.data or "phantoms") and config.data.images == case.images
        assert config.model.path == case.model and config.teacher.path == (case.teacher or case.model)
        assert config.compute.workers == (case.gpus or 2)
        assert bool(config.compute.gpus_per_worker) == bool(case.gpus)
        assert bool(config.reflect.rounds) == (task == "recipe")
        if task == "sweep":
            check_space(config)
        if task == "finetune":
            assert config.model.lora and config.distill.a == 0 and config.rope.mode == "none"


def test_every_key_stands_under_the_schemas_own_words() -> None:
    known = {key.name: key.meaning for key in keys()}
    for case in CASES:
        comment, path = "", {0: ""}
        for line in starter.text_of(case, "mine").splitlines():
            indent = len(line) - len(line.lstrip())
            text = line.strip()
            if text.startswith("#"):
                comment = f"{comment} {text.removeprefix('#').strip()}".strip()
                continue
            name = text.partition(":")[0]
            key = f"{path[indent]}{name}"
            path[indent + 2] = f"{key}."
            if key in known and ".space." not in key:
                assert comment == known[key], key
            comment = ""


def test_models_made_here_and_the_recipe_are_those_of_the_shipped_configurations() -> None:
    tiny, recipe = load_config(ROOT / "configs/tiny.yaml"), load_config(ROOT / "configs/qwen2_vl_2b.yaml")
    assert {key: at(tiny, key) for key in starter.TINY} == starter.TINY
    placed = dict(starter._placed(starter.RECIPE, True))
    assert {key: at(recipe, key) for key in placed} == placed


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case("train"), "no such task; one of recipe, distill"),
        (Case("finetune"), "--model: give the folder"),
        (Case(teacher="models/7B"), "--model: give the folder"),
    ],
)
def test_a_case_that_lacks_something_says_what(case: Case, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        starter.text_of(case, "mine")


def test_names_with_spaces_colons_and_hashes_come_back_as_they_were(tmp_path: Path) -> None:
    for odd in (
        "a: b",
        "# no comment",
        "süß/ä b",
        "'quoted'",
        "two\nlines",
        "5e-5",
        "null",
        "yes",
        "-",
        "{x}",
    ):
        path = tmp_path / "config.yaml"
        path.write_text(starter.text_of(Case(data=odd), "mine"), encoding="utf-8")
        assert load_config(path).data.source == odd


# The command
def test_init_writes_a_file_that_config_accepts_and_names_its_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my lab #1"
    assert cli.main(["init", str(folder), "--data", "s3://lab/grit", "--gpus", "4"]) == 0
    out, err = capsys.readouterr()
    assert "clinkd plan" in out and err == ""
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=clinkd.schema.json\n")
    assert (folder / "clinkd.schema.json").is_file()
    assert cli.main(["config", str(folder / "config.yaml")]) == 0
    assert load_config(folder / "config.yaml").run.name == "my-lab--1"


def test_init_writes_over_nothing_unless_it_is_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: precious}\n")
    assert cli.main(["init", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "run: {name: precious}\n"
    assert not (tmp_path / "clinkd.schema.json").exists()
    assert cli.main(["init", str(tmp_path), "--force", "--data", str(tmp_path / "absent")]) == 0
    assert "nothing at" in capsys.readouterr().err
    assert load_config(tmp_path / "config.yaml").data.source == str(tmp_path / "absent")
