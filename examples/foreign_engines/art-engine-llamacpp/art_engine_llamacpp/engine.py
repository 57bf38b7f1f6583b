"""Describes llama.cpp's server with its front: the command that starts them and how they are spoken to. No I/O."""

from collections.abc import Mapping
from typing import ClassVar, Final

from art_core import InferenceCapability, InferenceLaunch, LaunchPlan
from art_core.engines import JSON, Endpoint
from art_engine_kit import OpenAIServerEngine, ServerArguments, cuda_env

from .environment import SERVE
from .plugin import CAPABILITIES

API_KEY_VARIABLE: Final = "ART_LLAMACPP_API_KEY"
# How many answers llama.cpp works on at once, and with how many threads.
ARGUMENTS: Final = ServerArguments(values=frozenset({"slots", "threads"}))
DEFAULTS: Final[Mapping[str, int]] = {"slots": 8, "threads": 1}


class LlamaCppEngine(OpenAIServerEngine):
    """See `art_core.InferenceEngine`."""

    name = "llamacpp"
    capabilities = CAPABILITIES
    instead: ClassVar = {
        InferenceCapability.STREAMING_TOKEN_IDS: "Ask without stream=True: llama.cpp leaves out of a stream every token"
        " after which the text ends in the middle of a character.",
        InferenceCapability.TOOL_CALLS: "Use the inference engine torch for tools: pip install art-engine-torch.",
        InferenceCapability.PAUSE: "Wait until the answers under way have ended; llama.cpp can't hold them.",
        InferenceCapability.SLEEP: "Stop the server and start it again; llama.cpp sleeps only when nobody asks.",
    }

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """On a CPU, whatever devices there are: the wheel on PyPI has no CUDA."""
        given = {**DEFAULTS, **config.engine_args}
        argv = [config.python, str(SERVE), "--model", str(config.base_model)]
        argv += ["--served-model-name", config.served_name, "--host", config.host, "--port", str(config.port)]
        argv += ["--max-adapters", str(config.max_adapters), "--max-lora-rank", str(config.max_lora_rank)]
        argv += ["--dtype", config.dtype]
        if config.max_model_len is not None:
            argv += ["--max-model-len", str(config.max_model_len)]
        if config.chat_template is not None:
            argv += ["--chat-template", str(config.chat_template)]
        argv += ARGUMENTS.command_line(given, where="engine_args of the inference engine llamacpp")
        # The environment is whole in itself, but for the modules beside the server's.
        env = {**cuda_env(config.devices), "PYTHONPATH": str(SERVE.parent)}
        return LaunchPlan(argv=tuple(argv), env=env, secret_env={API_KEY_VARIABLE: config.api_key})

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """A stream is refused here, where it can still be said why."""
        if body.get("stream"):
            self._require(InferenceCapability.STREAMING_TOKEN_IDS)
        return super().prepare_request(endpoint, body, adapter)
