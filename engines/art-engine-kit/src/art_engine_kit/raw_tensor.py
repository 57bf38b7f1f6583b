"""A tensor as it lies in a file: its kind, its shape and its bytes, and what they are as 32-bit floats.

Numpy has no bfloat16, and no more than this is needed of a tensor where torch isn't. Knows no file and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# By the names of safetensors; a bfloat16 is the upper half of a 32-bit float.
KINDS: Final[dict[str, Any]] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class RawTensor:
    """`kind` is safetensors' name of the type of its numbers; `data` holds them in row-major order, little-endian."""

    kind: str
    shape: tuple[int, ...]
    data: bytes | bytearray = field(repr=False)

    def float32(self) -> NDArray[np.float32]:
        """Its values; what lies outside the range of a 32-bit float becomes infinite."""
        values: NDArray[Any] = np.frombuffer(self.data, KINDS[self.kind]).reshape(self.shape)
        if self.kind == "F32":
            return values
        if self.kind == "BF16":
            return (values.astype("<u4") << 16).view("<f4")
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
