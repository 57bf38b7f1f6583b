"""Describes the server: the command that starts it, and how it is spoken to. Does no I/O."""

from typing import ClassVar

from art_core import InferenceCapability, InferenceLaunch, LaunchPlan
from art_engine_kit import OpenAIServerEngine, ServerArguments, cuda_env

from .plugin import CAPABILITIES

COMMAND = ("-m", "art_engine_torch.server")  # yours
API_KEY_VARIABLE = "ART_TORCH_API_KEY"  # yours
ARGUMENTS = ServerArguments(values=frozenset({"threads", "max_num_seqs"}))  # yours


class ExampleEngine(OpenAIServerEngine):
    """See `art_core.InferenceEngine`."""

    name = "example"
    capabilities = CAPABILITIES
    # What is not declared is refused, with a word on what to do.
    instead: ClassVar = {
        InferenceCapability.TOOL_CALLS: "Use the inference engine torch for tools: pip install art-engine-torch."
    }

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server's command line, each of whose options is yours to name."""
        argv = [config.python, *COMMAND, "--model", str(config.base_model)]
        argv += ["--served-model-name", config.served_name, "--host", config.host, "--port", str(config.port)]
        argv += ["--max-adapters", str(config.max_adapters), "--max-lora-rank", str(config.max_lora_rank)]
        argv += ["--dtype", config.dtype, "--device", "cuda" if config.devices else "cpu"]
        if config.max_model_len is not None:
            argv += ["--max-model-len", str(config.max_model_len)]
        if config.chat_template is not None:
            argv += ["--chat-template", str(config.chat_template)]
        # The user's own settings of the server; one that it doesn't have is refused with the nearest name.
        argv += ARGUMENTS.command_line(config.engine_args, where="engine_args of the inference engine example")
        # A secret never stands in argv, where every user of the machine can read it.
        return LaunchPlan(argv=tuple(argv), env=cuda_env(config.devices), secret_env={API_KEY_VARIABLE: config.api_key})
