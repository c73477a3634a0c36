"""The command ``clinkd plan``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer


def plan(
    path: Path = typer.Argument(Path("configs/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
    gpu: str = typer.Option("h100", "--gpu", help="What the workers run on, where they have GPUs."),
    price: float | None = typer.Option(None, min=0, help="US dollars for an hour of one; none: a usual one."),
    mtbf: float | None = typer.Option(
        None, min=0.01, help="Hours between failures of the job; none: by its size."
    ),
    records: int | None = typer.Option(None, min=1, help="Training images, where the data are not here."),
    questions: int | None = typer.Option(None, min=1, help="Training questions, likewise."),
    cluster_cpus: float | None = typer.Option(None, min=0, help="CPUs there are, to check placement."),
    cluster_gpus: float | None = typer.Option(None, min=0, help="GPUs there are, likewise."),
    calibrate: bool = typer.Option(False, "--calibrate", help="Run a few real steps and use their numbers."),
    steps: int = typer.Option(24, min=4, help="Of each stage, for --calibrate."),
    save: bool = typer.Option(False, "--save", help="Keep it in the run's folder, for the run's report."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON; sizes in bytes."),
) -> None:
    """Say what a run will do and cost: steps, memory, hours, price, disk, and what looks wrong.

    Example: clinkd plan configs/qwen2_vl_7b.yaml --gpu h100 --price 2.5
             clinkd plan configs/tiny.yaml --calibrate
    """
    from clinkd import cluster
    from clinkd.config import load_config
    from clinkd.ops.lint import Cluster
    from clinkd.ops.plan import Options
    from clinkd.ops.plan import plan as planned
    from clinkd.ops.show import show

    config = load_config(path, overrides)
    if cluster_cpus is None and not (config.compute.address or os.environ.get("RAY_ADDRESS")):
        cluster_cpus = None if config.compute.gpus_per_worker else float(cluster.real_cores())
    options = Options(
        gpu, price, mtbf, records, questions, Cluster(cluster_cpus, cluster_gpus), folder=Path.cwd()
    )
    measured = None
    if calibrate:
        from clinkd.ops.calibrate import measure

        measured = measure(config, steps)
    found = planned(config, options, measured)
    if save:
        from clinkd.report.planned import FILE

        folder = Path(config.run.root) / config.run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(found, indent=1) if as_json else show(found))
