"""Which peers are measured beside us, and an environment of its own for each, kept for the next run.

Knows uv and where packages come from; knows nothing of what is measured.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from art_engine_kit.user_folders import cache_dir
from art_runtime.environments.indexes import uv_settings
from art_runtime.environments.install import installer

_INSTALL_LIMIT_S = 1800.0


@dataclass(frozen=True)
class Peer:
    """A package and what is installed with it. `python` is the version that its newest release needs."""

    name: str
    requirements: tuple[str, ...]
    python: str | None = None


_STOCK = ("transformers==5.24.0", "peft==0.21.2", "torch==2.13.0")
PLAIN = Peer("plain", _STOCK)
# Its asynchronous trainer imports aiohttp.
TRL = Peer("trl", ("trl==1.16.0", "aiohttp", *_STOCK))
# Its PipelineTrainer imports its LocalBackend, and that one these; its logging, pyarrow.
OPENPIPE = Peer("openpipe-art", ("openpipe-art", "torch==2.13.0", "transformers", "pyarrow"), python="3.12")


def peer_python(peer: Peer) -> Path:
    """The interpreter of the peer's environment, which is made where there is none yet.

    Where the Python that it needs isn't found, ours is taken, and with it the newest release that runs on ours. Raises
    RuntimeError where there is no uv, CalledProcessError when it fails.
    """
    name, requirements, python = peer.name, peer.requirements, peer.python
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
