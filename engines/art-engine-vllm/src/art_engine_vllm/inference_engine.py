"""Describes vLLM's server: the command that starts it and the calls that it understands.

Builds and reads, and does no I/O. The server runs in vLLM's own environment (see `environment`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from art_core import (
    EngineCall,
    EngineRefused,
    InferenceCapability,
    InferenceLaunch,
    LaunchPlan,
    UnsupportedCapability,
)
from art_core.engines import JSON, Endpoint, Flavour, cuda_env

from .declared import BY_FLAVOUR, EVERYWHERE
from .environment import SERVE
from .options import ARGUMENTS

WHERE: Final = "engine_args of the vllm inference engine"
# vLLM lays its buffers out for one of these ranks; an adapter of a lower rank fits too.
RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CPU_KV_CACHE_BYTES: Final = 2 * 2**30
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


class VllmInferenceEngine:
    """See `art_core.engines.InferenceEngine`. `flavour` None declares what holds on every machine."""

    def __init__(self, flavour: Flavour | None = None) -> None:
        self._capabilities = EVERYWHERE if flavour is None else BY_FLAVOUR[flavour]

    @property
    def name(self) -> str:
        """vllm"""
        return "vllm"

    @property
    def capabilities(self) -> frozenset[InferenceCapability]:
        """Those of the flavour."""
        return self._capabilities

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server on the GPUs of `config.devices`, or on the CPU when there are none.

        `engine_args` are vLLM's own arguments, with underscores, and `env`, variables for its process; they win over
        what is chosen here. Raises UnknownArgument for one that doesn't exist, ValueError for one that is decided
        elsewhere or doesn't fit.
        """
        given = {name if name.startswith("--") else name.replace("-", "_"): v for name, v in config.engine_args.items()}
        added = given.pop("env", None) or {}
        if not isinstance(added, Mapping):
            raise ValueError(f"{WHERE}: env takes a dictionary of variables, not {added!r}.")
        for name in given:
            decided = DECIDED.get(name.lstrip("-").replace("-", "_"))
            if decided is not None:
                raise ValueError(f"{WHERE}: {name} can't be set. {decided}")
        options = {**_chosen(config, given), **given}
        argv = [config.python, str(SERVE), "serve", str(config.base_model)]
        argv += ["--host", config.host, "--port", str(config.port), "--served-model-name", config.served_name]
        argv += ["--enable-lora", "--middleware", "art_vllm_guard.RequireKey"]
        argv += ARGUMENTS.command_line(options, where=WHERE)
        env = {
            # The environment is whole in itself: what the client's process imports from elsewhere must not reach it.
            "PYTHONPATH": "",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # Its processes talk to each other by sockets, which would listen on the machine's outer address.
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            # Opens /pause, /resume, /sleep and /wake_up; the middleware guards them.
            "VLLM_SERVER_DEV_MODE": "1",
            **{str(name): str(value) for name, value in added.items()},
            **cuda_env(config.devices),
        }
        return LaunchPlan(
            argv=tuple(argv),
            env=env,
            secret_env={"VLLM_API_KEY": config.api_key},
            ready_timeout_s=900.0 if config.devices else 600.0,
            stop_timeout_s=30.0,
        )

    def load_adapter(self, adapter: str, folder: Path) -> EngineCall:
        """vLLM takes a wrong width and NaN with 200 and is poisoned by them: whoever publishes checks before."""
        body = {"lora_name": adapter, "lora_path": str(folder)}
        return EngineCall(method="POST", path="/v1/load_lora_adapter", json=body, action=f"load adapter {adapter}")

    def unload_adapter(self, adapter: str) -> EngineCall:
        """Answers at once; requests under way end on the adapter."""
        body = {"lora_name": adapter}
        return EngineCall(method="POST", path="/v1/unload_lora_adapter", json=body, action=f"unload adapter {adapter}")

    def list_adapters(self) -> EngineCall:
        """The base model is in the answer too, and has no parent."""
        return EngineCall(method="GET", path="/v1/models", action="list adapters", timeout_s=30.0)

    def read_adapters(self, body: bytes) -> frozenset[str]:
        """The models that have a parent."""
        return frozenset(entry["id"] for entry in json.loads(body)["data"] if entry.get("parent"))

    def pause(self) -> EngineCall:
        """Requests under way freeze where they are, new ones queue."""
        return EngineCall(method="POST", path="/pause?mode=keep", action="pause", timeout_s=120.0)

    def resume(self) -> EngineCall:
        """Everything goes on where it was."""
        return EngineCall(method="POST", path="/resume", action="resume", timeout_s=120.0)

    def sleep(self) -> EngineCall:
        """The weights move to the host's memory, the KV cache is dropped. CUDA only.

        Requests under way are put back into the queue, and computed again from their own tokens after waking.
        """
        self._require(InferenceCapability.SLEEP)
        return EngineCall(method="POST", path="/sleep?level=1&mode=keep", action="sleep", timeout_s=300.0)

    def wake(self) -> EngineCall:
        """Takes the memory again and goes on."""
        self._require(InferenceCapability.SLEEP)
        return EngineCall(method="POST", path="/wake_up", action="wake", timeout_s=300.0)

    def check_answer(self, call: EngineCall, status: int, body: bytes) -> None:
        """Raises EngineRefused with vLLM's own sentence."""
        if not 200 <= status < 300:
            raise EngineRefused(self.name, call.action, f"HTTP {status}: {_reason(body)}")

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """An adapter is named as the model; without one, the model in `body` stays: the base model's served name."""
        request = {**body, "return_token_ids": True}
        if adapter is not None:
            request["model"] = adapter
        if endpoint == "chat/completions":
            request["logprobs"] = True
        elif request.get("logprobs") is None:
            request["logprobs"] = 0  # of the sampled tokens alone
        return request

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:
        """Chat answers hold the prompt's ids beside the choices; they move into each."""
        prompt = body.get("prompt_token_ids")
        choices = []
        for choice in body["choices"]:
            whole = {**choice}
            if whole.get("prompt_token_ids") is None:
                whole["prompt_token_ids"] = prompt
            missing = [key for key in ("token_ids", "prompt_token_ids", "logprobs") if whole.get(key) is None]
            if missing:
                raise EngineRefused(self.name, "answer", f"choice {choice.get('index')} has no {', '.join(missing)}")
            choices.append(whole)
        return {**{key: value for key, value in body.items() if key != "prompt_token_ids"}, "choices": choices}

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:
        """Every choice gets `token_ids`, empty where a chunk has none; a choice's first has the prompt's ids."""
        prompt: Any = chunk.get("prompt_token_ids")
        choices = []
        for choice in chunk.get("choices", []):
            whole = {**choice, "token_ids": choice.get("token_ids") or []}
            if prompt is not None:
                whole["prompt_token_ids"] = prompt
            choices.append(whole)
        return {**{key: value for key, value in chunk.items() if key != "prompt_token_ids"}, "choices": choices}

    def _require(self, capability: InferenceCapability) -> None:
        if capability not in self.capabilities:
            raise UnsupportedCapability(
                self.name,
                str(capability.value),
                "Only its CUDA build gives memory back; on a CPU use pause and resume, or engine torch"
                " (pip install art-engine-torch).",
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
        "tool_call_parser": "hermes",
        "override_generation_config": PLAIN_SAMPLING,
        "disable_uvicorn_access_log": True,
    }
    if not config.devices:
        return options | {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
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


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:2000].decode(errors="replace")
