"""The parser of the installed vLLM's server, for art_engine_kit.server_options."""


def parser():
    """vLLM's own."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())
