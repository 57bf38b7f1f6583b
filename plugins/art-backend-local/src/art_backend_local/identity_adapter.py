"""Step 0: an adapter that changes nothing (A random, B zero), so that the untrained model is served like any other
step.

Knows PEFT's file format and the initialisation of LoRA; imports neither PEFT nor torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from art_core import UnknownArgument
from art_core.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, saving

from .base_weights import SEVEN_PROJECTIONS, LinearShapes, linear_shapes, select_modules

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """What `peft_args` decides about a new adapter; the names are PEFT's.

    `random_state` seeds A. `bias` and `lora_dropout` are taken only at the values that do nothing.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | tuple[str, ...] | None = None
    use_rslora: bool = False
    random_state: int = 3407
    lora_dropout: float = 0.0
    bias: str = "none"

    @classmethod
    def of(cls, peft_args: Mapping[str, Any]) -> LoraShape:
        """Read `peft_args`. Raises UnknownArgument for a name that nothing reads, ValueError for a value."""
        known = tuple(cls.__dataclass_fields__)
        for name in peft_args:
            if name not in known:
                raise UnknownArgument(name, where="_internal_config['peft_args']", known=known)
        given = dict(peft_args)
        if isinstance(given.get("target_modules"), list | set | tuple):
            given["target_modules"] = tuple(sorted(map(str, given["target_modules"])))
        shape = cls(**given)
        if not isinstance(shape.r, int) or shape.r < 1:
            raise ValueError(f"peft_args: r is the rank, a whole number of at least 1, not {shape.r!r}.")
        if not shape.lora_alpha > 0:
            raise ValueError(f"peft_args: lora_alpha must be positive, not {shape.lora_alpha!r}.")
        if shape.lora_dropout or shape.bias != "none":
            raise ValueError(
                "peft_args: the local backend trains with lora_dropout=0 and bias='none' only, since the served policy"
                " and the trained one must be the same; leave both out."
            )
        return shape


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
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1))


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
