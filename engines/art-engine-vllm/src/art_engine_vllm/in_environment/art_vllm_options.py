"""Prints the options of the installed vLLM's server as JSON, by how they are written."""

import argparse
import json


def main() -> None:
    """Ask vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = {"values": [], "lists": [], "flags": [], "switches": []}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
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
