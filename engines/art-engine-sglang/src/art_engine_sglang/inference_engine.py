"""Describes SGLang's server: the command that starts it and the calls that it understands.

Builds and reads, and does no I/O. The server runs in SGLang's own environment (see `environment`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from art_core import EngineCall, InferenceCapability, InferenceLaunch, LaunchPlan
from art_core.engines import JSON, Endpoint
from art_engine_kit import hermes_calls
from art_engine_kit.environment import cuda_env
from art_engine_kit.openai_server import OpenAIServerEngine
from art_engine_kit.server_arguments import users_arguments

from .declared import BY_FLAVOUR, EVERYWHERE
from .environment import CPU_SHIMS, FOLDER, SERVE
from .options import ARGUMENTS

WHERE: Final = "engine_args of the sglang inference engine"
KEY_VARIABLE: Final = "ART_SGLANG_API_KEY"
MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What the launch itself decides, by the name a user would give, and how.
DECIDED: Final[Mapping[str, str]] = {
    "model": "It is the model's base_model.",
    "model_path": "It is the model's base_model.",
    "served_model_name": "The gateway gives models their names.",
    "host": "Servers listen on this machine only.",
    "port": "A free one is found for each server.",
    "api_key": "One is made for each server.",
    "admin_api_key": "The key that is made for each server opens everything.",
    "enable_lora": "It is always on.",
    "device": "It follows from inference_gpu_ids and the machine.",
}
PARALLEL: Final = ("tp_size", "tensor_parallel_size", "pp_size", "pipeline_parallel_size", "dp_size")


class SglangInferenceEngine(OpenAIServerEngine):
    """See `art_core.engines.InferenceEngine`. `flavour` None declares what holds on every machine.

    Unloading an adapter is answered when the requests under way have ended; so it must not be asked while the engine is
    paused. SGLang still remembers the folder and serves it again when the name is asked for: a name must never be given
    to other weights, nor other weights be written to that folder.
    """

    name = "sglang"
    capabilities = EVERYWHERE
    by_flavour = BY_FLAVOUR
    instead: ClassVar = {
        InferenceCapability.SLEEP: "Use pause and resume, or an engine that gives device memory back: pip install"
        " art-engine-vllm."
    }
    load_path = "/load_lora_adapter"
    unload_path = "/unload_lora_adapter"
    unload_timeout_s = 600.0
    pause_call = EngineCall(
        method="POST", path="/pause_generation", json={"mode": "in_place"}, action="pause", timeout_s=120.0
    )
    resume_call = EngineCall(method="POST", path="/continue_generation", json={}, action="resume", timeout_s=120.0)

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server on the GPUs of `config.devices`, or on the CPU when there are none.

        `engine_args` are SGLang's own arguments, with underscores, and `env`, variables for its process; they win over
        what is chosen here. Raises UnknownArgument for one that doesn't exist, ValueError for one that is decided
        elsewhere or doesn't fit.
        """
        given, added = users_arguments(config.engine_args, decided=DECIDED, where=WHERE)
        options = {**_chosen(config, given), **given}
        argv = [config.python, str(SERVE), "--model-path", str(config.base_model)]
        argv += ["--host", config.host, "--port", str(config.port), "--served-model-name", config.served_name]
        argv += ["--enable-lora", "--device", "cuda" if config.devices else "cpu"]
        argv += ARGUMENTS.command_line(options, where=WHERE)
        on_cpu = {
            "SGLANG_USE_CPU_ENGINE": "1",
            # More threads make its CPU path many times slower, not faster.
            "OMP_NUM_THREADS": "1",
        }
        env = {
            # The environment is whole in itself: what the client's process imports from elsewhere must not reach it.
            # Only our own modules are added.
            "PYTHONPATH": str(FOLDER) if config.devices else f"{FOLDER}{os.pathsep}{CPU_SHIMS}",
            # Its thousands of modules are compiled once, not by each of its processes at every start, even where the
            # client's process keeps no bytecode.
            "PYTHONDONTWRITEBYTECODE": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Otherwise the logprobs of sampled tokens are those after the temperature.
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
            "ART_HERMES_CALLS": hermes_calls.__file__,
            **({} if config.devices else on_cpu),
            **added,
            **cuda_env(config.devices),
        }
        return LaunchPlan(
            argv=tuple(argv),
            env=env,
            secret_env={KEY_VARIABLE: config.api_key},
            ready_timeout_s=900.0 if config.devices else 600.0,
            # Beside other work its own processes take half a minute to let go of each other; the host, which stops its
            # servers before it ends, has 45 seconds itself.
            stop_timeout_s=40.0,
        )

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """An adapter is named as `base:adapter`: any name without a colon, unknown ones too, is the base model to
        SGLang. What is before the colon doesn't matter to it.
        """
        # An adapter named here as well would be one that nobody routed to.
        own = {key: value for key, value in body.items() if key != "lora_path"}
        request = super().prepare_request(endpoint, own, None if adapter is None else f"base:{adapter}")
        if endpoint == "chat/completions" and request.get("stream"):
            # return_token_ids is refused for a stream of chat; these two come in one event at its end.
            del request["return_token_ids"]
            request |= {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
        return request

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:
        """Chat answers call the sampled ids `response_token_ids`. Their `metadata` is none that OpenAI's schema allows,
        and counts versions of weights that ART never changes in place.
        """
        choices = []
        for choice in body["choices"]:
            whole = dict(choice)
            sampled = whole.pop("response_token_ids", None)
            if whole.get("token_ids") is None:
                whole["token_ids"] = sampled
            choices.append(whole)
        rest = {key: value for key, value in body.items() if key != "metadata"}
        return super().read_response(endpoint, {**rest, "choices": choices})

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:
        """A stream of chat carries its token ids in one event at its end; they become a last chunk of each choice."""
        chunk = dict(chunk)
        extension: Any = chunk.pop("sglext", None) or {}
        sampled = extension.get("output_ids")
        if sampled is not None:
            prompt = extension.get("input_ids")
            chunk["choices"] = [
                {"index": i, "delta": {}, "finish_reason": None, "token_ids": ids, "prompt_token_ids": prompt}
                for i, ids in enumerate(sampled)
            ]
        return super().read_chunk(endpoint, chunk)


def _chosen(config: InferenceLaunch, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that follow from the launch; a user's own win over them."""
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "context_length": config.max_model_len,
        "chat_template": config.chat_template,
        "max_lora_rank": config.max_lora_rank,
        "max_loras_per_batch": config.max_adapters,
        "lora_target_modules": list(MODULES),
        "tool_call_parser": "hermes",
        # A model's generation_config would otherwise cut what is sampled (top_k, top_p, temperature) unasked, and the
        # logprobs would no longer be those of what was sampled from.
        "sampling_defaults": "openai",
        "log_level_http": "warning",
    }
    if not config.devices:
        return options | {
            "attention_backend": "torch_native",
            "lora_backend": "torch_native",
            "max_total_tokens": 32768,
            "max_running_requests": 64,
            "skip_server_warmup": True,
            # Otherwise its scheduler spins on a core while there is nothing to do, which a trainer could use.
            "sleep_on_idle": True,
        }
    if len(config.devices) > 1 and not any(name in given for name in PARALLEL):
        options["tensor_parallel_size"] = len(config.devices)
    return options
