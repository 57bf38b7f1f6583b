"""Describes vLLM's server: the command that starts it and the calls that it understands.

Builds and reads, and does no I/O. The server runs in vLLM's own environment (see `environment`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from art_core import InferenceCapability, InferenceLaunch, LaunchPlan
from art_engine_kit import hermes_calls
from art_engine_kit.environment import cuda_env
from art_engine_kit.openai_server import OpenAIServerEngine
from art_engine_kit.server_arguments import users_arguments

from .declared import BY_FLAVOUR, EVERYWHERE
from .environment import FOLDER, SERVE
from .options import ARGUMENTS

WHERE: Final = "engine_args of the vllm inference engine"
# vLLM lays its buffers out for one of these ranks; an adapter of a lower rank fits too.
RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CPU_KV_CACHE_BYTES: Final = 2 * 2**30
# vLLM keeps whole blocks of a prompt for who asks it next. On a CPU it takes blocks of 128, and so computes every
# shorter prompt anew for each rollout of its group.
CPU_BLOCK_TOKENS: Final = 32
# What the launch itself decides, by the name a user would give, and how.
DECIDED: Final[Mapping[str, str]] = {
    "model": "It is the model's base_model.",
    "served_model_name": "The gateway gives models their names.",
    "host": "Servers listen on this machine only.",
    "port": "A free one is found for each server.",
    "api_key": "One is made for each server.",
    "enable_lora": "It is always on.",
    "logprobs_mode": "Training needs the policy's own logprobs.",
}
# A model's generation_config would otherwise cut what is sampled (top_k, top_p, temperature) unasked, and the logprobs
# would no longer be those of what was sampled from. Its end-of-text ids stay in force.
PLAIN_SAMPLING: Final = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Beside the script that is run, where Python finds it.
PARSER: Final = {"tool_parser_plugin": "art_vllm_tools", "tool_call_parser": "art_hermes"}


class VllmInferenceEngine(OpenAIServerEngine):
    """See `art_core.engines.InferenceEngine`. `flavour` None declares what holds on every machine.

    vLLM takes an adapter of a wrong width and one with NaN with 200 and is poisoned by them: whoever publishes checks
    before. Asleep, the weights are in the host's memory and the KV cache is gone; requests under way are computed again
    from their own tokens after waking.
    """

    name = "vllm"
    capabilities = EVERYWHERE
    by_flavour = BY_FLAVOUR
    instead: ClassVar = {
        InferenceCapability.SLEEP: "Only its CUDA build gives memory back; on a CPU use pause and resume, or engine"
        " torch (pip install art-engine-torch)."
    }

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server on the GPUs of `config.devices`, or on the CPU when there are none.

        `engine_args` are vLLM's own arguments, with underscores, and `env`, variables for its process; they win over
        what is chosen here. Raises UnknownArgument for one that doesn't exist, ValueError for one that is decided
        elsewhere or doesn't fit.
        """
        given, added = users_arguments(config.engine_args, decided=DECIDED, where=WHERE)
        options = {**_chosen(config, given), **given}
        argv = [config.python, str(SERVE), "serve", str(config.base_model)]
        argv += ["--host", config.host, "--port", str(config.port), "--served-model-name", config.served_name]
        argv += ["--enable-lora", "--middleware", "art_vllm_guard.RequireKey"]
        argv += ARGUMENTS.command_line(options, where=WHERE)
        env = {
            # The environment is whole in itself: what the client's process imports from elsewhere must not reach it.
            # Only our own module, the one that guards its API, is added.
            "PYTHONPATH": str(FOLDER),
            # Its thousands of modules are compiled once, not by each of its processes at every start, even where the
            # client's process keeps no bytecode.
            "PYTHONDONTWRITEBYTECODE": "",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # Its processes talk to each other by sockets, which would listen on the machine's outer address.
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            # Opens /pause, /resume, /sleep and /wake_up; the middleware guards them.
            "VLLM_SERVER_DEV_MODE": "1",
            "ART_HERMES_CALLS": hermes_calls.__file__,
            **added,
            **cuda_env(config.devices),
        }
        return LaunchPlan(
            argv=tuple(argv),
            env=env,
            secret_env={"VLLM_API_KEY": config.api_key},
            ready_timeout_s=900.0 if config.devices else 600.0,
            stop_timeout_s=30.0,
        )


def _chosen(config: InferenceLaunch, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that follow from the launch; a user's own win over them."""
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "max_lora_rank": _rank(config.max_lora_rank),
        "max_loras": config.max_adapters,
        "max_cpu_loras": max(config.max_adapters, int(given.get("max_loras") or 0)),
        "max_model_len": config.max_model_len,
        "chat_template": config.chat_template,
        "enable_auto_tool_choice": True,
        # A parser of the user's own stands in the place of ours.
        **({"tool_call_parser": "hermes"} if "tool_parser_plugin" in given else PARSER),
        "override_generation_config": PLAIN_SAMPLING,
        "disable_uvicorn_access_log": True,
    }
    if not config.devices:
        return options | {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "block_size": CPU_BLOCK_TOKENS}
    if len(config.devices) > 1 and not any(
        name in given for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    ):
        options["tensor_parallel_size"] = len(config.devices)
    return options | {"enable_sleep_mode": True}


def _rank(wanted: int) -> int:
    fitting = [rank for rank in RANKS if rank >= wanted]
    if not fitting:
        raise ValueError(f"vLLM serves adapters of rank {RANKS[-1]} at most, not {wanted}. Lower r in peft_args.")
    return fitting[0]
