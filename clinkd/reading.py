"""YAML as a configuration is written in it, and what is wrong with it.

Decisions:
- YAML 1.1 reads ``5e-5`` as a string; the loader here reads it as the number that was meant.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class ConfigError(ValueError):
    """A user's mistake: one or more lines of what, where and what to do."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-5 and 1e3 as numbers, as YAML 1.2 does."""


_EXPONENT = re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d+[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


def read_value(text: str) -> Any:
    """One value, as it stands in an override."""
    return yaml.load(text, Loader=_Loader) if text else None


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """A mapping of sections; empty text is an empty one.

    Raises:
        ConfigError: no YAML, or no mapping.
    """
    try:
        value = read_value(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where}: a configuration is a mapping of sections, this is a {type(value).__name__}"
        )
    return value


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``, mappings merged key by key (``sweep.space`` too)."""
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result
