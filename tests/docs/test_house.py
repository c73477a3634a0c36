"""The files beside the code, and how long those of the code may be; links that lead on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from command_lines import PAGES, ROOT
from test_imports import RANKS

PROJECT = (ROOT / "pyproject.toml").read_text()


def of_project(key: str) -> str:
    found = re.search(rf'^{key} = "(.+)"$', PROJECT, re.M)
    assert found, key
    return found[1]


def test_the_licence_is_apaches_and_the_package_says_so() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text and "END OF TERMS" in text
    assert of_project("license") == "Apache-2.0"


def test_the_citation_has_the_packages_version_and_whole_references() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    assert (str(cited["version"]), cited["license"]) == (of_project("version"), of_project("license"))
    assert len(cited["references"]) == 3
    for reference in cited["references"]:
        assert {"type", "title", "authors", "year", "url", "identifiers"} <= set(reference)
        assert all(author["family-names"] and author["given-names"] for author in reference["authors"])
        assert reference["identifiers"][0]["value"].removeprefix("arXiv:") in reference["url"]


def test_the_changelog_keeps_its_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_picture_of_the_rooms_shows_each_at_its_rank() -> None:
    """A row of the table is a rank, the highest first, and names the rooms of that rank and no other."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = [
        re.findall(r"`(\w+)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")
    ]
    shown = [sorted(row) for row in rows]
    ranks = sorted(set(RANKS.values()), reverse=True)
    assert shown == [sorted(room for room, rank in RANKS.items() if rank == wanted) for wanted in ranks]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda page: page.name
)
def test_links_to_files_and_headings_lead_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """`path/to/file` in a page of the repository, where its first folder is one of the repository's."""
    known = ("clinkd", "configs", "tests", "docs", "cluster", "benchmarks", "ray_jobs")
    for name in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        if name.split("/")[0] in known and "/" in name:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


SOURCES = sorted((ROOT / "clinkd").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 40


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, text: list[str]) -> int:
    """Lines of a function's body that are not blank, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return sum(bool(line.strip()) for line in text[body[0].lineno - 1 : function.end_lineno]) if body else 0


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node, lines) <= LONGEST_FUNCTION, node.name


def test_a_long_function_would_be_found() -> None:
    text = ["def f():", '    """Says."""', *["    x = 1", ""] * 41]
    [function] = ast.parse("\n".join(text)).body
    assert isinstance(function, ast.FunctionDef) and code_lines(function, text) == 41
