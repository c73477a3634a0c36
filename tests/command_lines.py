"""Command lines as pages and help texts show them: taken out, and held against commands and schema."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from clinkd import cli
from clinkd.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words behind it, and its text."""

    language: str
    words: tuple[str, ...]
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        language, *words = match["info"].split() or [""]
        found.append(Block(language, tuple(words), match["body"]))
    return found


def lines(text: str) -> Iterator[list[str]]:
    """Command lines as lists of words, continued ones joined; comments and blank lines are nothing."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@dataclass(frozen=True)
class Call:
    """A ``clinkd`` line that parsed: the command's names, its parameters by name."""

    names: tuple[str, ...]
    parameters: dict[str, Any]

    def config(self, folder: Path) -> RunConfig | None:
        """The configuration that the line names, relative to ``folder``, with its overrides."""
        path = self.parameters.get("path")
        if "overrides" not in self.parameters or path is None or path.parts[0] == "runs":  # that a run leaves
            return None
        return load_config(folder / path, list(self.parameters["overrides"] or ()))


def parse(words: list[str]) -> Call:
    """Parses a ``clinkd`` line as the command itself would, without running it.

    Raises:
        click.UsageError: no such command, option or value.
    """
    assert words[0] == "clinkd", words
    command: Any = typer.main.get_command(cli.app)
    if words[1:] in (["--help"], ["--install-completion"]):
        assert any(
            words[1] in option.opts
            for option in command.get_params(command.make_context("clinkd", [], resilient_parsing=True))
        )
        return Call((), {})
    names, rest = [], words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        assert name in command.commands, f"no command {' '.join([*names, name])}"
        command = command.commands[name]
        names.append(name)
    return Call(tuple(names), command.make_context(names[-1], list(rest)).params)


def commands() -> dict[str, Any]:
    """Every command and group of the application by its whole name."""

    def below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        yield name, command
        for inner, found in getattr(command, "commands", {}).items():
            yield from below(found, f"{name} {inner}".strip())

    return dict(below(typer.main.get_command(cli.app), ""))
