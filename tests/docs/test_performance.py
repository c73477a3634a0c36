"""The performance page: its numbers are what the benchmarks printed, and it is made of what was kept."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from command_lines import ROOT

spec = importlib.util.spec_from_file_location("all_benchmarks", ROOT / "benchmarks" / "all.py")
assert spec and spec.loader
benchmarks = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmarks  # where dataclasses look for their module
spec.loader.exec_module(benchmarks)
KEPT = json.loads(benchmarks.RESULTS.read_text())


def test_every_benchmark_of_the_command_is_there_and_was_kept() -> None:
    names = [bench.name for bench in benchmarks.BENCHES]
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in names)
    assert sorted(names) == sorted(KEPT["outputs"]) == sorted(KEPT["seconds"])
    assert {number.name for number in benchmarks.NUMBERS} == set(KEPT["numbers"])


@pytest.mark.parametrize("bench", benchmarks.BENCHES, ids=lambda bench: bench.name)
def test_a_number_is_what_the_benchmark_printed(bench: object) -> None:
    for number in bench.numbers:  # type: ignore[attr-defined]
        found = re.search(number.pattern, KEPT["outputs"][bench.name], re.MULTILINE)  # type: ignore[attr-defined]
        assert found and float(found[1]) == KEPT["numbers"][number.name], number.name


def test_the_page_and_its_plot_are_made_of_what_was_kept(tmp_path: Path) -> None:
    assert benchmarks.PAGE.read_text(encoding="utf-8") == benchmarks.page(KEPT)
    benchmarks.plot_ratios(KEPT["numbers"], tmp_path / "plot.svg")
    drawn = xml.etree.ElementTree.parse(tmp_path / "plot.svg")
    bars = [each for each in drawn.iter() if str(each.get("id", "")).startswith("patch_")]
    assert len(bars) > sum(number.sides for number in benchmarks.NUMBERS)


def test_better_is_more_of_one_number_and_less_of_another() -> None:
    speed = next(number.name for number in benchmarks.NUMBERS if number.more)
    memory = next(number.name for number in benchmarks.NUMBERS if not number.more)
    lines = benchmarks.table({speed: 6.0, memory: 0.5}, {speed: 4.0, memory: 0.25}).splitlines()
    assert f"| {speed} | 6 | 4 | 1.5 |" in lines and f"| {memory} | 0.5 | 0.25 | 0.5 |" in lines
    assert f"| {speed} | 6 | - | - |" in benchmarks.table({speed: 6.0}, {})
