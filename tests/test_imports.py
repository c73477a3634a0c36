"""The import direction of the rooms: each may know only the rooms below it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import clinkd

ROOT = Path(clinkd.__file__).parent
# A room sees itself and what stands in a lower rank.
RANKS = {
    "reading": -2, "metrics": -2, "config_model": -2, "config_train": -1.5, "config_sweep": -1.5,
    "config": -1, "config_schema": -0.5, "storage": 0, "interrupt": 0, "artifacts": 1, "sinks": 1.5,
    "progress": 1, "cluster": 1, "console": 1,
    "data": 2, "model": 2, "report": 3,
    "distill": 3, "evaluate": 3,
    "train": 4, "reflect": 5, "stages": 6, "tune": 6.5, "ops": 7, "cli_data": 7, "cli_ops": 7.5,
    "cli_init": 7.5, "cli": 8, "__main__": 9,
}  # fmt: skip
MAY_ALSO = {("distill", "model"), ("model", "data"), ("report", "evaluate")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clinkd."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "clinkd":
            found |= {alias.name for alias in node.names if not alias.name.startswith("_")}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("clinkd.")}
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imports(path):
            allowed = other == room or RANKS[other] < RANKS[room] or (room, other) in MAY_ALSO
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong, wrong


def modules(path: Path) -> set[str]:
    """The modules of the package that a file imports by ``from``, also inside a function."""
    return {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clinkd.")
    }


def test_no_two_modules_import_each_other_by_any_way() -> None:
    known = {
        ".".join(["clinkd", *path.relative_to(ROOT).with_suffix("").parts]): modules(path)
        for path in ROOT.rglob("*.py")
    }
    order = list(TopologicalSorter(known).static_order())  # raises CycleError, which tells the circle
    assert order.index("clinkd.model.encoders") < order.index("clinkd.model.encoder_folder")


def test_the_model_room_knows_no_ray_and_the_data_room_no_torch() -> None:
    for room, banned in (("model", "ray"), ("data", "torch"), ("data", "transformers")):
        for path in (ROOT / room).rglob("*.py"):
            names = {
                (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            assert not any(name.split(".")[0] == banned for name in names), f"{path} imports {banned}"
