"""Holds the adapter settings a job asks for against those of the checkpoint it starts from.

An adapter's shape is fixed when it is made; a later wish for another one is an error, never silently ignored. A backend
asks the same when a model is registered; this is the worker's own look. What the settings mean is the kit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from art_engine_kit.adapter_config import read_adapter_config
from art_engine_kit.lora_shape import check_asked


def check_peft_args(peft_args: Mapping[str, Any], start: Path) -> None:
    """Raise UnknownArgument for a setting nothing reads, ValueError for one that can't be, AdapterMismatch for one that
    the start checkpoint does not have.
    """
    if peft_args:
        check_asked(peft_args, read_adapter_config(start), where=start)
