"""The `art` command, as a script and as `python -m art_core`: looks whose package `art` is before it is imported.

The name on PyPI belongs to another project, whose package may lie over ours. The commands themselves are the client's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def foreign_art() -> str:
    """What to do when another distribution's `art` package is imported in place of ours; empty when ours is."""
    spec = importlib.util.find_spec("art")
    if spec is None or spec.origin is None:
        return (
            "The package `art` of art-core is missing. Reinstall it: pip install --force-reinstall --no-deps art-core"
        )
    # A foreign `art` in the same site-packages overwrites single files of ours; only its content tells whose it is.
    if "art_core" in Path(spec.origin).read_text(errors="replace", encoding="utf-8"):
        return ""
    return (
        f"`import art` gives a foreign package at {Path(spec.origin).parent}: the name `art` on PyPI belongs to another"
        " project. Uninstall that one, then: pip install --force-reinstall --no-deps art-core"
    )


def main() -> None:
    """Run the `art` command."""
    foreign = foreign_art()
    if foreign:
        sys.exit(foreign)
    from art.command_line import main as run

    run()


if __name__ == "__main__":
    main()
