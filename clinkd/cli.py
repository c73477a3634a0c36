"""The command line.

Decisions:
- Nothing heavy is imported before a command needs it: ``clinkd --help`` is read often.
- Exit codes: 0 done, 1 failed while working, 2 bad input or configuration, 130 interrupted. A user's
  mistake is one line on standard error; a traceback is shown with ``--debug`` (or CLINKD_DEBUG=1), else kept
  in a file.
- Results go to standard output, everything about the work to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from clinkd import console

HELP = """Train ClinKD: a Qwen2-VL that answers questions about medical images and points at what it means.

The way of the data, one direction:

\b
  images + masks / QA JSON -- prepare --> shards, quarantine, manifest
  shards ------------------- guide ----> alignment of each image and question
  shards ------------------- teacher --> teacher checkpoint (or one by path)
  shards + teacher --------- label ----> pseudo-labels, teacher cache
  cache -------------------- distill --> student
  shards + student --------- reflect --> student, trained on its own misses
  student ------------------ evaluate -> predictions and scores
  everything --------------- report ---> one HTML file

Each arrow is a stage. A stage that is there and whole is skipped, one that was killed goes on.

Exit codes: 0 done, 1 failed while working, 2 bad input or configuration. --debug shows tracebacks.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Read by ``main`` wherever it stands on the line; here for the help text."""


def prepare(
    out: Path = typer.Option(..., "--out", help="Folder for shards/, quarantine.jsonl and manifest.json."),
    source: str = typer.Option(
        "phantoms",
        "--source",
        help="A Med-GRIT JSON/JSONL file, a folder of them, an SA-Med2D folder, or 'phantoms'.",
    ),
    images: Path | None = typer.Option(
        None, "--images", help="Folder of the images (default: images/ beside)."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the split (and of phantoms)."),
    test_fraction: float = typer.Option(
        0.1, "--test-fraction", help="Share of the cases kept for evaluation."
    ),
    phantoms: int = typer.Option(
        2000, "--phantoms", min=1, help="Number of phantoms, when they are the source."
    ),
    strict: bool = typer.Option(False, "--strict", help="The first refused row is an error."),
) -> None:
    """Check, split and shard images with their questions; refused rows go to the quarantine."""
    from clinkd.config import ConfigError

    if "://" in str(out) or str(out).startswith(("s3:", "gs:")):
        raise ConfigError(
            f"--out: {out} is no local folder; prepare writes to a folder that all workers share"
        )
    manifest = _prepare(source, out, images, seed, test_fraction, phantoms, strict)
    typer.echo(console.account(manifest))
    typer.echo(f"prepared data in {out}")


def validate(
    path: str = typer.Argument(..., help="What prepare would take, or a folder that it made."),
    images: Path | None = typer.Option(
        None, "--images", help="Folder of the images (default: images/ beside)."
    ),
    strict: bool = typer.Option(False, "--strict", help="Any refused row is an error."),
) -> None:
    """Check data without keeping anything: what prepare would take, refuse, and why."""
    from clinkd.data.shards import DataError, iter_rows, read_manifest

    if (Path(path) / "manifest.json").is_file():
        manifest = read_manifest(Path(path))
        found = sum(1 for _ in iter_rows(Path(path), columns=["id"]))
        if found != manifest["images"]:
            raise DataError(
                f"{path}: {found} images in the shards, {manifest['images']} in the manifest: prepare again"
            )
        typer.echo(console.account(manifest))
        return
    scratch = Path(tempfile.mkdtemp(prefix="clinkd-validate-"))
    try:
        manifest = _prepare(path, scratch / "data", images, 0, 0.1, 0, strict)
        typer.echo(console.account(manifest))
        for row in console.first_of_each(scratch / "data" / "quarantine.jsonl"):
            where = " ".join(filter(None, [row.get("where"), row.get("image")]))
            typer.echo(f"  {row['reason']}: {where} ({row.get('detail', '')})")
        shutil.rmtree(scratch, ignore_errors=True)
    except DataError:  # its message names the quarantine: that stays
        for folder in ("shards", ".work"):
            shutil.rmtree(scratch / "data" / folder, ignore_errors=True)
        raise


def evaluate(
    task: str = typer.Option(..., "--task", help="vg, roc, rc or mia."),
    predictions: Path = typer.Option(..., "--predictions", help="JSONL of image, annotation, response."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    spice_jars: Path | None = typer.Option(None, "--spice-jars", help="Folder of CoreNLP 3.6.0, for SPICE."),
) -> None:
    """Score predictions by the published protocol, with stricter numbers beside it."""
    from clinkd.config import ConfigError
    from clinkd.data.records import TASKS
    from clinkd.data.shards import DataError
    from clinkd.evaluate.score import read_predictions, score_task

    if task not in TASKS:
        raise ConfigError(f"--task: unknown task {task!r}; one of {', '.join(TASKS)}")
    try:
        rows = read_predictions(predictions)
    except OSError as error:
        raise DataError(f"--predictions: cannot read {predictions}: {error.strerror}") from None
    if not rows and not rows.bad_lines:
        raise DataError(
            f"--predictions: {predictions} is empty; give a JSONL file of image, annotation, response"
        )
    result = score_task(task, rows, spice_jars=spice_jars)
    typer.echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else console.table(result))


def config(
    path: Path = typer.Argument(..., metavar="CONFIG", help="YAML file; the examples are in configs/."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys, e.g. distill.a=0.7."),
) -> None:
    """Print the whole resolved configuration, or every mistake in it."""
    from clinkd.config import load_config, to_yaml

    typer.echo(to_yaml(load_config(path, overrides)), nl=False)


def run(
    path: Path = typer.Argument(Path("configs/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys, e.g. run.name=mine."),
) -> None:
    """Run the whole pipeline, from data to report.

    The same command again skips what is whole and goes on where it was killed.
    Example: clinkd run configs/tiny.yaml run.name=mine sft.steps=200
    """
    from clinkd.config import load_config
    from clinkd.stages import pipeline

    page = pipeline.run(load_config(path, overrides))
    typer.echo(f"report: {page}")


def train(
    stage: str = typer.Argument(..., metavar="STAGE", help="guide, teacher, distill or reflect."),
    path: Path = typer.Argument(Path("configs/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
) -> None:
    """Train one stage, with whatever it builds on that is not there yet.

    Example: clinkd train distill configs/tiny.yaml distill.a=1.0
    """
    from clinkd.config import ConfigError, load_config
    from clinkd.stages import pipeline

    if stage not in pipeline.TRAINED:
        raise ConfigError(f"train: {stage}: no such stage; one of {', '.join(pipeline.TRAINED)}")
    artifact = pipeline.run_to(load_config(path, overrides), stage)
    typer.echo(f"{stage}: {artifact.path}")


def label(
    path: Path = typer.Argument(Path("configs/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
) -> None:
    """Ask the teacher about all training samples: pseudo-labels, confidence, cached states."""
    from clinkd.config import load_config
    from clinkd.stages import pipeline

    artifact = pipeline.run_to(load_config(path, overrides), "label")
    typer.echo(f"label: {artifact.path}")


def predict(
    checkpoint: Path = typer.Option(..., help="Hugging Face folder of a trained model."),
    data: Path = typer.Option(..., help="Prepared data."),
    out: Path = typer.Option(..., help="Predictions to write, JSONL."),
    split: str = typer.Option("test", help="train or test."),
    batch_size: int = typer.Option(64, min=1),
    max_new_tokens: int = typer.Option(64, min=1),
) -> None:
    """Answer prepared questions with a checkpoint.

    Example: clinkd predict --checkpoint runs/tiny/model --data DIR --out predictions.jsonl
    """
    from clinkd.config import ConfigError
    from clinkd.stages.outcome import predict_folder

    if not (checkpoint / "config.json").is_file():
        raise ConfigError(f"--checkpoint: {checkpoint} holds no config.json; give a model's folder")
    with _ray():
        count = predict_folder(checkpoint, data, out, split, batch_size, max_new_tokens)
    typer.echo(f"{count} answers: {out}")


def report(
    folder: Path = typer.Argument(..., metavar="RUN", help="A run's folder, as runs/tiny."),
) -> None:
    """Write the report of a finished run again."""
    from clinkd.stages import pipeline

    typer.echo(f"report: {pipeline.report_again(folder)}")


def sweep(
    path: Path = typer.Argument(Path("configs/sweeps/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
) -> None:
    """Search the keys in sweep.space with Ray Tune and Optuna; trials share one teacher.

    Example: clinkd sweep configs/sweeps/tiny.yaml sweep.trials=8
    """
    from clinkd.config import load_config
    from clinkd.tune.sweep import sweep as search
    from clinkd.tune.sweep import table

    typer.echo(table(search(load_config(path, overrides))))


def show(
    path: Path = typer.Argument(..., help="A folder that prepare made."),
    out: Path = typer.Option(Path("sheet.png"), "--out", help="The sample sheet, PNG."),
    count: int = typer.Option(16, "--count", min=1, max=100, help="Images on the sheet."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the choice."),
) -> None:
    """Print a prepared folder's counts and draw some of its images with their boxes.

    Example: clinkd data show DIR --out sheet.png
    """
    from clinkd.data.shards import read_manifest
    from clinkd.report.sheet import sample_sheet

    typer.echo(console.account(read_manifest(path)))
    shown = sample_sheet(path, out, count=count, seed=seed)
    typer.echo(f"{shown} images: {out}")


COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    prepare,
    train,
    label,
    predict,
    evaluate,
    sweep,
    report,
    validate,
    config,
)
"""Every command, in the order the help lists them; the name is the function's."""

