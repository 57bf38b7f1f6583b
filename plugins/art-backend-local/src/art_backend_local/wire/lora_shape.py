"""What `peft_args` decides about a new adapter. Knows PEFT's names and nothing of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from art_core.errors import UnknownArgument


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
