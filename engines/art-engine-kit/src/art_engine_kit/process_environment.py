"""The environment variables that every process of ours starts with: the user's, less what would break it.

One place for what working folders, proxies, homes and locales do to processes. Knows nothing of what they run.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .user_folders import can_be_written, home_for_processes

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FOLDERS = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def process_environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables as another of ours is to have them; `added` wins over everything.

    - It imports what is installed: never the folder that it happens to be started in, whatever lies there. A script's
      own folder is no exception; a plan that needs that on its path names it in PYTHONPATH.
    - It asks no proxy for this machine.
    - Its files are read and written as UTF-8, and its output is UTF-8, whatever the locale.
    - It has its docstrings, which libraries read, and no warning of a library ends it.
    - Its home is a folder that can be written, and its user has a name.
    """
    env = dict(os.environ)
    # For `python -m`, `-c` and scripts, and for whatever these start in turn.
    env["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in env:
        # An empty entry, as a colon too many leaves it, means the working folder.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, env["PYTHONPATH"].split(os.pathsep)))
    env["PYTHONUTF8"] = "1"
    env.pop("PYTHONIOENCODING", None)
    env.pop("PYTHONOPTIMIZE", None)
    if "PYTHONWARNINGS" in env:
        # An action may be written short, as "e".
        filters = env["PYTHONWARNINGS"].split(",")
        env["PYTHONWARNINGS"] = ",".join(part for part in filters if not part.strip().startswith("e"))
    env |= _without_proxy_for_this_machine(env)
    # Most need none, so one that can't be made stops nobody.
    with suppress(OSError):
        home = home_for_processes()
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
            env["HOME"] = str(home)
    for name in _FOLDERS:
        if name in env and not can_be_written(Path(env[name])):
            del env[name]
    if not _has_name(env):
        env["USER"] = env["LOGNAME"] = f"user-{os.geteuid()}"
    return {**env, **(added or {})}


def _without_proxy_for_this_machine(env: Mapping[str, str]) -> dict[str, str]:
    if not any(env.get(name) or env.get(name.upper()) for name in _PROXIES):
        return {}
    # Programs differ in which of the two they read.
    given = [part.strip() for name in ("no_proxy", "NO_PROXY") for part in env.get(name, "").split(",")]
    names = ",".join(dict.fromkeys([*filter(None, given), *LOOPBACK]))
    return {"no_proxy": names, "NO_PROXY": names}


def _has_name(env: Mapping[str, str]) -> bool:
    if any(env.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return True
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return True
