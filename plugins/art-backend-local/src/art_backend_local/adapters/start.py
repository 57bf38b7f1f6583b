"""Where a model starts: at its latest checkpoint, at a PEFT adapter the user gave, or at an adapter that changes
nothing.

Writes step 0 when there is no checkpoint. Knows files; knows no engine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, saving, step_folder, whole_steps

from ..wire.lora_shape import LoraShape
from ..wire.messages import RegisterRequest
from .identity import save_step_zero


def save_starting_point(folder: Path, request: RegisterRequest, shapes: LinearShapes) -> None:
    """Make step 0 of a model that has no whole checkpoint.

    Raises AdapterMismatch when the given adapter doesn't fit the base, ValueError when the model was made with another
    base.
    """
    checkpoints = folder / "checkpoints"
    _check_base(folder, request)
    if request.adapter_folder is not None:
        check_adapter(request.adapter_folder, shapes)
    if whole_steps(checkpoints):
        return
    start = step_folder(checkpoints, 0)
    if request.adapter_folder is None:
        save_step_zero(start, request.base_folder, LoraShape.of(request.settings.adapter.peft_args))
        return
    with saving(start, step=0, base_model=str(request.base_folder), engine="local") as temporary:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(request.adapter_folder / name, temporary / name)


def _check_base(folder: Path, request: RegisterRequest) -> None:
    try:
        known = json.loads((folder / "model.json").read_bytes())
        base_model, base_folder = str(known["base_model"]), str(known["base_folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if base_model != request.base_model and base_folder != str(request.base_folder):
        raise ValueError(
            f"{request.key} was made with base_model={base_model!r} and cannot go on with {request.base_model!r}: its"
            " adapters belong to the first. Use another model name."
        )
