"""The configuration told from its schema: keys in order, a table of them, JSON Schema for editors.

Decisions:
- A key's meaning stands once, in its field's description: ``docs/config.md``, what ``clinkd init`` writes and
  the schema that editors read are made of it.
- JSON Schema knows one key more than the model: ``base``, which ``load_config`` takes away. What only a
  validator knows (two keys that contradict each other) it does not say; ``clinkd config FILE`` does.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from clinkd.config import RunConfig
from clinkd.config_model import Section

SCHEMA_FILE = "clinkd.schema.json"
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration: ``name`` dotted, ``type`` and ``default`` as one reads them."""

    name: str
    type: str
    default: str
    meaning: str


def sections() -> dict[str, str]:
    """The sections in order, each with what its field or its class says of it."""
    return {
        name: field.description or (_section_of(field.annotation).__doc__ or "").strip()
        for name, field in RunConfig.model_fields.items()
    }


@functools.cache
def keys() -> tuple[Key, ...]:
    """Every key in the schema's order; a section that may be left out gives its keys too."""
    return tuple(_keys(RunConfig, "", RunConfig()))


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a configuration file, as editors and ``jsonschema`` read it."""
    schema = RunConfig.model_json_schema()
    base = {"type": "string", "description": "another file to start from, relative to this one"}
    return schema | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "clinkd configuration",
        "properties": {"base": base} | schema["properties"],
    }


def schema_text() -> str:
    """``json_schema`` as a file."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def markdown() -> str:
    """The page of all keys, ``docs/config.md``."""
    lines = [
        "# Every key of the configuration",
        "",
        "Made by `clinkd config --keys` from the schema; edit a field's description, not this page. A key is",
        "written dotted on the command line (`distill.a=1.0`) and nested in YAML; `base: FILE` starts from",
        "another file. `clinkd config FILE` prints the whole resolved configuration, or every mistake in it;",
        "`clinkd config --schema` prints JSON Schema for an editor. Where a meaning says *none*, YAML has",
        "`null` and the command line nothing: `evaluate.limit=`.",
    ]
    every = keys()
    for name, said in sections().items():
        lines += ["", f"## {name}", "", said, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key) for key in every if key.name.split(".")[0] == name]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    cells = [f"`{key.name}`", key.type, key.default and f"`{key.default}`", key.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def _keys(section: type[Section], prefix: str, given: Section | None) -> Iterator[Key]:
    """Keys of ``section``, with the defaults of ``given``: two sections of a class may differ in them."""
    for name, field in section.model_fields.items():
        value = field.default if given is None else getattr(given, name)
        inner = _section_of(field.annotation)
        plain = inner is not None and isinstance(field.annotation, type)
        if not plain:
            yield Key(prefix + name, _type(field), _written(value), field.description or "")
        if inner is None:
            continue
        if get_origin(field.annotation) is dict:
            yield from _keys(inner, f"{prefix}{name}.KEY.", None)
        else:
            yield from _keys(inner, f"{prefix}{name}.", value if plain else inner())


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds, also where it may be none or holds several by name."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return " ".join([_named(field.annotation), ", ".join(bounds)]).strip()


def _named(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(kind) for kind in inner)
    if origin in (list, tuple):
        return f"list of {_named(inner[0])}"
    if origin is dict:
        return f"mapping of {_named(inner[1])}"
    if annotation is type(None):
        return "null"
    if _section_of(annotation) is not None:
        return "section"
    return "any" if annotation is Any else annotation.__name__


def _written(value: Any) -> str:
    """A default as YAML has it on one line; nothing where a key has to be given."""
    if value is PydanticUndefined:
        return ""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
