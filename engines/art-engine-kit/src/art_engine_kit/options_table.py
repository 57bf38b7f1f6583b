"""The options of `train` as a table in Markdown, made from `TrainOptions`: `python -m art_engine_kit.options_table`.

Knows fields, their types and ranges; knows no option by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from .train_options import TrainOptions

_KINDS = {bool: "`True`, `False`", int: "whole number", float: "number", Path: "folder"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def options_table(names: Collection[str] = TrainOptions.model_fields) -> str:
    """The table, with a line break at its end; `names` are those options that a backend takes."""
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for name, field in TrainOptions.model_fields.items():
        if name in names:
            default = json.dumps(field.default) if isinstance(field.default, str) else repr(field.default)
            lines.append(f"| `{name}` | `{default}` | {values_of(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def values_of(field: FieldInfo) -> str:
    """What an option takes beside None, in words."""
    (kind,) = _kinds_of(field.annotation)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(kind))
    bounds = [
        f"{sign} {getattr(bound, name)}".replace("-", "−")
        for bound in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(bound, name)
    ]
    return f"{_KINDS[kind]} {' and '.join(bounds)}".strip()


def _kinds_of(annotation: Any) -> list[Any]:
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [kind for kind in kinds if kind is not NoneType]


if __name__ == "__main__":
    print(options_table(), end="")
