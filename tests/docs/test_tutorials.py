"""Commands of the pages: each parses, its overrides are keys, its files are there; the cheap ones run.

A block of ``bash`` is held against the commands; ``bash run`` and ``python run`` are also executed, in the
page's order, by the slow test. ``yaml file=NAME`` is a file that the page's commands read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import PAGES, ROOT, Call, blocks, commands, lines, parse

from clinkd import cli, cluster
from clinkd.config import ConfigError, load_config
from clinkd.config_schema import keys
from clinkd.data.records import TASKS
from clinkd.ops import submit
from clinkd.tune.space import check_space

TUTORIALS = [page for page in PAGES if page.name.startswith("your-")]
OTHERS = {"make", "python", "ray", "kubectl", "tensorboard", "optuna-dashboard", "head", ".venv/bin/pytest"}
STAGES = ("guide", "teacher", "distill", "reflect")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader's: the repository's folders, and nothing of his own yet."""
    for name in ("configs", "cluster", "benchmarks", "ray_jobs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare_page(page: Path) -> None:
    """What the page tells its reader to write: its files, and a configuration by every ``init``."""
    for block in blocks(page):
        for word in block.words:
            if word.startswith("file="):
                Path(word.removeprefix("file=")).write_text(block.text)
        if block.language == "bash":
            for words in lines(block.text):
                if words[:2] == ["clinkd", "init"]:
                    assert cli.main([*words[1:], "--force"]) == 0, words


def command_lines(page: Path) -> Iterator[list[str]]:
    for block in blocks(page):
        if block.language == "bash":
            yield from lines(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_there_is(page: Path, lab: Path) -> None:
    prepare_page(page)
    for words in command_lines(page):
        if words[0] == "clinkd":
            check_call(parse(words), lab)
        else:
            assert words[0] in OTHERS, words
            check_files(words, lab)


def check_call(call: Call, folder: Path) -> None:
    """Overrides and values that the command itself would refuse later."""
    config = call.config(folder)
    if call.names == ("sweep",):
        assert config is not None
        check_space(config)
    if call.names == ("submit",):
        assert config is not None and call.parameters["job"] in submit.COMMANDS
        submit.check(call.parameters["job"], config)
    if call.names == ("train",):
        assert call.parameters["stage"] in STAGES
    if call.names == ("evaluate",):
        assert call.parameters["task"] in TASKS


def check_files(words: list[str], folder: Path) -> None:
    """Scripts, manifests and configurations that another program is given."""
    known = ("configs/", "cluster/", "benchmarks/", "ray_jobs/", "tests/")
    for word in words[1:]:
        if word.startswith(known):
            assert (folder / word).exists(), words
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    for path in (word for word in words if word.startswith("configs/")):
        load_config(folder / path, overrides)


def test_the_check_finds_what_is_wrong(lab: Path) -> None:
    for wrong in ("clinkd run configs/tiny.yaml --nope", "clinkd train", "clinkd plan a b --price dear"):
        with pytest.raises(Exception) as caught:
            parse(wrong.split())
        assert hasattr(caught.value, "format_message"), wrong  # a usage error of the command line's library
    with pytest.raises(AssertionError, match="no command sweeep"):
        parse(["clinkd", "sweeep"])
    with pytest.raises(ConfigError, match="unknown key"):
        parse(["clinkd", "run", "configs/tiny.yaml", "distill.b=1"]).config(lab)
    with pytest.raises(ConfigError, match="no such configuration file"):
        parse(["clinkd", "run", "configs/absent.yaml"]).config(lab)
    with pytest.raises(AssertionError):
        check_files(["python", "benchmarks/absent.py"], lab)
    with pytest.raises(AssertionError):
        check_call(parse(["clinkd", "submit", "nap", "configs/tiny.yaml", "--address", "http://a:1"]), lab)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_running_text_are_there(page: Path) -> None:
    known = commands()
    for text in re.findall(r"`clinkd ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        words = text.split()
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        assert name in known, f"{page.name}: clinkd {text}"
        options = {option for parameter in known[name].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word not in options]
        assert not unknown, f"{page.name}: clinkd {text}"


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_keys_that_a_tutorial_names_are_keys(page: Path) -> None:
    """`section.key` in running text, and `section.key=value`, where a section of that name is there."""
    known = {key.name for key in keys()}
    sections = {name.split(".")[0] for name in known} | {name.rpartition(".")[0] for name in known}
    for name in re.findall(
        r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:/\w+)?(?:=[^`]*)?`", page.read_text(encoding="utf-8")
    ):
        if name.split(".")[0] in sections and not name.endswith(
            (".json", ".jsonl", ".parquet", ".yaml", ".html", ".md")
        ):
            assert name in known | sections, f"{page.name}: {name}"


def test_the_sweep_that_a_page_shows_is_a_space(lab: Path) -> None:
    [shown] = [b for b in blocks(ROOT / "docs" / "your-sweep.md") if "space" in b.words]
    inner = "".join(f"    {line}\n" for line in shown.text.splitlines())
    (lab / "s.yaml").write_text(f"sweep:\n  space:\n{inner}")
    check_space(load_config(lab / "s.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page.name == "your-images.md" else pytest.mark.full, id=page.name)
        for page in TUTORIALS
    ],
)
def test_cheap_commands_do_what_the_page_says(
    page: Path,
    lab: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # the Ray of all tests stays
    said = ""
    for block in blocks(page):
        for word in block.words:
            if word.startswith("file="):
                Path(word.removeprefix("file=")).write_text(block.text)
        if "run" not in block.words:
            if block.language == "text":  # what the command before it prints, among else
                assert block.text.strip() in said, f"{page.name}: {block.text}\n{said}"
            continue
        if block.language == "python":
            subprocess.run([sys.executable, "-c", block.text], check=True, timeout=60, env=os.environ)
            continue
        for words in lines(block.text):
            code = cli.main(words[1:])
            said, err = capsys.readouterr()
            expected = (
                (0, 1) if words[1] == "doctor" else (0,)
            )  # what this machine lacks is no fault of the page
            assert code in expected, f"{words}: {err}"
    if page.name == "your-images.md":
        assert (
            Path("sheet.png").is_file()
            and len(Path("data/own/quarantine.jsonl").read_text().splitlines()) == 2
        )
