"""Carries an error of `art_core` from the host to the client as JSON, so that the user catches the type it was raised
as.

Knows the names of the kernel's errors and nothing of what raised them.
"""

from __future__ import annotations

from typing import Any

from art_core import ArtError, errors
from art_core.errors import BackendUnreachable

JSON = dict[str, Any]
_BUILT_IN: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, TypeError, OSError, TimeoutError, FileExistsError, FileNotFoundError)
}


def error_to_json(error: BaseException) -> JSON:
    """The error's type, message and plain attributes."""
    attributes = {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | bool)}
    return {"type": type(error).__name__, "message": str(error) or repr(error), "attributes": attributes}


def error_from_json(value: JSON) -> Exception:
    """The error to raise: the kernel's class of that name, a built-in one, or ArtError naming the foreign type."""
    name, message = str(value.get("type", "")), str(value.get("message", ""))
    kind = getattr(errors, name, None) or _BUILT_IN.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return ArtError(f"the host failed: {name}: {message}")
    # Several errors build their message from parts; here the message is whole already.
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    for attribute, content in (value.get("attributes") or {}).items():
        setattr(error, attribute, content)
    return error


def unreachable(path: object, cause: object) -> BackendUnreachable:
    """The error for a host that does not answer."""
    return BackendUnreachable(
        f"the host process of the local backend at {path} does not answer ({cause}). Why: {path}/logs/host.log."
        " Registering the model again starts a new host."
    )
