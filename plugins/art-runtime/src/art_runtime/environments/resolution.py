"""Which packages an engine's environment would hold, asked of the index without installing any.

Knows requirements and uv; makes no environment and needs no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from art_core.errors import ProcessFailed

from .indexes import uv_settings
from .install import installer
from .places import EngineEnvironment

RESOLUTION_LIMIT_S: Final = 600.0


def resolve(environment: EngineEnvironment) -> list[str]:
    """The packages with their versions, as lines of a requirements file.

    Raises ProcessFailed where there is no uv, and with uv's words when requirements contradict each other or the index
    lacks one.
    """
    uv = installer()
    if uv is None:
        raise ProcessFailed("A dry run asks uv, and there is none: pip install uv, then run it again.")
    spec = environment.spec
    alone = _resolved(uv, spec.without_dependencies, "--no-deps") if spec.without_dependencies else []
    without = {name.lower().replace("_", "-") for name in spec.uninstall}
    found = [line for line in _resolved(uv, spec.requirements) if line.partition("==")[0] not in without]
    return sorted({*found, *alone})


def _resolved(uv: str, requirements: tuple[str, ...], *options: str) -> list[str]:
    """What uv chooses for requirements, for this interpreter's version and system. Raises ProcessFailed."""
    indexes, variables = uv_settings()
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable]
    try:
        answer = subprocess.run(
            [*command, *options, *indexes, "-"],
            input="\n".join(requirements),
            capture_output=True,
            text=True,
            timeout=RESOLUTION_LIMIT_S,
            env={**os.environ, **variables},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProcessFailed(f"uv hadn't resolved the requirements after {RESOLUTION_LIMIT_S:g} s.") from error
    if answer.returncode:
        raise ProcessFailed(f"uv can't resolve the requirements: {answer.stderr.strip()[-2000:]}")
    # Options such as --find-links are repeated in the output.
    return [line for line in answer.stdout.splitlines() if line.strip() and not line.startswith(("-", "#"))]
