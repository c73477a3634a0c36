"""How many small faults in a module its own tests find: mutants made by cosmic-ray, survivors shown.

    pip install --target .venv/mutants cosmic-ray==8.7.0
    python tests/mutants.py [rope losses sampler protocol judge] [--drawn 60] [--seed 0]

Works on a copy of the committed tree. Of a module's mutants --drawn are drawn by --seed; unions in
annotations, which nothing evaluates, are left out. A module takes from 5 minutes to half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = {
    "rope": ("clinkd/model/rope.py", "tests/model/test_rope.py"),
    "losses": ("clinkd/distill/losses.py", "tests/distill/test_losses.py"),
    "sampler": ("clinkd/data/sampler.py", "tests/data/test_sampler.py"),
    "protocol": ("clinkd/evaluate/protocol.py", "tests/evaluate/test_protocol.py"),
    "judge": ("clinkd/reflect/judge.py", "tests/reflect/test_judge.py"),
}
LONGEST = 900.0  # seconds of one mutant's tests, after which it counts as found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; none: all")
    parser.add_argument("--drawn", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if unknown := set(chosen.modules) - set(MODULES):
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        for name in chosen.modules or MODULES:
            score(name, Path(folder), chosen.drawn, chosen.seed)


def score(name: str, folder: Path, drawn: int, seed: int) -> None:
    """Tries the mutants of one module; prints how many were found, and what the others changed."""
    module, tests = MODULES[name]
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider -o addopts= {tests}"
    config, session = folder / f"{name}.toml", folder / f"{name}.sqlite"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {LONGEST}\nexcluded-modules = []\n'
        f'test-command = {json.dumps(command)}\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    cosmic_ray(folder, "init", str(config), str(session))
    with closing(sqlite3.connect(session)) as store:
        whole, kept = draw(store, drawn, seed)
        print(f"{name}: {whole} mutants, {kept} drawn", flush=True)
        cosmic_ray(folder, "exec", str(config), str(session))
        rows = store.execute("select upper(test_outcome), diff from work_results").fetchall()
    survivors = [diff for outcome, diff in rows if outcome == "SURVIVED"]
    for diff in survivors:
        print(*(line for line in diff.splitlines() if line[:1] in "+-@" and line[:3] not in ("+++", "---")),
              sep="\n")  # fmt: skip
    found = len(rows) - len(survivors)
    print(f"{name}: {found} of {len(rows)} found, {100 * found / len(rows):.0f} %", flush=True)


def draw(store: sqlite3.Connection, drawn: int, seed: int) -> tuple[int, int]:
    """Leaves so many mutants in the session; returns how many there were, and are."""
    order = "start_pos_row, start_pos_col, operator_name, occurrence"
    rows = store.execute(
        f"select job_id from mutation_specs where operator_name not like '%BitOr%' order by {order}"
    ).fetchall()
    kept = random.Random(seed).sample(rows, min(drawn, len(rows)))
    for table in ("mutation_specs", "work_items"):
        marks = ",".join("?" * len(kept))
        store.execute(f"delete from {table} where job_id not in ({marks})", [row[0] for row in kept])
    store.commit()
    return len(rows), len(kept)


def cosmic_ray(folder: Path, *arguments: str) -> None:
    paths = [str(folder), str(ROOT / ".venv" / "mutants"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "cosmic_ray.cli", *arguments], cwd=folder, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit("cosmic-ray did not run: pip install --target .venv/mutants cosmic-ray==8.7.0")


if __name__ == "__main__":
    main()
