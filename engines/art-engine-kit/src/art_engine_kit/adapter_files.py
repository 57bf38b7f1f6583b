"""Holds a PEFT adapter folder against its base model before any engine sees it: config, names, shapes, rank, values.

An engine takes a wrong width or a NaN without a word and is poisoned by it, so this is the gate. Knows files and numpy;
imports neither PEFT nor torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from art_core.errors import AdapterMismatch

from .base_shapes import LinearShapes
from .checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_KINDS: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_BF16_EXPONENT = 0x7F80


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


def check_adapter(folder: Path, base_shapes: LinearShapes, *, max_rank: int | None = None) -> None:
    """Raise AdapterMismatch, naming the file, module and shapes, unless the adapter in `folder` fits.

    `base_shapes` are `base_weights.linear_shapes` of the base model. Reads the whole adapter: call it off the event
    loop.
    """
    config = read_adapter_config(folder)
    if config.get("use_dora") or config.get("modules_to_save"):
        what = "use_dora" if config.get("use_dora") else "modules_to_save"
        raise AdapterMismatch(
            f"the adapter in {folder} uses {what}, which is not a plain LoRA adapter and is not served."
        )
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise AdapterMismatch(f"{folder / ADAPTER_CONFIG}: r is {rank!r}, not a rank.")
    ranks = {rank, *(config.get("rank_pattern") or {}).values()}
    if max_rank is not None and max(ranks) > max_rank:
        raise AdapterMismatch(
            f"the adapter in {folder} has rank {max(ranks)}, but the engine holds adapters up to rank {max_rank}. Train"
            " with a smaller peft_args['r'], or start the engine with a larger max_lora_rank."
        )
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in _read_tensors(folder):
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterMismatch(
                f"{folder / ADAPTER_WEIGHTS}: {name!r} is no LoRA weight; expected"
                " 'base_model.model.<module>.lora_A.weight' or lora_B."
            )
        shape = tuple(tensor["shape"])
        _check_shape(folder, match["module"], match["side"], shape, base_shapes, ranks)
        _check_finite(folder, name, tensor)
        sides.setdefault(match["module"], {})[match["side"]] = shape
    if not sides:
        raise AdapterMismatch(f"{folder / ADAPTER_WEIGHTS} holds no tensors, so there is nothing to serve.")
    for module, there in sides.items():
        if len(there) != 2:
            raise AdapterMismatch(
                f"the adapter in {folder} has only lora_{next(iter(there))} for {module}; A and B go together."
            )
        if there["A"][0] != there["B"][1]:
            raise AdapterMismatch(
                f"the adapter in {folder}: {module} has lora_A of shape {list(there['A'])} and lora_B of shape"
                f" {list(there['B'])}, whose ranks differ."
            )


def _check_shape(
    folder: Path, module: str, side: str, shape: tuple[int, ...], base_shapes: LinearShapes, ranks: set[int]
) -> None:
    if module not in base_shapes:
        raise AdapterMismatch(
            f"the adapter in {folder} has weights for {module!r}, a module that its base model does not have. Is it an"
            " adapter of another base model?"
        )
    out_features, in_features = base_shapes[module]
    # A is [r, in], B is [out, r].
    width, rank_at, expected = (1, 0, f"[r, {in_features}]") if side == "A" else (0, 1, f"[{out_features}, r]")
    if len(shape) != 2 or shape[width] != (in_features if side == "A" else out_features):
        raise AdapterMismatch(
            f"the adapter in {folder} does not fit its base model: {module}.lora_{side} has shape {list(shape)} where"
            f" {expected} is needed."
        )
    if shape[rank_at] not in ranks:
        raise AdapterMismatch(
            f"the adapter in {folder}: {module}.lora_{side} has shape {list(shape)}, but its config says rank"
            f" {', '.join(map(str, sorted(ranks)))}."
        )


def _read_tensors(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    file = folder / ADAPTER_WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterMismatch(
            f"{folder} holds adapter_model.bin, which can run code when it is read. Save it as safetensors:"
            " PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
        )
    try:
        return list(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise AdapterMismatch(f"{file} cannot be read, so it is missing, empty or cut short: {error}") from error


def _check_finite(folder: Path, name: str, tensor: dict[str, Any]) -> None:
    kind = _KINDS.get(tensor["dtype"])
    if kind is None:
        raise AdapterMismatch(
            f"{folder / ADAPTER_WEIGHTS}: {name} is {tensor['dtype']}; expected one of {', '.join(_KINDS)}."
        )
    values = np.frombuffer(tensor["data"], kind)
    # numpy has no bfloat16: such a number is not finite exactly when all bits of its exponent are set.
    bf16 = tensor["dtype"] == "BF16"
    wrong = (values & _BF16_EXPONENT) == _BF16_EXPONENT if bf16 else ~np.isfinite(values)
    count = int(np.count_nonzero(wrong))
    if count:
        raise AdapterMismatch(
            f"{folder / ADAPTER_WEIGHTS}: {name} has {count} of {values.size} values that are not finite (NaN or"
            " infinite). The step diverged: a lower learning rate or gradient clipping helps."
        )
