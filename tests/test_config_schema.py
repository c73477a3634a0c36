"""The configuration told from its schema: no key without a meaning, one page, one JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from clinkd import cli
from clinkd.config import RunConfig, load_config, read_yaml
from clinkd.config_schema import json_schema, keys, markdown, sections

ROOT = Path(__file__).parent.parent


def test_every_key_says_what_it_means() -> None:
    assert [key.name for key in keys() if not key.meaning] == []
    assert [name for name, said in sections().items() if not said] == []


def test_keys_come_with_type_bounds_and_the_default_that_holds_there() -> None:
    known = {key.name: key for key in keys()}
    assert (known["distill.a"].type, known["distill.a"].default) == ("float ≥ 0", "0.5")
    assert (known["run.student_seed"].type, known["run.student_seed"].default) == ("int or null ≥ 0", "null")
    assert known["distill.divergence"].type == "`forward_kl`, `reverse_kl`, `jsd`"
    # One class, two defaults: a teacher made here is deeper than its student.
    assert (known["teacher.tiny.layers"].default, known["model.tiny.layers"].default) == ("4", "3")
    assert "model.lora.rank" in known and known["model.lora"].default == "null"
    assert known["sweep.space.KEY.kind"].default == ""


def test_every_key_can_be_set(tmp_path: Path) -> None:
    """A key of the page is a key of the schema: setting it to its default changes nothing."""
    (tmp_path / "c.yaml").write_text("")
    whole = RunConfig()
    for key in keys():
        if ".KEY." in key.name or key.name.startswith(("model.lora.", "reflect.exercises.")):
            continue
        assert load_config(tmp_path / "c.yaml", [f"{key.name}={key.default}"]) == whole, key


def test_the_page_of_keys_is_what_the_schema_says() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: clinkd config --keys > docs/config.md"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_editor_accepts_the_shipped_configurations(path: Path) -> None:
    jsonschema.Draft202012Validator(json_schema()).validate(read_yaml(path.read_text(), str(path)))


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"distill": {"temprature": 1}}, ["distill"]),
        ({"compute": {"zero_stage": 7}}, ["compute", "zero_stage"]),
        ({"distill": {"divergence": "l2"}}, ["distill", "divergence"]),
        ({"sweep": {"space": {"distill.a": {"kind": "gauss"}}}}, ["sweep", "space", "distill.a", "kind"]),
    ],
)
def test_an_editor_marks_what_is_wrong(wrong: dict, where: list[str]) -> None:
    errors = list(jsonschema.Draft202012Validator(json_schema()).iter_errors(wrong))
    assert [list(error.path) for error in errors] == [where]


def test_the_command_prints_schema_and_keys_and_wants_a_file_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert cli.main(["config", "--keys"]) == 0
    assert capsys.readouterr().out == markdown()
    assert cli.main(["config"]) == 2 and "give a YAML file" in capsys.readouterr().err
    assert cli.main(["config", "a.yaml", "--keys"]) == 2 and "no file with them" in capsys.readouterr().err
