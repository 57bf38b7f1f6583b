"""An environment of its own for a peer that is measured beside us, with what it pins, kept for the next run.

Knows uv and where packages come from; knows nothing of what is measured.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from art_engine_kit.user_folders import cache_dir
from art_runtime.environments.indexes import uv_settings
from art_runtime.environments.install import installer

_INSTALL_LIMIT_S = 1800.0


def peer_python(name: str, requirements: Sequence[str], *, python: str | None = None) -> Path:
    """The interpreter of an environment with these requirements, which is made where there is none yet.

    `python` is the version that the peer's newest release needs; where it isn't found, ours is taken, and with it the
    newest release that runs on ours. Raises RuntimeError where there is no uv, CalledProcessError when it fails.
    """
    uv = installer()
    if uv is None:
        raise RuntimeError("uv, which makes the peers' environments, was not found: make setup")
    indexes, variables = uv_settings()
    environment = {**os.environ, **variables, "UV_PYTHON_DOWNLOADS": "never"}
    if (
        python is not None
        and subprocess.run([uv, "python", "find", python], env=environment, capture_output=True).returncode
    ):
        print(f"There is no Python {python} on the PATH; {name} is an older release.", file=sys.stderr)
        python = None
    chosen = python or sys.executable
    key = hashlib.sha256("\n".join([chosen, *requirements]).encode()).hexdigest()[:12]
    folder = cache_dir() / "peers" / f"{name}-{key}"
    made = folder / "made"
    if not made.exists():
        print(f"Making an environment for {name}, once: {', '.join(requirements)} ...", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [uv, "venv", "--quiet", "--no-project", "--python", chosen, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(folder / "bin/python"), *indexes, *requirements],
        ):
            subprocess.run(command, env=environment, timeout=_INSTALL_LIMIT_S, check=True)
        made.touch()
    return folder / "bin" / "python"
