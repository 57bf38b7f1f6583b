"""Which peers are measured beside us: an environment of its own for each, kept for the next run, and what runs in it.

Knows uv, where packages come from, and that a program prints one JSON object; knows nothing of what is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from art_engine_kit.user_folders import cache_dir
from art_runtime.environments.indexes import uv_settings
from art_runtime.environments.install import installer

_INSTALL_LIMIT_S = 1800.0
_RUN_LIMIT_S = 3600.0
_PROGRAMS = Path(__file__).parents[1] / "peers"


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


def run_peer(
    peer: Peer, program: str, settings: Mapping[str, Any], *arguments: str, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a program of `benchmarks/peers` prints, run in the peer's environment with `settings` on its standard input.

    `env` is added to ours. Raises RuntimeError with the end of what it said when it fails, and as `peer_python` does.
    """
    finished = subprocess.run(
        [peer_python(peer), "-W", "ignore", _PROGRAMS / program, *arguments],
        input=json.dumps(settings), env={**os.environ, **(env or {})},
        capture_output=True, text=True, timeout=_RUN_LIMIT_S, check=False,
    )  # fmt: skip
    return printed_object(finished, peer.name)


def printed_object(finished: subprocess.CompletedProcess[str], name: str) -> dict[str, Any]:
    """The JSON object on the last line of what a program printed. Raises RuntimeError when it failed."""
    if finished.returncode:
        raise RuntimeError(f"{name} failed:\n{finished.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


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
