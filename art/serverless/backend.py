"""`from art.serverless.backend import ServerlessBackend`: remote training, by art-backend-serverless.

Holds no backend itself; what is missing is named with its pip line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..backends import backend_class

if TYPE_CHECKING:
    ServerlessBackend: Any

__all__ = ["ServerlessBackend"]


def __getattr__(name: str) -> Any:
    if name == "ServerlessBackend":
        return backend_class("serverless")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
