"""The command line's first step: a configuration for the user's case, and the schema of all of them."""

from __future__ import annotations

from pathlib import Path

import typer


def init(
    folder: Path = typer.Argument(..., metavar="DIR", help="Where config.yaml and its schema go."),
    data: str | None = typer.Option(
        None, "--data", help="A Med-GRIT or ShareGPT file, a folder, prepared data; a path or s3://."
    ),
    images: str | None = typer.Option(
        None, "--images", help="Folder of the images (default: images/ beside)."
    ),
    model: str | None = typer.Option(
        None, "--model", help="Folder of a Qwen2-VL or Qwen2.5-VL checkpoint; none: made here."
    ),
    teacher: str | None = typer.Option(
        None, "--teacher", help="Folder of its teacher; none: the model itself."
    ),
    gpus: int = typer.Option(
        0, "--gpus", min=0, help="GPUs, a training worker each; 0: two workers on CPUs."
    ),
    task: str | None = typer.Option(
        None, "--task", help="recipe, distill, finetune or sweep; none: recipe, finetune with --from."
    ),
    source: Path | None = typer.Option(None, "--from", help="A LLaMA-Factory training file to translate."),
    force: bool = typer.Option(False, "--force", help="Write over what is there."),
) -> None:
    """Write a commented configuration for your case into DIR; asks nothing, starts nothing.

    With --from it says what a LLaMA-Factory file says; each line of it that has no counterpart stands at the
    end, with the reason.

    \b
    Example: clinkd init mine --data data/own --model checkpoints/Qwen2-VL-2B-Instruct --gpus 8
             clinkd init mine --from qwen2vl_lora_sft.yaml --data train.json --images images
    """
    from clinkd import storage
    from clinkd.ops import starter
    from clinkd.ops.llamafactory import translate

    found = translate(source) if source is not None else None
    task = task or ("finetune" if found else "recipe")
    name = starter.name_of(folder)
    path = starter.write(starter.Case(task, name, data, images, model, teacher, gpus, found), folder, force)
    if data is not None and not storage.is_remote(data) and not Path(data).exists():
        typer.echo(f"note: nothing at {data} yet; `clinkd run` looks there", err=True)
    if found is not None:
        typer.echo(f"{found.taken} lines taken, {len(found.left)} without counterpart: see its end", err=True)
    typer.echo(f"{path}: next, `clinkd config {path}` and `clinkd plan {path}`")


def config(
    path: Path | None = typer.Argument(
        None, metavar="CONFIG", help="YAML file; the examples are in configs/.", show_default=False
    ),
    overrides: list[str] = typer.Argument(None, metavar="[k=v ...]", help="Dotted keys, e.g. distill.a=0.7."),
    schema: bool = typer.Option(
        False, "--schema", help="Print JSON Schema of the configuration, for editors."
    ),
    keys: bool = typer.Option(False, "--keys", help="Print every key: type, default, meaning (Markdown)."),
) -> None:
    """Print the whole resolved configuration, or every mistake in it.

    \b
    Example: clinkd config configs/tiny.yaml distill.a=1.0
             clinkd config --schema
             clinkd config --keys
    """
    from clinkd import config_schema
    from clinkd.config import ConfigError, load_config, to_yaml

    if schema or keys:
        if path is not None:
            raise ConfigError(
                "config: --schema and --keys speak of every configuration; give no file with them"
            )
        typer.echo(config_schema.schema_text() if schema else config_schema.markdown(), nl=False)
        return
    if path is None:
        raise ConfigError("config: give a YAML file, --schema or --keys; the examples are in configs/")
    typer.echo(to_yaml(load_config(path, overrides)), nl=False)
