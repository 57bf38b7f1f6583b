"""The parser of the installed vLLM's server, for art_engine_kit.server_options."""

import argparse


def parser() -> argparse.ArgumentParser:
    """vLLM's own."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser())
    return made
