"""Prints the options of the installed SGLang's server as JSON, by how they are written."""

import argparse
import json

import art_sglang_serve  # noqa: F401  (on a CPU, SGLang can't be imported without it)


def main() -> None:
    """Ask SGLang's own parser."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found = {"values": [], "lists": [], "flags": [], "switches": []}
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
    print(json.dumps({kind: sorted(set(names)) for kind, names in found.items()}))


if __name__ == "__main__":
    main()
