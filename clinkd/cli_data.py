"""The command line's data room: prepare, validate, data show.

Decisions:
- Folders are paths or URIs (``s3://bucket/folder``) alike, so they stay text until ``storage`` locates them.
- What was checked but not kept leaves only its quarantine, and that only where somebody has to read it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp as new_folder
from typing import Any

import typer

from clinkd import console

ENDPOINT_HELP = "S3 other than Amazon's (or AWS_ENDPOINT_URL). Credentials come from the usual chain."


def prepare(
    out: str = typer.Option(
        ..., "--out", help="Folder or URI (s3://...) for shards/, quarantine.jsonl and manifest.json."
    ),
    source: str = typer.Option(
        "phantoms",
        "--source",
        help="A Med-GRIT JSON/JSONL file, a folder of them, an SA-Med2D folder, what prepare wrote, or "
        "'phantoms'; a path or URI.",
    ),
    images: str | None = typer.Option(
        None, "--images", help="Folder or URI of the images (default: images/ beside)."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the split (and of phantoms)."),
    test_fraction: float = typer.Option(
        0.1, "--test-fraction", help="Share of the cases kept for evaluation."
    ),
    validation_fraction: float = typer.Option(
        0.05, "--validation-fraction", help="Share of the cases kept to choose by while training."
    ),
    images_per_shard: int = typer.Option(256, "--images-per-shard", min=1, help="Records of one shard."),
    phantoms: int = typer.Option(
        2000, "--phantoms", min=1, help="Number of phantoms, when they are the source."
    ),
    strict: bool = typer.Option(False, "--strict", help="The first refused row is an error."),
    endpoint_url: str | None = typer.Option(None, "--endpoint-url", help=ENDPOINT_HELP),
) -> None:
    """Check, split and shard images with their questions; refused rows go to the quarantine.

    Killed, it goes on where it was when the same command is given again.

    \b
    Example: clinkd prepare --source medgrit.json --images images/ --out prepared
             clinkd prepare --source s3://lab/SAMed2D --out s3://lab/prepared
    """
    from clinkd import storage

    storage.configure(endpoint_url)
    manifest = _prepare(
        source, out, images, phantoms, seed=seed, test_fraction=test_fraction, strict=strict,
        validation_fraction=validation_fraction, images_per_shard=images_per_shard,
    )  # fmt: skip
    typer.echo(console.account(manifest))
    typer.echo(f"prepared data in {out}")


def validate(
    path: str = typer.Argument(..., help="What prepare would take, or what it made: a path or URI."),
    images: str | None = typer.Option(
        None, "--images", help="Folder or URI of the images (default: images/ beside)."
    ),
    strict: bool = typer.Option(False, "--strict", help="Any refused row is an error."),
    endpoint_url: str | None = typer.Option(None, "--endpoint-url", help=ENDPOINT_HELP),
) -> None:
    """Check data without keeping anything: what prepare would take, refuse, and why.

    Of prepared data: hashes, counts, that the split follows from the manifest, and that no image, case or
    near-duplicate is on both sides.

    Example: clinkd validate data/own
    """
    from clinkd import storage
    from clinkd.data.prepare import run
    from clinkd.data.shards import MANIFEST, DataError
    from clinkd.data.verify import verify

    storage.configure(endpoint_url)
    if (storage.locate(path) / MANIFEST).is_file():
        with connected(), _shown() as show:
            manifest = verify(path, lambda task, jobs: list(run(task, jobs, 0.5, "verify", show)))
        typer.echo(console.account(manifest))
        typer.echo("whole: hashes, counts and split are the manifest's; nothing is on both sides")
        return
    scratch = Path(new_folder(prefix="clinkd-validate-"))
    try:
        manifest = _prepare(path, str(scratch / "data"), images, 0, strict=strict, dry=True)
        typer.echo(console.account(manifest))
        for row in console.first_of_each(scratch / "data" / "quarantine.jsonl"):
            where = " ".join(filter(None, [row.get("where"), row.get("image")]))
            typer.echo(f"  {row['reason']}: {where} ({row.get('detail', '')})")
        shutil.rmtree(scratch, ignore_errors=True)
    except DataError:  # its message names the quarantine: that stays
        shutil.rmtree(scratch / "data" / ".work", ignore_errors=True)
        raise


def show(
    path: str = typer.Argument(..., help="A folder or URI that prepare made."),
    out: Path = typer.Option(Path("sheet.png"), "--out", help="The sample sheet, PNG."),
    count: int = typer.Option(16, "--count", min=1, max=100, help="Images on the sheet."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the choice."),
    endpoint_url: str | None = typer.Option(None, "--endpoint-url", help=ENDPOINT_HELP),
) -> None:
    """Print a prepared folder's counts and draw some of its images with their boxes.

    Example: clinkd data show DIR --out sheet.png
    """
    from clinkd import storage
    from clinkd.data.shards import read_manifest
    from clinkd.report.sheet import sample_sheet

    storage.configure(endpoint_url)
    typer.echo(console.account(read_manifest(path)))
    shown = sample_sheet(path, out, count=count, seed=seed)
    typer.echo(f"{shown} images: {out}")


def _prepare(source: str, out: str, images: str | None, phantoms: int, **settings: Any) -> dict[str, Any]:
    """Prepare with Ray and a progress view, whose numbers go beside ``out``: that stays the same bytes."""
    from clinkd import storage
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.prepare import find_source, prepare

    generated = source == "phantoms" and phantoms > 0
    where = PhantomSpec(images=phantoms, seed=settings.get("seed", 0)) if generated else source
    find_source(where, images)  # before Ray starts: a wrong path is said at once
    beside = None
    if not storage.is_remote(out):
        beside = Path(out).absolute()
        beside = beside.parent / f"{beside.name}.metrics.jsonl"
    with connected(), _shown(beside) as view:
        return prepare(where, out, images=images, progress=view, **settings)


@contextlib.contextmanager
def _shown(metrics: Path | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A progress view for passes over parts: called with the pass's name, parts done, parts in all."""
    from clinkd.progress import Progress

    with Progress(metrics) as progress:
        current = ""

        def step(name: str, done: int, total: int) -> None:
            nonlocal current
            if name != current:
                progress.start(f"prepare ({name})" if name != "verify" else "validate", total)
                current = name
            progress.update(done, total=total)
            if done == total:
                progress.finish()

        yield step


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ray, for the time of a command."""
    from clinkd import cluster

    cluster.connect()
    try:
        yield
    finally:
        cluster.disconnect()
