"""`from art.local import LocalBackend`: the backend that runs on this machine, from the distribution art-backend-local.

Holds no backend itself; what is missing is named with its pip line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backends import backend_class

if TYPE_CHECKING:
    LocalBackend: Any

__all__ = ["LocalBackend"]


def __getattr__(name: str) -> Any:
    if name == "LocalBackend":
        return backend_class("local")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
