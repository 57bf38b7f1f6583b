"""Keyword arguments read into a model: an unknown name and a bad value are told in words that name the call.

Knows pydantic; knows no option.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from art_core.errors import UnknownArgument


class KeywordOptions(BaseModel):
    """The keyword arguments of one method. Numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, arguments: dict[str, Any], *, where: str) -> Self:
        """Read keyword arguments. Raises UnknownArgument for one that nothing reads, ValueError for a bad value."""
        for name in arguments:
            if name not in cls.model_fields:
                raise UnknownArgument(name, where=where, known=cls.model_fields)
        try:
            return cls(**arguments)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{where}: {wrong}") from error
