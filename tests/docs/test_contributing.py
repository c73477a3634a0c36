"""The examples of CONTRIBUTING.md, each run as it stands, and the lists of names that they add to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from command_lines import ROOT, Block, blocks

from clinkd.config import load_config
from clinkd.config_train import DistillSection
from clinkd.data.sources import FORMATS
from clinkd.distill.certificate import ORACLES
from clinkd.distill.divergences import DIVERGENCES, divergence
from clinkd.evaluate.grounding import RATES
from clinkd.tune.space import check_space, trials_wanted

PAGE = ROOT / "CONTRIBUTING.md"
EXAMPLES = [block for block in blocks(PAGE) if block.language == "python"]


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What an example adds is gone after it."""
    known = [(table, dict(table)) for table in (DIVERGENCES, ORACLES, FORMATS, RATES)]
    yield
    for table, before in known:
        table.clear()
        table.update(before)  # type: ignore[arg-type]


def test_there_is_an_example_for_each_thing_to_add() -> None:
    text = PAGE.read_text(encoding="utf-8")
    wanted = ("a divergence", "a stage", "a reader", "a metric", "a preset of a sweep")
    assert [f"## Add {thing}" for thing in wanted] == [
        li for li in text.splitlines() if li.startswith("## Add")
    ]
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=["divergence", "stage", "reader", "metric"])
def test_an_example_runs_as_it_stands(
    example: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "assert " in example.text
    exec(compile(example.text, str(PAGE), "exec"), {"__name__": "example"})


def test_a_wrong_slope_is_found_by_the_example_for_a_divergence() -> None:
    text = EXAMPLES[0].text
    assert text.count(".mul_(0.5)\n") == 1
    with pytest.raises(AssertionError, match="gradient by"):
        exec(text.replace(".mul_(0.5)\n", ".mul_(0.6)\n"), {})


def test_the_preset_is_one_that_a_sweep_takes(tmp_path: Path) -> None:
    [preset] = [block.text for block in blocks(PAGE) if block.language == "yaml"]
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "tiny.yaml").write_text((ROOT / "configs" / "tiny.yaml").read_text())
    path = tmp_path / "sweeps" / "cache.yaml"
    path.write_text(preset)
    config = load_config(path)
    check_space(config)
    assert trials_wanted(config) == 6


def test_configuration_registry_and_oracles_know_the_same_divergences() -> None:
    names = get_args(DistillSection.model_fields["divergence"].annotation)
    assert tuple(DIVERGENCES) == tuple(ORACLES) == names


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a divergence jsd already"):
        divergence("jsd")


def test_commands_of_the_page_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("install", "test"):
        assert f"make {target}" in PAGE.read_text(encoding="utf-8") and f"\n{target}:" in makefile
