"""Where a model starts: at its latest checkpoint, at a PEFT adapter the user gave, or at an adapter that changes
nothing.

Writes step 0 when there is no checkpoint, and refuses settings that what is there wasn't made with. Knows files; knows
no engine.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from art_engine_kit.adapter_config import read_adapter_config
from art_engine_kit.adapter_files import Adapter, check_adapter, write_adapter
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.checkpoint_folder import saving, whole_steps
from art_engine_kit.lora_shape import LoraShape, check_asked
from art_engine_kit.model_folder import ModelFolder

from ..wire.messages import RegisterRequest
from .identity import save_step_zero


def save_starting_point(folder: ModelFolder, request: RegisterRequest, shapes: LinearShapes) -> list[str]:
    """Make step 0 of a model that has no whole checkpoint. Gives sentences for the user on what it does otherwise than
    the given adapter says.

    Raises AdapterMismatch when the given adapter doesn't fit the base, or what is there not the settings; ValueError
    when the model was made with another base.
    """
    _check_base(folder, request)
    adapter = None if request.adapter_folder is None else check_adapter(request.adapter_folder, shapes)
    check_settings(folder, request, shapes)
    if whole_steps(folder.checkpoints):
        return []
    start, base = folder.checkpoint(0).path, request.deployment.base_folder
    if adapter is None:
        save_step_zero(start, base, LoraShape.of(request.deployment.settings.adapter.peft_args))
        return []
    with saving(start, step=0, base_model=str(base), engine="local") as temporary:
        pairs = {module: (pair.a.float32(), pair.b.float32()) for module, pair in adapter.pairs.items()}
        write_adapter(temporary, adapter.config, pairs)
    return _taken_otherwise(request, adapter)


def check_settings(folder: ModelFolder, request: RegisterRequest, modules: Collection[str]) -> None:
    """Hold the adapter's settings against the checkpoint that the model goes on from, or the adapter it starts from.

    `modules` are the base model's. Raises AdapterMismatch: a worker would raise it after the rollouts.
    """
    there = whole_steps(folder.checkpoints)
    source = there[max(there)] if there else request.adapter_folder
    asked = request.deployment.settings.adapter.peft_args
    if source is not None and asked:
        check_asked(asked, read_adapter_config(source), where=source, modules=modules)


def _taken_otherwise(request: RegisterRequest, adapter: Adapter) -> list[str]:
    dropout = adapter.config.lora_dropout
    if not dropout:
        return []
    return [
        f"{request.key}: the adapter {adapter.folder} was trained with lora_dropout={dropout:g}, which is taken as 0"
        " from here on, since the policy that is trained must be the one that is served. Step 0 says 0.0."
    ]


def _check_base(folder: ModelFolder, request: RegisterRequest) -> None:
    try:
        known = json.loads(folder.description.read_bytes())
        base_model, base_folder = str(known["base_model"]), str(known["base_folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    asked = request.deployment
    if base_model != asked.base_model and base_folder != str(asked.base_folder):
        raise ValueError(
            f"{request.key} was made with base_model={base_model!r} and cannot go on with {asked.base_model!r}: its"
            " adapters belong to the first. Use another model name."
        )
