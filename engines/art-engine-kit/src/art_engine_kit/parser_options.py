"""Prints the options of an argparse parser as JSON, by how they are written; run in a server's own environment.

    python parser_options.py FILE

FILE has a function `parser()` that gives the server's own. Imports nothing of ART, which that environment doesn't have.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path


def options(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """The names of long options with underscores, under the fields of `ServerArguments`."""
    found: dict[str, list[str]] = {"values": [], "lists": [], "flags": [], "switches": []}
    for action in parser._actions:
        long = [option[2:].replace("-", "_") for option in action.option_strings if option.startswith("--")]
        if not long or isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            kind, long = "switches", [name for name in long if not name.startswith("no_")]
        elif action.nargs == 0:
            kind = "flags"
        else:
            kind = "lists" if action.nargs in ("+", "*") else "values"
        found[kind] += long
    return {kind: sorted(set(names)) for kind, names in found.items()}


if __name__ == "__main__":
    # As if FILE were run itself: it may import what lies beside it, and nothing of this folder.
    sys.path[0] = str(Path(sys.argv[1]).parent)
    print(json.dumps(options(runpy.run_path(sys.argv[1])["parser"]())))
