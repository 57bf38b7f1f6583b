"""The parser of the installed SGLang's server, for art_engine_kit.server_options."""

import argparse

import art_sglang_serve  # noqa: F401  (on a CPU, SGLang can't be imported without it)


def parser() -> argparse.ArgumentParser:
    """SGLang's own."""
    from sglang.srt.server_args import ServerArgs

    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made
