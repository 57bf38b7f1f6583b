"""Trains and serves models on a machine elsewhere: W&B's cloud, or a server of one's own (`art serve`).

`ServerlessBackend` is what users construct; `wire` holds the messages, for whoever writes a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import ServerlessBackend
    from .errors import JobStalled, KeyMissing, OutcomeUnknown, ServiceRefused, ServiceUnreachable
    from .service import Patience

__all__ = [
    "JobStalled",
    "KeyMissing",
    "OutcomeUnknown",
    "Patience",
    "ServerlessBackend",
    "ServiceRefused",
    "ServiceUnreachable",
]


def __getattr__(name: str) -> Any:
    if name == "ServerlessBackend":
        from .backend import ServerlessBackend

        return ServerlessBackend
    if name == "Patience":
        from .service import Patience

        return Patience
    if name in __all__:
        from . import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
