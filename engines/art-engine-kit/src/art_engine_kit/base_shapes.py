"""The shapes of a base model's linear layers, read from the headers of its safetensors files.

Reads headers only, so a model of any size takes milliseconds. Knows nothing of adapters and imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from art_core.errors import BaseModelNotFound

SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# No LoRA engine puts an adapter on the table of embeddings by "all-linear", nor on the output matrix.
NOT_LINEAR = ("embed_tokens", "lm_head", "wte", "wpe")

LinearShapes = Mapping[str, tuple[int, int]]


def linear_shapes(base_model: Path) -> dict[str, tuple[int, int]]:
    """(out features, in features) of every two-dimensional weight, by module path such as
    `model.layers.0.self_attn.q_proj`.

    Raises BaseModelNotFound when the folder holds no safetensors weights or their headers cannot be read.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for file in weight_files(base_model):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    shape = tensors.get_slice(name).get_shape()
                    if len(shape) == 2 and name.endswith(".weight"):
                        shapes[name.removesuffix(".weight")] = (shape[0], shape[1])
        except (OSError, SafetensorError) as error:
            raise BaseModelNotFound(
                f"the weights {file} cannot be read: {error}. Fetch the base model again."
            ) from error
    return dict(sorted(shapes.items(), key=lambda item: _natural(item[0])))


def select_modules(shapes: LinearShapes, targets: str | Iterable[str]) -> list[str]:
    """The modules that a new adapter's `target_modules` names, as PEFT reads it: see `named_modules`.

    Raises ValueError naming a target that fits no module, with the names that there are.
    """
    linear = [module for module in shapes if not _is_an_end(module)]
    if isinstance(targets, str):
        chosen = named_modules(linear, targets)
        missing = [] if chosen else [targets]
    else:
        wanted = tuple(targets)
        chosen = named_modules(linear, wanted)
        missing = [target for target in wanted if not named_modules(linear, (target,))]
    if missing:
        there = ", ".join(sorted({module.rpartition(".")[2] for module in linear})) or "none"
        raise ValueError(
            f"target_modules names {', '.join(map(repr, missing))}, which the base model has not; it has: {there}."
        )
    return chosen


def named_modules(modules: Iterable[str], targets: str | Collection[str]) -> list[str]:
    """Those of `modules` that `targets` names, as PEFT reads it: a list of whole paths or endings of paths,
    "all-linear", or a regular expression for the whole path.
    """
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return [module for module in modules if not _is_an_end(module)]
        return [module for module in modules if re.fullmatch(targets, module)]
    return [m for m in modules if m in targets or any(m.endswith(f".{target}") for target in targets)]


def _is_an_end(module: str) -> bool:
    return module.rpartition(".")[2] in NOT_LINEAR


def weight_files(base_model: Path) -> list[Path]:
    """The safetensors files of a base model. Raises BaseModelNotFound when one is missing or none is there."""
    index = base_model / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise BaseModelNotFound(f"{index} cannot be read: {error!r}. Fetch the base model again.") from error
        files = [base_model / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BaseModelNotFound(f"{base_model} lacks {', '.join(missing)}, which its index names.")
        return files
    files = sorted(base_model.glob("*.safetensors"))
    if not files:
        raise BaseModelNotFound(
            f"{base_model} holds no *.safetensors weights, which serving and training need. If it holds"
            " pytorch_model.bin, save it again with `model.save_pretrained(folder)` of transformers."
        )
    return files


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
