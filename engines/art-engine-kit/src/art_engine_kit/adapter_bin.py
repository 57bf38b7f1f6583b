"""Reads adapter_model.bin, the older file of PEFT's weights, which torch writes: plain tensors by name, and no code.

It is a zip of one pickle and one file of bytes a tensor. A pickle can call anything, so only the few names that plain
tensors need are known here, none of which does more than keep what it is told. Imports no torch.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from art_core.errors import AdapterMismatch

from .raw_tensor import KINDS, RawTensor

ADAPTER_BIN = "adapter_model.bin"
# torch's storage classes, and safetensors' name of what they hold.
_STORAGES: Final[Mapping[str, str]] = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
}
_SAVE_ANEW: Final = (
    "Save the adapter as safetensors: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
)


class _Storage(NamedTuple):
    kind: str
    key: str
    numbers: int


class _Tensor(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    strides: Any


def read_adapter_bin(file: Path) -> list[tuple[str, RawTensor]]:
    """The tensors of the file, by name. Raises AdapterMismatch when it holds anything else, or isn't whole.

    Nothing that the file says is run.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _read(archive)
    except FileNotFoundError as error:
        raise AdapterMismatch(f"{file} is missing.") from error
    except _NotPlain as error:
        raise AdapterMismatch(f"{file} {error}, so it is not read. {_SAVE_ANEW}") from error
    except Exception as error:
        # Whatever a broken or hostile pickle makes the unpickler raise.
        raise AdapterMismatch(f"{file} is not a whole file of torch weights: {error!r}. {_SAVE_ANEW}") from error


class _NotPlain(Exception):
    """The file holds something other than plain tensors."""


def _read(archive: zipfile.ZipFile) -> list[tuple[str, RawTensor]]:
    (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    folder = pickled.removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise _NotPlain("is compressed, as torch never writes it")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise _NotPlain("was written on a big-endian machine")
    state = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    if not isinstance(state, dict):
        raise _NotPlain(f"holds a {type(state).__name__} where weights by name are expected")
    found = []
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _NotPlain(f"holds {name!r}, which is no tensor")
        found.append((name, _raw(archive, folder, tensor)))
    return found


def _raw(archive: zipfile.ZipFile, folder: str, tensor: _Tensor) -> RawTensor:
    storage, offset, shape, strides = tensor
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _NotPlain("holds a tensor that is not a plain one")
    values = np.frombuffer(archive.read(f"{folder}data/{storage.key}"), KINDS[storage.kind])
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if 0 in shape or last >= len(values) or math.prod(shape) > len(values):
        raise _NotPlain("holds a tensor that reaches beyond its own bytes")
    seen = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [stride * values.itemsize for stride in strides], writeable=False
    )
    return RawTensor(storage.kind, tuple(shape), bytearray(np.ascontiguousarray(seen).tobytes()))


class _Unpickler(pickle.Unpickler):
    """Knows the names that torch writes for plain tensors, and gives records of our own for them."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle. Raises _NotPlain for any that a plain tensor doesn't need."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _the_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise _NotPlain(f"asks for {module}.{name}, which plain weights don't need and which could run code")

    def persistent_load(self, pid: Any) -> _Storage:
        """A tensor's bytes: ("storage", what it holds, the name of its file, where it was, how many numbers)."""
        what, kind, key, _, numbers = pid
        if what != "storage" or kind not in KINDS or not isinstance(key, str) or not key.isalnum():
            raise _NotPlain("refers to something that is no plain tensor's bytes")
        return _Storage(kind, key, numbers)


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _the_tensor(tensor: Any, *_: Any) -> Any:
    return tensor