for _command in COMMANDS:
    app.command(_command.__name__)(_command)
_data = typer.Typer(help="Look into prepared data.", no_args_is_help=True, rich_markup_mode=None)
_data.command("show")(show)
app.add_typer(_data, name="data")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code; never raises."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("CLINKD_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        # Without standalone mode typer raises what it would print, and returns the code of an Exit.
        code = app(arguments, standalone_mode=False, prog_name="clinkd")
        if code == 130:  # typer turns an interrupt into this code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:  # the reader of standard output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    from clinkd.artifacts import ArtifactBusy
    from clinkd.config import ConfigError
    from clinkd.data.shards import DataError

    if hasattr(error, "format_message"):  # a usage error of typer
        lines = [" ".join(error.format_message().split()) or "no command given; see clinkd --help"]
    elif isinstance(error, (ConfigError, DataError, ArtifactBusy)):
        cause = (
            getattr(error, "cause", None) or error
        )  # what a Ray task raised comes wrapped, traceback and all
        lines = str(cause).splitlines()
    else:
        return _unexpected(error, debug)
    if debug:
        traceback.print_exception(error)
    for line in lines:
        typer.echo(f"error: {line}", err=True)
    return 2


def _unexpected(error: Exception, debug: bool) -> int:
    text = (str(error).strip().splitlines() or [""])[0]
    said = f"error: {type(error).__name__}: {text}" if text else f"error: {type(error).__name__}"
    if debug:
        traceback.print_exception(error)
        typer.echo(said, err=True)
        return 1
    with tempfile.NamedTemporaryFile(
        "w", prefix="clinkd-error-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    typer.echo(f"{said} (traceback in {file.name})", err=True)
    return 1


def _prepare(
    source: str, out: Path, images: Path | None, seed: int, test_fraction: float, phantoms: int, strict: bool
) -> dict[str, Any]:
    """Prepare with Ray and a progress view, whose numbers go beside ``out``: that stays the same bytes."""
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.prepare import find_source, prepare
    from clinkd.progress import Progress

    generated = source == "phantoms" and phantoms > 0
    where = PhantomSpec(images=phantoms, seed=seed) if generated else source
    find_source(where, images)  # before Ray starts: a wrong path is said at once
    out = Path(out).absolute()
    with _ray(), Progress(out.parent / f"{out.name}.metrics.jsonl") as progress:
        progress.start("prepare (check)")

        def show(name: str, done: int, total: int) -> None:
            progress.update(done, total=total)
            if done == total:
                progress.finish()
                if name == "check":
                    progress.start("prepare (write)")

        return prepare(
            where, out, images=images, seed=seed, test_fraction=test_fraction, strict=strict, progress=show
        )


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    from clinkd import cluster

    cluster.connect()
    try:
        yield
    finally:
        cluster.disconnect()
