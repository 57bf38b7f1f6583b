"""ART's local backend: serves and trains models on this machine.

`LocalBackend` is what users construct; everything else runs behind it, most of it in a host process of its own, so
nothing is imported here before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.backend import LocalBackend
    from .client.host_start import PathInUse

__all__ = ["LocalBackend", "PathInUse"]


def __getattr__(name: str) -> Any:
    if name == "LocalBackend":
        from .client.backend import LocalBackend

        return LocalBackend
    if name == "PathInUse":
        from .client.host_start import PathInUse

        return PathInUse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
