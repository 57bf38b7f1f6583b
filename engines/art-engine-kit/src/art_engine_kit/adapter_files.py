"""Reads a PEFT adapter folder, judges whether it fits its base model, and writes one.

An engine takes a wrong width or a NaN without a word and is poisoned by it, so this is the gate: whoever serves or
trains an adapter reads it here. Knows files and numpy; imports neither PEFT nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from art_core.errors import AdapterMismatch

from .adapter_bin import ADAPTER_BIN, read_adapter_bin
from .adapter_config import AdapterConfig, read_adapter_config
from .base_shapes import LinearShapes
from .checkpoint_folder import ADAPTER_WEIGHTS
from .raw_tensor import KINDS, RawTensor
from .system_errors import as_os_error

PEFT_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
Float32 = NDArray[np.float32]


class Pair(NamedTuple):
    """The two matrices of one module, as they are in the file: A [rank, in features], B [out features, rank]."""

    a: RawTensor
    b: RawTensor


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content; `pairs` are by the module's path in the base model."""

    folder: Path
    config: AdapterConfig
    pairs: Mapping[str, Pair]

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(self.config.rank(module) for module in self.pairs)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and weights, from adapter_model.safetensors or from PEFT's older adapter_model.bin.

    Raises AdapterMismatch, naming file and tensor, for what is no whole LoRA adapter. Its cause is a FileNotFoundError
    where a file is not there. Reads the whole adapter: call it off the event loop.
    """
    config = read_adapter_config(folder)
    file = weights_file(folder)
    found: dict[str, dict[str, RawTensor]] = {}
    for name, tensor in _read_tensors(file):
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterMismatch(
                f"{file}: {name!r} is no LoRA weight of a linear layer; expected"
                " 'base_model.model.<module>.lora_A.weight' or lora_B. Such an adapter is not served; train one"
                " without."
            )
        if tensor.kind not in KINDS:
            raise AdapterMismatch(
                f"{file}: {name} is {tensor.kind}; expected one of {', '.join(KINDS)}. Save it in one of these."
            )
        found.setdefault(match["module"], {})[match["side"]] = tensor
    if not found:
        raise AdapterMismatch(f"{file} holds no LoRA weights (no tensors), so there is nothing to serve.")
    for module, sides in found.items():
        if len(sides) != 2:
            raise AdapterMismatch(f"{file} has only lora_{next(iter(sides))} for {module}; A and B go together.")
    # A file's order is its writer's; what is said of an adapter is not to depend on it.
    pairs = {module: Pair(sides["A"], sides["B"]) for module, sides in sorted(found.items())}
    return Adapter(folder, config, pairs)


def check_adapter(folder: Path, base_shapes: LinearShapes, *, max_rank: int | None = None) -> Adapter:
    """Read the adapter in `folder` and give it, once it is known to fit: see `read_adapter` and `judge_adapter`."""
    adapter = read_adapter(folder)
    judge_adapter(adapter, base_shapes, max_rank=max_rank)
    return adapter


def judge_adapter(adapter: Adapter, base_shapes: LinearShapes, *, max_rank: int | None = None) -> None:
    """Raise AdapterMismatch, naming module and shapes, unless an adapter fits its base and holds only finite values.

    `base_shapes` are `base_shapes.linear_shapes` of the base model; `max_rank` is the largest rank that will be taken.
    """
    folder, config = adapter.folder, adapter.config
    strangers = [module for module in adapter.pairs if module not in base_shapes]
    if strangers:
        raise AdapterMismatch(
            f"the adapter in {folder} has weights for {strangers[0]!r}, a module that its base model does not have. Is"
            " it an adapter of another base model?"
        )
    _check_modules(adapter, config.modules(base_shapes))
    if max_rank is not None and adapter.rank > max_rank:
        raise AdapterMismatch(
            f"the adapter in {folder} has rank {adapter.rank}, but the engine holds adapters up to rank {max_rank}."
            " Train with a smaller peft_args['r'], or start the engine with a larger max_lora_rank."
        )
    # A sum that tells whether all of a matrix is finite may overflow by itself.
    with np.errstate(over="ignore", invalid="ignore"):
        for module, pair in adapter.pairs.items():
            rank, (out_features, in_features) = config.rank(module), base_shapes[module]
            for side, tensor, wanted in (("A", pair.a, (rank, in_features)), ("B", pair.b, (out_features, rank))):
                if tensor.shape != wanted:
                    raise AdapterMismatch(
                        f"the adapter in {folder} does not fit: {module}.lora_{side} has shape {list(tensor.shape)}"
                        f" where {list(wanted)} is needed, {rank} being its rank by the config. Is it an adapter of"
                        " another base model?"
                    )
                _check_finite(adapter, f"{module}.lora_{side}", tensor.float32())


def weights_file(folder: Path) -> Path:
    """The file of an adapter's weights: adapter_model.safetensors, or adapter_model.bin where only that is there."""
    file = folder / ADAPTER_WEIGHTS
    older = folder / ADAPTER_BIN
    return older if older.exists() and not file.exists() else file


def write_adapter(folder: Path, config: AdapterConfig, pairs: Mapping[str, tuple[Float32, Float32]]) -> None:
    """Write an adapter's two files into an existing folder: A and B by the module's path in the base model."""
    tensors: dict[str, Any] = {}
    for module, (a, b) in pairs.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    with as_os_error(folder / ADAPTER_WEIGHTS):
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.write(folder)


def _check_modules(adapter: Adapter, wanted: list[str]) -> None:
    """The modules that the weights are for must be those that the config names, or PEFT would pass some over."""
    beyond = sorted(adapter.pairs.keys() - set(wanted))
    if beyond:
        raise AdapterMismatch(
            f"the adapter in {adapter.folder} has weights for {beyond[0]}, which the target_modules of its config do"
            " not name, so PEFT would pass them over. Add it to target_modules, or take the weights out."
        )
    missing = [module for module in wanted if module not in adapter.pairs]
    if missing:
        raise AdapterMismatch(
            f"the adapter in {adapter.folder} lacks weights for {missing[0]}, which the target_modules of its config"
            f" name ({len(missing)} missing). Is it an adapter of another base model?"
        )


def _read_tensors(file: Path) -> list[tuple[str, RawTensor]]:
    if file.name == ADAPTER_BIN:
        return read_adapter_bin(file)
    try:
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError as error:
        raise AdapterMismatch(f"{file.parent} has no {ADAPTER_WEIGHTS}: the weights are missing.") from error
    except (OSError, SafetensorError) as error:
        raise AdapterMismatch(
            f"{file} is not a whole safetensors file, it is empty or cut short: {error}. Copy or save it again."
        ) from error
    return [(name, RawTensor(t["dtype"], tuple(t["shape"]), t["data"])) for name, t in tensors]


def _check_finite(adapter: Adapter, name: str, values: Float32) -> None:
    if np.isfinite(np.add.reduce(values, axis=None)):
        return
    count = int(np.count_nonzero(~np.isfinite(values)))
    if count:
        raise AdapterMismatch(
            f"{weights_file(adapter.folder)}: {name} has {count} of {values.size} values that are not finite (NaN or"
            " infinite). The step diverged: a lower learning rate or gradient clipping helps."
        )
