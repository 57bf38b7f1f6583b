"""Gives a backend's class by its name, from whichever installed plugin provides it. Knows no backend's code."""

from __future__ import annotations

from typing import Any, NoReturn

from art_core import installed_plugins
from art_core.errors import PluginNotInstalled
from art_core.registry import load_factory


def backend_class(name: str) -> Any:
    """The class of a backend. Raises PluginNotInstalled with the pip line, or PluginError with what is wrong."""
    return load_factory(installed_plugins().backend(name))


def backend_class_or_notice(name: str) -> Any:
    """The class of a backend or, when it is not installed, something that says so as soon as it is called.

    For `art.LocalBackend` and the like, so that `from art import *` works without any backend.
    """
    try:
        return backend_class(name)
    except PluginNotInstalled as error:
        message = str(error)

    def not_installed(*_: Any, **__: Any) -> NoReturn:
        raise PluginNotInstalled(message)

    return not_installed
