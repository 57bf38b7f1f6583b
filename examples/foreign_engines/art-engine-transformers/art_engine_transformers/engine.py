"""Describes `transformers serve`: the command that starts it, and how it is spoken to. Does no I/O.

It pretends nothing: the calls that the server doesn't have are made and come back refused, and an answer without token
ids is refused by the dialect that this one is made of.
"""

from typing import ClassVar, Final

from art_core import InferenceCapability, InferenceLaunch, LaunchPlan
from art_core.engines import JSON, Endpoint
from art_engine_kit import OpenAIServerEngine, ServerArguments, cuda_env

from .plugin import CAPABILITIES

ARGUMENTS: Final = ServerArguments(values=frozenset({"attn_implementation", "default_seed", "log_level"}))
_INSTEAD: Final = "Use an engine that is fit for training: pip install art-engine-torch."


class TransformersEngine(OpenAIServerEngine):
    """See `art_core.InferenceEngine`."""

    name = "transformers"
    capabilities = CAPABILITIES
    instead: ClassVar = dict.fromkeys(InferenceCapability, _INSTEAD)

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server has no option for a key, for a served name, nor for adapters: whoever reaches it may ask it."""
        argv = [config.python, "-m", "transformers.cli.transformers", "serve", str(config.base_model)]
        argv += ["--host", config.host, "--port", str(config.port)]
        argv += ["--dtype", config.dtype, "--device", "cuda" if config.devices else "cpu"]
        argv += ARGUMENTS.command_line(config.engine_args, where="engine_args of the inference engine transformers")
        return LaunchPlan(argv=tuple(argv), env={**cuda_env(config.devices), "HF_HUB_OFFLINE": "1"})

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """Without the field that it would refuse by name. It ignores logprobs and n, and says so in its log alone."""
        prepared = super().prepare_request(endpoint, body, adapter)
        return {name: value for name, value in prepared.items() if name != "return_token_ids"}
