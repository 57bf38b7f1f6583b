"""Describes SGLang's server: the command that starts it and the calls that it understands.

Builds and reads, and does no I/O. The server runs in SGLang's own environment (see `environment`).
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
from .environment import CPU_SHIMS, SERVE
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


class SglangInferenceEngine:
    """See `art_core.engines.InferenceEngine`. `flavour` None declares what holds on every machine."""

    def __init__(self, flavour: Flavour | None = None) -> None:
        self._capabilities = EVERYWHERE if flavour is None else BY_FLAVOUR[flavour]

    @property
    def name(self) -> str:
        """sglang"""
        return "sglang"

    @property
    def capabilities(self) -> frozenset[InferenceCapability]:
        """Those of the flavour."""
        return self._capabilities

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server on the GPUs of `config.devices`, or on the CPU when there are none.

        `engine_args` are SGLang's own arguments, with underscores, and `env`, variables for its process; they win over
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
            "PYTHONPATH": "" if config.devices else str(CPU_SHIMS),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Otherwise the logprobs of sampled tokens are those after the temperature.
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
            **({} if config.devices else on_cpu),
            **{str(name): str(value) for name, value in added.items()},
            **cuda_env(config.devices),
        }
        return LaunchPlan(
            argv=tuple(argv),
            env=env,
            secret_env={KEY_VARIABLE: config.api_key},
            ready_timeout_s=900.0 if config.devices else 600.0,
            stop_timeout_s=30.0,
        )

    def load_adapter(self, adapter: str, folder: Path) -> EngineCall:
        """Done once the answer is there."""
        body = {"lora_name": adapter, "lora_path": str(folder)}
        return EngineCall(method="POST", path="/load_lora_adapter", json=body, action=f"load adapter {adapter}")

    def unload_adapter(self, adapter: str) -> EngineCall:
        """Answers when the requests under way have ended; so it must not be asked while the engine is paused.

        SGLang still remembers the folder and serves it again when the name is asked for. So a name must never be given
        to other weights, nor other weights be written to that folder.
        """
        return EngineCall(
            method="POST",
            path="/unload_lora_adapter",
            json={"lora_name": adapter},
            action=f"unload adapter {adapter}",
            timeout_s=600.0,
        )

    def list_adapters(self) -> EngineCall:
        """The base model is in the answer too, and has no parent."""
        return EngineCall(method="GET", path="/v1/models", action="list adapters", timeout_s=30.0)

    def read_adapters(self, body: bytes) -> frozenset[str]:
        """The models that have a parent."""
        return frozenset(entry["id"] for entry in json.loads(body)["data"] if entry.get("parent"))

    def pause(self) -> EngineCall:
        """Requests under way freeze where they are, new ones queue."""
        body = {"mode": "in_place"}
        return EngineCall(method="POST", path="/pause_generation", json=body, action="pause", timeout_s=120.0)

    def resume(self) -> EngineCall:
        """Everything goes on where it was."""
        return EngineCall(method="POST", path="/continue_generation", json={}, action="resume", timeout_s=120.0)

    def sleep(self) -> EngineCall:
        """Not declared."""
        raise self._no_sleep()

    def wake(self) -> EngineCall:
        """Not declared."""
        raise self._no_sleep()

    def check_answer(self, call: EngineCall, status: int, body: bytes) -> None:
        """Raises EngineRefused with SGLang's own sentence; some of its refusals come with 200 and say success false."""
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        refused = isinstance(answer, dict) and answer.get("success") is False
        if refused or not 200 <= status < 300:
            raise EngineRefused(self.name, call.action, f"HTTP {status}: {_reason(answer, body)}")

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """An adapter is named as `base:adapter`: any name without a colon, unknown ones too, is the base model to
        SGLang. What is before the colon doesn't matter to it.
        """
        # An adapter named here as well would be one that nobody routed to.
        request = {key: value for key, value in body.items() if key != "lora_path"}
        if adapter is not None:
            request["model"] = f"base:{adapter}"
        if endpoint == "completions":
            return {**request, "return_token_ids": True, "logprobs": request.get("logprobs") or 0}
        request["logprobs"] = True
        if request.get("stream"):
            # return_token_ids is refused for a stream of chat; these two come in one event at its end.
            return {**request, "return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
        return {**request, "return_token_ids": True}

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:
        """Chat answers call the sampled ids `response_token_ids`."""
        choices = []
        for choice in body["choices"]:
            whole = {key: value for key, value in choice.items() if key != "response_token_ids"}
            if whole.get("token_ids") is None:
                whole["token_ids"] = choice.get("response_token_ids")
            missing = [key for key in ("token_ids", "prompt_token_ids", "logprobs") if whole.get(key) is None]
            if missing:
                raise EngineRefused(self.name, "answer", f"choice {choice.get('index')} has no {', '.join(missing)}")
            choices.append(whole)
        return {**body, "choices": choices}

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:
        """A stream of chat carries its token ids in one event at its end; they become a last chunk of each choice."""
        extension: Any = chunk.get("sglext") or {}
        rest = {key: value for key, value in chunk.items() if key != "sglext"}
        sampled = extension.get("output_ids")
        if sampled is None:
            choices = [{**choice, "token_ids": choice.get("token_ids") or []} for choice in chunk.get("choices", [])]
            return {**rest, "choices": choices}
        prompt = extension.get("input_ids")
        choices = [
            {"index": i, "delta": {}, "finish_reason": None, "token_ids": ids, "prompt_token_ids": prompt}
            for i, ids in enumerate(sampled)
        ]
        return {**rest, "choices": choices}

    def _no_sleep(self) -> UnsupportedCapability:
        return UnsupportedCapability(
            self.name,
            str(InferenceCapability.SLEEP.value),
            "Use pause and resume, or an engine that gives device memory back: pip install art-engine-vllm.",
        )


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


def _reason(answer: Any, body: bytes) -> str:
    if isinstance(answer, dict):
        error = answer.get("error")
        nested = error.get("message") if isinstance(error, dict) else error
        found = answer.get("error_message") or answer.get("message") or nested
        if found:
            return str(found)
    return body[:2000].decode(errors="replace")
