"""Tells uv where pip looks for packages: uv reads neither pip's files nor its variables.

Asks pip itself what it was configured with. Where uv has a setting of its own, that one stays. Run as a program it is
`uv pip install` into the environment that runs it: so `make setup` makes one, before anything of ours can be imported.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

_TIMEOUT_S: Final = 60.0
# Later ones win, as in pip.
_SECTIONS: Final = ("global", "install", ":env:")
_YES: Final = ("1", "true", "yes", "on")


def uv_settings() -> tuple[list[str], dict[str, str]]:
    """Arguments for `uv pip install`, and variables to add, that make it look where pip looks."""
    return as_uv(pip_settings(), os.environ)


def pip_settings() -> dict[str, str]:
    """What pip is configured with, by option name such as "find-links"; empty where there is no pip."""
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_pip_settings(answer.stdout)


def read_pip_settings(listing: str) -> dict[str, str]:
    """The settings in the output of `pip config list`, which names a section and quotes each value."""
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listing.splitlines():
        key, equals, quoted = line.partition("=")
        section, dot, option = key.partition(".")
        if equals and dot and section in found:
            found[section][option] = str(ast.literal_eval(quoted))
    return {option: value for section in _SECTIONS for option, value in found[section].items()}


def as_uv(pip: dict[str, str], environment: os._Environ[str] | dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """pip's settings as arguments and variables of uv; `environment` may hold uv's own, which stay."""
    arguments: list[str] = []
    own_index = any(name in environment for name in ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL"))
    if "find-links" in pip and "UV_FIND_LINKS" not in environment:
        arguments += [word for place in pip["find-links"].split() for word in ("--find-links", place)]
    if "index-url" in pip and not own_index:
        arguments += ["--default-index", pip["index-url"]]
    if "extra-index-url" in pip and not own_index:
        arguments += [word for url in pip["extra-index-url"].split() for word in ("--index", url)]
        # pip takes the best version that any index has; uv by itself asks only the first that knows the name.
        arguments += ["--index-strategy", "unsafe-best-match"]
    if pip.get("no-index", "").lower() in _YES:
        arguments.append("--no-index")
    variables = {"UV_HTTP_TIMEOUT": pip.get("timeout", "120")}
    if "cert" in pip:
        variables["SSL_CERT_FILE"] = pip["cert"]
    if pip.get("no-cache-dir", "").lower() in _YES:
        variables["UV_NO_CACHE"] = "1"
    return arguments, {name: value for name, value in variables.items() if name not in environment}


def main() -> None:
    """Become `uv pip install` with the arguments given, uv being the one beside this interpreter."""
    indexes, variables = uv_settings()
    if not _can_be_made(Path(os.environ.get("UV_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache")):
        # pip does without a cache by itself; uv gives up.
        variables["UV_NO_CACHE"] = "1"
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "install", "--python", sys.executable, *indexes, *sys.argv[1:]]
    os.execve(uv, command, {**os.environ, **variables})


def _can_be_made(folder: Path) -> bool:
    folder = Path(os.path.expanduser(folder)).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


if __name__ == "__main__":
    main()
