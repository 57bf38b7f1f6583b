"""Step 0: an adapter that changes nothing (A random, B zero), so that the untrained model is served like any other
step.

Knows the initialisation of LoRA; imports neither PEFT nor torch.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import Float32, write_adapter
from art_engine_kit.base_shapes import SEVEN_PROJECTIONS, LinearShapes, linear_shapes, select_modules
from art_engine_kit.checkpoint_folder import saving
from art_engine_kit.lora_shape import LoraShape


def write_identity_adapter(folder: Path, base_model: Path, lora: LoraShape) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into an existing folder, in float32.

    A is uniform in ±1/√in_features, which is Kaiming's with a = √5 as PEFT draws it; B is zero.
    """
    shapes = linear_shapes(base_model)
    targets = _targets(shapes, lora)
    generator = np.random.default_rng(lora.random_state)
    pairs: dict[str, tuple[Float32, Float32]] = {}
    for module in select_modules(shapes, targets):
        out_features, in_features = shapes[module]
        bound = 1 / math.sqrt(in_features)
        a = generator.uniform(-bound, bound, (lora.r, in_features)).astype(np.float32)
        pairs[module] = a, np.zeros((out_features, lora.r), np.float32)
    config = AdapterConfig(
        base_model_name_or_path=str(base_model),
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        target_modules=targets,
    )
    write_adapter(folder, config, pairs)


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
