"""Holds the adapter settings a job asks for against those of the checkpoint it starts from.

An adapter's shape is fixed when it is made; a later wish for another one is an error, never silently ignored. Knows the
names of PEFT's LoRA settings and one JSON file; imports no PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from art_core.errors import AdapterMismatch, CorruptCheckpoint, UnknownArgument
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG

_SHAPE = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora")
# Used when the adapter is made: nothing to hold against it afterwards.
_MAKING = ("random_state",)


def check_peft_args(peft_args: Mapping[str, Any], start: Path) -> None:
    """Raise UnknownArgument for a setting nothing reads, AdapterMismatch for one that the start checkpoint does not
    have.
    """
    for name in peft_args:
        if name not in (*_SHAPE, *_MAKING):
            raise UnknownArgument(name, where="peft_args", known=(*_SHAPE, *_MAKING))
    try:
        config = json.loads((start / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{start / ADAPTER_CONFIG} cannot be read: {error}") from error
    for name in _SHAPE:
        if name in peft_args and _plain(peft_args[name]) != _plain(config.get(name)):
            raise AdapterMismatch(
                f"peft_args asks for {name}={peft_args[name]!r}, but the adapter in {start} was made with"
                f" {config.get(name)!r}. An"
                " adapter keeps its shape for all its steps; use another model name for another shape."
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set | frozenset) else value
