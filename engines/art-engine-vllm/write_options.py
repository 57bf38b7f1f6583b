"""Writes src/art_engine_vllm/options.py from the parser of an installed vLLM.

    python write_options.py PYTHON_OF_VLLM

Run it when the environment's requirements change; a test holds the file against the real parser.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent / "src" / "art_engine_vllm"
HEAD = '''"""The options of vLLM's server, as its own parser lists them. Written by write_options.py; don't edit."""

# ruff: noqa: SIM905
from __future__ import annotations

from typing import Final

from art_core.server_arguments import ServerArguments

ARGUMENTS: Final = ServerArguments(
'''


def main(python: str) -> None:
    """Ask the parser and write the file."""
    script = HERE / "in_environment" / "art_vllm_options.py"
    answer = subprocess.run([python, str(script)], capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(answer.stdout.splitlines()[-1])
    parts = []
    for kind, names in found.items():
        text = textwrap.fill(" ".join(names), width=108, break_long_words=False)
        lines = "\n".join(f"        {line}" for line in text.splitlines())
        parts.append(f'    {kind}=frozenset(\n        """\n{lines}\n        """.split()\n    ),\n')
    (HERE / "options.py").write_text(HEAD + "".join(parts) + ")\n")


if __name__ == "__main__":
    main(sys.argv[1])
