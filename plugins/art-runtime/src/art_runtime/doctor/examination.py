"""All checks in their order. A check that fails itself is a finding too, and takes no other with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from .finding import Finding, State
from .installed import caches, engines, plugins
from .machine import disk, gpu, limits, memory, ports, python
from .surroundings import certificates, folders, locale, proxies, shadowing

Check = Callable[[], Iterable[Finding]]
CHECKS: dict[str, Check] = {
    "python": python,
    "disk": disk,
    "memory": memory,
    "GPU": gpu,
    "ports": ports,
    "limits": limits,
    "folders": folders,
    "locale": locale,
    "proxies": proxies,
    "certificates": certificates,
    "shadowing files": shadowing,
    "plugins": plugins,
    "engines": engines,
    "caches": caches,
}


def examine_all() -> list[Finding]:
    """Everything that can be looked at in a few seconds."""
    try:
        os.getcwd()
    except FileNotFoundError:
        says = "the working folder was deleted, and nothing can be started in it"
        return [Finding(about="folders", state=State.WRONG, says=says, mend="cd to a folder that is there")]
    return [finding for about, check in CHECKS.items() for finding in _guarded(about, check)]


def _guarded(about: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        says = f"couldn't be looked at: {type(error).__name__}: {error}"
        return [Finding(about=about, state=State.WRONG, says=says, mend="report it, with this output")]
