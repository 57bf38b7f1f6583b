"""What `peft_args` says: the shape of a new adapter, or the shape that an adapter which is there is expected to have.

Knows PEFT's names and nothing of weights. `art.dev.PeftArgs` is the same list, as a user writes it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from art_core.errors import AdapterMismatch, UnknownArgument

from .adapter_config import AdapterConfig
from .base_shapes import named_modules

_PEFT_ARGS = "_internal_config['peft_args']"


def _sorted_names(value: object) -> object:
    return tuple(sorted(map(str, value))) if isinstance(value, list | set | frozenset | tuple) else value


class LoraShape(BaseModel):
    """What `peft_args` decides about a new adapter; the names are PEFT's.

    `target_modules` None means the seven projections of a decoder layer. `random_state` seeds A. `bias` and
    `lora_dropout` are taken only at the values that do nothing.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(16, gt=0)
    target_modules: Annotated[str | tuple[str, ...] | None, Field(min_length=1), BeforeValidator(_sorted_names)] = None
    use_rslora: bool = False
    random_state: int = 3407
    lora_dropout: float = 0.0
    bias: str = "none"

    @classmethod
    def of(cls, peft_args: Mapping[str, Any]) -> Self:
        """Read `peft_args`. Raises UnknownArgument for a name that nothing reads, ValueError for a value."""
        for name in peft_args:
            if name not in cls.model_fields:
                raise UnknownArgument(name, where=_PEFT_ARGS, known=cls.model_fields)
        if peft_args.get("lora_dropout") or peft_args.get("bias", "none") != "none":
            raise ValueError(
                "peft_args: adapters are trained with lora_dropout=0 and bias='none' only, since the served policy and"
                " the trained one must be the same; leave both out."
            )
        try:
            return cls(**peft_args)
        except ValidationError as error:
            first = error.errors()[0]
            name, words = str(first["loc"][0]), re.sub("^(Input|Value) should", "must", first["msg"])
            raise ValueError(f"{_PEFT_ARGS}[{name!r}]={peft_args[name]!r} {words}.") from error


def check_asked(
    peft_args: Mapping[str, Any], config: AdapterConfig, *, where: Path, modules: Collection[str] | None = None
) -> None:
    """Raise AdapterMismatch for a setting that `peft_args` asks for and the adapter at `where` was made without.

    `modules` are the base model's, by which lists, patterns and "all-linear" are told to choose the same; without
    them lists are compared by their names, and nothing is said of the others. What is left out of `peft_args` is not
    asked for. Raises as `LoraShape.of` does.
    """
    shape = LoraShape.of(peft_args)
    for name in ("r", "lora_alpha", "use_rslora", "target_modules"):
        if name not in peft_args or peft_args[name] is None:
            continue
        asked, made = getattr(shape, name), getattr(config, name)
        same = asked == made if name != "target_modules" else _same_modules(asked, config, modules)
        if not same:
            raise AdapterMismatch(
                f"peft_args asks for {name}={peft_args[name]!r}, but the adapter in {where} was made with {made!r}. An"
                " adapter keeps its shape for all its steps: leave it out of peft_args, or use another model name."
            )


def _same_modules(asked: str | tuple[str, ...], config: AdapterConfig, modules: Collection[str] | None) -> bool:
    if modules is not None:
        return set(named_modules(modules, asked)) == set(config.modules(modules))
    made = config.target_modules
    return isinstance(asked, str) or isinstance(made, str) or set(asked) == set(made)
