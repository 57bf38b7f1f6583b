"""Step 0: an adapter that changes nothing (A random, B zero), so that the untrained model is served like any other
step.

Knows PEFT's file format and the initialisation of LoRA; imports neither PEFT nor torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from art_engine_kit.base_shapes import SEVEN_PROJECTIONS, LinearShapes, linear_shapes, select_modules
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, saving

from ..wire.lora_shape import LoraShape

PEFT_PREFIX = "base_model.model."


def write_identity_adapter(folder: Path, base_model: Path, lora: LoraShape) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into an existing folder, in float32.

    A is uniform in ±1/√in_features, which is Kaiming's with a = √5 as PEFT draws it; B is zero.
    """
    shapes = linear_shapes(base_model)
    targets = _targets(shapes, lora)
    generator = np.random.default_rng(lora.random_state)
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for module in select_modules(shapes, targets):
        out_features, in_features = shapes[module]
        bound = 1 / math.sqrt(in_features)
        a = generator.uniform(-bound, bound, (lora.r, in_features)).astype(np.float32)
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = np.zeros((out_features, lora.r), np.float32)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": lora.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def save_step_zero(destination: Path, base_model: Path, lora: LoraShape) -> None:
    """Save the identity adapter as the whole checkpoint of step 0 at `destination`."""
    with saving(destination, step=0, base_model=str(base_model), engine="local") as folder:
        write_identity_adapter(folder, base_model, lora)


def _targets(shapes: LinearShapes, lora: LoraShape) -> str | tuple[str, ...]:
    if lora.target_modules is not None:
        return lora.target_modules
    there = {module.rpartition(".")[2] for module in shapes}
    found = tuple(name for name in SEVEN_PROJECTIONS if name in there)
    if not found:
        raise ValueError(
            f"the base model has none of {', '.join(SEVEN_PROJECTIONS)}; say which modules the adapter is for with"
            " _internal_config={'peft_args': {'target_modules': [...]}}. It has:"
            f" {', '.join(sorted(there)) or 'none'}."
        )
    return found
