"""The commands before and around a run: ``plan``, ``submit``, ``doctor``."""

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
    scale: Path | None = typer.Option(
        None, "--scale", metavar="FILE.html", help="Write a page of throughput on 1 to 512 GPUs, simulated."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON; sizes in bytes."),
) -> None:
    """Say what a run will do and cost: steps, memory, hours, price, disk, and what looks wrong.

    \b
    Example: clinkd plan configs/qwen2_vl_7b.yaml --gpu h100 --price 2.5
             clinkd plan configs/qwen2_vl_7b.yaml --scale scaling.html
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
    if scale is not None:
        from clinkd.ops.scaling import scaling
        from clinkd.report.scaling import build_scaling

        found["scaling"] = scaling(config, gpu, records)
        typer.echo(f"scaling: {build_scaling(found['scaling'], scale)}", err=True)
    typer.echo(json.dumps(found, indent=1) if as_json else show(found))


def submit(
    job: str = typer.Argument(
        ..., metavar="JOB", help="pipeline, teacher, distill, reflect, label, sweep or ablate."
    ),
    path: Path = typer.Argument(..., metavar="CONFIG", help="YAML file; sent as one resolved file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
    address: str = typer.Option(
        ..., "--address", envvar="RAY_API_SERVER_ADDRESS", help="Of the head's dashboard: http://HEAD:8265."
    ),
    wait: bool = typer.Option(True, "--wait/--no-wait", help="Follow the log and return the exit code."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be sent."),
) -> None:
    """Run a command as a Ray job on a cluster; the same again follows it, or goes on where it ended.

    A token is taken from the environment (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN). Ctrl-C stops following, not
    the job: `ray job stop ID` does that.

    \b
    Example: clinkd submit pipeline configs/qwen2_vl_7b.yaml run.root=/mnt/shared/runs \\
                 --address http://head:8265
    """
    from clinkd.config import load_config
    from clinkd.ops import submit as jobs

    with jobs.packed(job, load_config(path, overrides)) as packed:
        typer.echo(f"{packed.name}: {packed.entrypoint} ({packed.size / 2**20:.1f} MiB to send)", err=True)
        if dry_run:
            return
        client = jobs.client_of(address)
        attempt, started = jobs.submit(client, packed, address)
    typer.echo(f"{attempt}: {'submitted' if started else 'under way already; following it'}", err=True)
    if wait:
        code = jobs.follow(client, attempt, lambda text: typer.echo(text, nl=False), address)
        raise typer.Exit(code)


def doctor(
    root: Path = typer.Option(Path("runs"), "--root", help="Where runs would be kept."),
    storage: str | None = typer.Option(None, "--storage", help="A bucket to try: s3://bucket/prefix."),
    endpoint: str | None = typer.Option(None, "--endpoint", help="An S3 that is not Amazon's."),
) -> None:
    """Check this machine: versions, GPU, compilers, Java, memory, disk, ports, object storage.

    One line each, with what to do. Exit code 1 where something fails that the main job needs.
    Example: clinkd doctor --storage s3://bucket/clinkd
    """
    from clinkd.ops.doctor import doctor as checks
    from clinkd.storage import configure

    configure(endpoint)
    failed = False
    for finding in checks(root, storage):
        typer.echo(finding.line())
        failed = failed or finding.state == "failed"
    raise typer.Exit(1 if failed else 0)
