"""What a PEFT adapter folder says about itself. Reads one JSON file and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from art_core.errors import AdapterMismatch
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. Raises AdapterMismatch when it is missing, broken or not LoRA's."""
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterMismatch(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterMismatch(f"{file}: peft_type is {kind!r}; only LoRA adapters are served and trained.")
    return config


def base_model_of_adapter(folder: Path) -> str:
    """The base model's name or folder that a PEFT adapter says it is for. Raises AdapterMismatch when it says none."""
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterMismatch(
            f"{folder / ADAPTER_CONFIG} does not say its base model (base_model_name_or_path). Put the base model's"
            " name or folder there."
        )
    return name
