"""Help of every command: an example that is a real line, and completion for shells."""

from __future__ import annotations

import pytest
from command_lines import commands, lines, parse

from clinkd import cli


@pytest.mark.parametrize("name", [name for name in commands() if name])
def test_every_command_has_help_and_an_example_that_parses(name: str) -> None:
    command = commands()[name]
    assert command.help and all(
        getattr(option, "help", None) for option in command.params if option.name != "help"
    )
    assert command.epilog and command.epilog.removeprefix("\b\n").startswith("Example: clinkd ")
    for words in lines(command.epilog.removeprefix("\b\n").replace("Example: ", "")):
        assert " ".join(parse(words).names).startswith(name), words


def test_the_example_is_shown_with_its_lines_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "  Example: clinkd compare runs/tiny runs/mine\n           clinkd compare runs/a-1" in shown
    assert shown.count("Example:") == 1


def test_a_shell_asks_for_what_begins_like_this(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CLINKD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "clinkd ev")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().out.split() == ["evaluate"]
