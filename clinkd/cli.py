"""The command line.

Decisions:
- Nothing heavy is imported before a command needs it: ``clinkd --help`` is read often.
- Exit codes: 0 done, 1 failed while working, 2 bad input or configuration, 130 interrupted. A user's
  mistake is one line on standard error; a traceback is shown with ``--debug`` (or CLINKD_DEBUG=1), else kept
  in a file.
- Results go to standard output, everything about the work to standard error.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import typer

from clinkd import cli_data, cli_init, cli_ops, console
from clinkd.interrupt import terminated

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
EXAMPLE = "Example: "

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Read by ``main`` wherever it stands on the line; here for the help text."""


def evaluate(
    task: str = typer.Option(..., "--task", help="vg, roc, rc or mia."),
    predictions: Path = typer.Option(..., "--predictions", help="JSONL of image, annotation, response."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    spice_jars: Path | None = typer.Option(None, "--spice-jars", help="Folder of CoreNLP 3.6.0, for SPICE."),
) -> None:
    """Score predictions by the published protocol, with stricter numbers beside it.

    Example: clinkd evaluate --task vg --predictions runs/tiny/predictions.jsonl --json
    """
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


def compare(
    runs: list[Path] = typer.Argument(
        ..., metavar="RUN...", help="Folders of finished runs, or JSONL files of predictions."
    ),
    others: list[Path] = typer.Option(
        None, "--with", help="Further runs: all RUNs are one side then, and these the other (seeds)."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Compare two runs on the questions both answered: differences with 95% intervals and p, by image.

    
    Example: clinkd compare runs/tiny runs/mine
             clinkd compare runs/a-1 runs/a-2 --with runs/b-1 --with runs/b-2
    """
    from clinkd.config import ConfigError
    from clinkd.data.shards import DataError
    from clinkd.evaluate.compare import compare as compared
    from clinkd.evaluate.score import read_predictions

    if not others and len(runs) != 2:
        raise ConfigError("compare: give two runs, or one side's runs and the other's by --with")
    first, second = (runs, others) if others else (runs[:1], runs[1:])
    sides = []
    for side in (first, second):
        paths = [run / "predictions.jsonl" if run.is_dir() else run for run in side]
        try:
            sides.append([read_predictions(path) for path in paths])
        except OSError as error:
            raise DataError(f"compare: {error.filename}: {error.strerror}; `clinkd run` makes one") from None
    try:
        result = compared(*sides)
    except ValueError as error:
        raise DataError(str(error)) from None
    typer.echo(json.dumps(result, indent=1) if as_json else console.comparison(result))


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
    """Ask the teacher about all training samples: pseudo-labels, confidence, cached states.

    Example: clinkd label configs/tiny.yaml distill.cache.form=int8
    """
    from clinkd.config import load_config
    from clinkd.stages import pipeline

    artifact = pipeline.run_to(load_config(path, overrides), "label")
    typer.echo(f"label: {artifact.path}")


def predict(
    checkpoint: Path = typer.Option(..., help="Hugging Face folder of a trained model."),
    data: str = typer.Option(..., help="Prepared data: a folder or URI."),
    out: Path = typer.Option(..., help="Predictions to write, JSONL."),
    split: str = typer.Option("test", help="train, validation or test."),
    batch_size: int = typer.Option(64, min=1, help="Questions that are answered at one time."),
    max_new_tokens: int = typer.Option(64, min=1, help="Of an answer."),
    actors: int = typer.Option(2, min=1, help="Copies of the model that answer side by side."),
    guide: Path | None = typer.Option(
        None, help="Guide that scores the questions of a guided model; default: the checkpoint's own."
    ),
    endpoint_url: str | None = typer.Option(None, "--endpoint-url", help=cli_data.ENDPOINT_HELP),
) -> None:
    """Answer prepared questions with a checkpoint; killed, the same command goes on.

    Example: clinkd predict --checkpoint runs/tiny/model --data DIR --out predictions.jsonl
    """
    from clinkd import storage
    from clinkd.config import ConfigError
    from clinkd.stages.outcome import predict_folder

    if not (checkpoint / "config.json").is_file():
        raise ConfigError(f"--checkpoint: {checkpoint} holds no config.json; give a model's folder")
    storage.configure(endpoint_url)
    with cli_data.connected():
        count = predict_folder(checkpoint, data, out, split, batch_size, max_new_tokens, guide, actors)
    typer.echo(f"{count} answers: {out}")


def certify(
    path: Path = typer.Argument(Path("configs/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Hold the configured distillation loss, value and gradient, against a plain float64 one.

    Stage distill does the same before it trains. Exit code 1 if it fails.
    Example: clinkd certify configs/tiny.yaml distill.divergence=jsd compute.precision=bf16
    """
    from clinkd.config import load_config
    from clinkd.stages.certificate import certificate

    found = certificate(load_config(path, overrides))
    typer.echo(json.dumps(found, indent=1) if as_json else console.certificate(found))
    if not found["ok"]:
        raise typer.Exit(1)


def report(
    folder: Path = typer.Argument(..., metavar="RUN", help="A run's folder, as runs/tiny."),
) -> None:
    """Write the report of a finished run again.

    Example: clinkd report runs/tiny
    """
    from clinkd.stages import pipeline

    typer.echo(f"report: {pipeline.report_again(folder)}")


def sweep(
    path: Path = typer.Argument(Path("configs/sweeps/tiny.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
    watch: bool = typer.Option(False, "--watch", help="Only look on: at a sweep that runs elsewhere."),
) -> None:
    """Search the keys in sweep.space with Ray Tune and Optuna; trials share one teacher.

    The same command again goes on with a sweep that was killed. It leaves best.yaml (for clinkd run),
    sweep.json and sweep/study.db (for optuna-dashboard) in the run's folder; of a population, whose settings
    change under way, sweep.json tells them and where the best student lies.
    Example: clinkd sweep configs/sweeps/tiny.yaml sweep.trials=8
    """
    from clinkd.config import load_config
    from clinkd.tune.summary import account, table
    from clinkd.tune.sweep import sweep as search
    from clinkd.tune.watch import watch as look_on

    config = load_config(path, overrides)
    if watch:
        look_on(config)
        return
    swept = search(config)
    typer.echo(table(swept.rows, config.sweep.metrics))
    typer.echo(account(swept.facts))
    if (swept.folder / "best.yaml").is_file():
        typer.echo(f"best: clinkd run {swept.folder}/best.yaml")
    elif swept.rows and swept.rows[0]["model"]:  # a population's: no one configuration made it
        typer.echo(f"best: trial {swept.rows[0]['trial']}, its student lies in {swept.rows[0]['model']}")
    typer.echo(f"page: {swept.folder}/sweep.html")


def ablate(
    path: Path = typer.Argument(Path("configs/sweeps/ablation.yaml"), metavar="[CONFIG]", help="YAML file."),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys."),
    seeds: int = typer.Option(3, min=1, help="Students of each arm."),
) -> None:
    """Show what guided positions, distillation and reflection bring, each alone and all together.

    Five arms of a few students each, in one Ray Tune run over one teacher; all take the same steps. Leaves
    ablation.md and ablation.json in the run's folder. The same command again goes on.
    Example: clinkd ablate configs/sweeps/ablation.yaml --seeds 3
    """
    from clinkd.config import load_config
    from clinkd.tune.ablation import ablate as run_arms
    from clinkd.tune.ablation import table

    typer.echo(table(run_arms(load_config(path, overrides), seeds)))


COMMANDS: tuple[Callable[..., None], ...] = (
    cli_init.init,
    run,
    cli_data.prepare,
    train,
    label,
    predict,
    evaluate,
    compare,
    sweep,
    ablate,
    report,
    certify,
    cli_ops.plan,
    cli_ops.submit,
    cli_ops.doctor,
    cli_data.validate,
    cli_init.config,
)
"""Every command, in the order the help lists them; the name is the function's."""


def _add(group: typer.Typer, command: Callable[..., None]) -> None:
    """A command whose help is its docstring, and whose epilog the examples at its end."""
    text, mark, example = inspect.cleandoc(command.__doc__ or "").partition(EXAMPLE)
    shown = f"\b\n{mark}{example}" if example else None
    group.command(command.__name__, help=text.removesuffix("\b\n").strip(), epilog=shown)(command)


for _command in COMMANDS:
    _add(app, _command)
_data = typer.Typer(help="Look into prepared data.", no_args_is_help=True, rich_markup_mode=None)
_add(_data, cli_data.show)
app.add_typer(_data, name="data", epilog="Example: clinkd data show data/own")


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
        how, code = ("ended by SIGTERM", 0) if terminated() else ("interrupted", 130)
        typer.echo(f"{how}; the same command goes on from here", err=True)
        return code
    except BrokenPipeError:  # the reader of standard output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    from clinkd.artifacts import ArtifactBusy
    from clinkd.config import ConfigError
    from clinkd.data.shards import DataError
    from clinkd.train.crew import TrainingFailed

    if hasattr(error, "format_message"):  # a usage error of typer
        lines = [" ".join(error.format_message().split()) or "no command given; see clinkd --help"]
    elif isinstance(error, (ConfigError, DataError, ArtifactBusy)):
        cause = (
            getattr(error, "cause", None) or error
        )  # what a Ray task raised comes wrapped, traceback and all
        lines = str(cause).splitlines()
    elif isinstance(error, TrainingFailed):
        typer.echo(f"error: {error}", err=True)
        return 1
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
