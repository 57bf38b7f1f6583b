"""ART's local backend: serves and trains models on this machine.

`LocalBackend` is what users construct; everything else runs behind it, most of it in a host process of its own, so
nothing is imported here before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.backend import LocalBackend
    from .client.backend_path import PathUnusable
    from .client.host_start import PathInUse

__all__ = ["LocalBackend", "PathInUse", "PathUnusable"]


def __getattr__(name: str) -> Any:
    if name == "LocalBackend":
        from .client.backend import LocalBackend

        return LocalBackend
    if name == "PathInUse":
        from .client.host_start import PathInUse

        return PathInUse
    if name == "PathUnusable":
        from .client.backend_path import PathUnusable

        return PathUnusable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
