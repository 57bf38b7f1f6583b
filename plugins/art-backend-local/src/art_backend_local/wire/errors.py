"""Carries an error of `art_core` from the host to the client as JSON, so that the user catches the type it was raised
as.

Knows the names of the kernel's errors and nothing of what raised them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from art_core import ArtError, errors
from art_core.errors import BackendUnreachable

JSON = dict[str, Any]
_BUILT_IN: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, TypeError, OSError, TimeoutError, FileExistsError, FileNotFoundError)
}


def error_to_json(error: BaseException) -> JSON:
    """The error's types, its own first, its message and its plain attributes."""
    attributes = {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | bool)}
    if isinstance(error, OSError) and error.errno is not None:
        attributes["errno"] = error.errno
    return {
        "types": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error) or repr(error),
        "attributes": attributes,
        "paths": {k: str(v) for k, v in vars(error).items() if isinstance(v, Path)},
    }


def error_from_json(value: JSON) -> Exception:
    """The error to raise, of the nearest type that is the kernel's or built in; ArtError naming a foreign one."""
    types, message = list(value.get("types") or ["?"]), str(value.get("message", ""))
    known = (getattr(errors, name, None) or _BUILT_IN.get(name) for name in types)
    kind = next((k for k in known if isinstance(k, type) and issubclass(k, Exception)), None)
    if kind is None:
        return ArtError(f"the host failed: {types[0]}: {message}")
    # Several errors build their message from parts; here the message is whole already.
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    paths = {name: Path(path) for name, path in (value.get("paths") or {}).items()}
    for attribute, content in {**(value.get("attributes") or {}), **paths}.items():
        setattr(error, attribute, content)
    return error


def unreachable(path: object, cause: object) -> BackendUnreachable:
    """The error for a host that does not answer."""
    return BackendUnreachable(
        f"the host process of the local backend at {path} does not answer ({cause}). Why: {path}/logs/host.log."
        " Registering the model again starts a new host."
    )
