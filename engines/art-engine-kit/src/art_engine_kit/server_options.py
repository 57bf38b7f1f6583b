"""Asks the parser of an installed server for its options, and writes them down as a module.

    python -m art_engine_kit.server_options PYTHON FILE MODULE

PYTHON is the interpreter of the server's environment, FILE has a function `parser()` that gives the server's own, and
MODULE is written with `ARGUMENTS`, a `ServerArguments`. For whoever maintains an engine: run it when the environment's
requirements change, and hold the module against `options_of` in a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from .process_environment import process_environment
from .server_arguments import ServerArguments

_READER = Path(__file__).with_name("parser_options.py")
_HEAD = '''"""The server's options, as its own parser lists them. Written by art_engine_kit.server_options."""

# ruff: noqa: SIM905
from __future__ import annotations

from typing import Final

from art_engine_kit.server_arguments import ServerArguments

ARGUMENTS: Final = ServerArguments(
'''


def options_of(
    python: str, file: Path, env: Mapping[str, str] | None = None, *, timeout_s: float = 600.0
) -> ServerArguments:
    """The options of the parser that `parser()` in `file` gives, asked in `python`'s environment with `env` added.

    Raises RuntimeError with what it printed when it fails.
    """
    command = [python, str(_READER), str(file)]
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        # Both scripts import what lies beside them.
        env=process_environment({"PYTHONSAFEPATH": "", **(env or {})}),
    )
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {answer.returncode}: {answer.stderr[-2000:]}")
    return ServerArguments(
        **{kind: frozenset(names) for kind, names in json.loads(answer.stdout.splitlines()[-1]).items()}
    )


def module_of(arguments: ServerArguments) -> str:
    """The text of a module that holds them."""
    parts = []
    for kind in ("values", "lists", "flags", "switches"):
        text = textwrap.fill(" ".join(sorted(getattr(arguments, kind))), width=108, break_long_words=False)
        lines = "\n".join(f"        {line}" for line in text.splitlines())
        parts.append(f'    {kind}=frozenset(\n        """\n{lines}\n        """.split()\n    ),\n')
    return _HEAD + "".join(parts) + ")\n"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    Path(sys.argv[3]).write_text(module_of(options_of(sys.argv[1], Path(sys.argv[2]))), encoding="utf-8")
