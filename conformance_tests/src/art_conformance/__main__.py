"""`python -m art_conformance list [--json]`: the requirements. Checks nothing."""

from __future__ import annotations

import argparse
import json

from .catalogue import as_json, as_text


def main() -> None:
    """Print the requirements as text or as the JSON of a frozen set."""
    parser = argparse.ArgumentParser(prog="python -m art_conformance", description="What ART plugins are held to.")
    parser.add_argument("command", choices=["list"], help="list: print every requirement")
    parser.add_argument("--json", action="store_true", help="in the form of the frozen sets")
    arguments = parser.parse_args()
    print(json.dumps(as_json(), indent=1, ensure_ascii=False) if arguments.json else as_text())


if __name__ == "__main__":
    main()
