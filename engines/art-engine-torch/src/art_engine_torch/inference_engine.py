"""Describes the torch inference server: the command that starts it and the calls that it understands.

Builds and reads, and does no I/O. The server itself is `server` and runs in a process of its own; nothing of it is
imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from art_core import EngineCall, EngineRefused, InferenceCapability, InferenceLaunch, LaunchPlan, UnknownArgument
from art_core.engines import JSON, Endpoint, cuda_env

from .declared import INFERENCE
from .names import API_KEY_VARIABLE, ENVIRONMENT

# engine_args that users may give, and the kind of value of each. All else follows from the launch.
ENGINE_ARGS: Final[Mapping[str, type]] = {
    "kv_cache_gb": float,
    "prefix_cache_gb": float,
    "max_num_seqs": int,
    "max_batch_tokens": int,
    "threads": int,
    "log_level": str,
}


class TorchInferenceEngine:
    """See `art_core.engines.InferenceEngine`. Serves on one device, base traffic beside adapters."""

    @property
    def name(self) -> str:
        """torch"""
        return "torch"

    @property
    def capabilities(self) -> frozenset[InferenceCapability]:
        """All that an inference engine can declare."""
        return INFERENCE

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        """The server on a CPU, or on the one GPU of `config.devices`.

        Raises UnknownArgument for an engine argument that doesn't exist, ValueError for one of the wrong kind or for
        several devices.
        """
        if len(config.devices) > 1:
            raise ValueError(
                f"Engine torch serves on one device, not on {len(config.devices)} ({config.devices}). Give one id in "
                "inference_gpu_ids, or use an engine that spreads a model over several: pip install art-engine-vllm."
            )
        argv = [config.python, "-m", "art_engine_torch.server", "--model", str(config.base_model)]
        argv += ["--served-model-name", config.served_name, "--host", config.host, "--port", str(config.port)]
        argv += ["--max-adapters", str(config.max_adapters), "--max-lora-rank", str(config.max_lora_rank)]
        argv += ["--dtype", config.dtype, "--device", "cuda" if config.devices else "cpu"]
        if config.max_model_len is not None:
            argv += ["--max-model-len", str(config.max_model_len)]
        if config.chat_template is not None:
            argv += ["--chat-template", str(config.chat_template)]
        for name, value in config.engine_args.items():
            argv += [f"--{name.replace('_', '-')}", str(_checked(name, value))]
        env = {**ENVIRONMENT, **cuda_env(config.devices)}
        return LaunchPlan(argv=tuple(argv), env=env, secret_env={API_KEY_VARIABLE: config.api_key})

    def load_adapter(self, adapter: str, folder: Path) -> EngineCall:
        """The server checks shapes, rank and values itself, and refuses with the reason."""
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
        """After the step under way, everything waits."""
        return EngineCall(method="POST", path="/pause?mode=keep", action="pause", timeout_s=120.0)

    def resume(self) -> EngineCall:
        """Everything goes on where it was."""
        return EngineCall(method="POST", path="/resume", action="resume", timeout_s=120.0)

    def sleep(self) -> EngineCall:
        """Pauses as well. On a GPU the weights move to the host's memory; on a CPU the caches are given back."""
        return EngineCall(method="POST", path="/sleep", action="sleep", timeout_s=120.0)

    def wake(self) -> EngineCall:
        """Resumes as well."""
        return EngineCall(method="POST", path="/wake_up", action="wake", timeout_s=120.0)

    def check_answer(self, call: EngineCall, status: int, body: bytes) -> None:
        """Raises EngineRefused with the server's own sentence."""
        if 200 <= status < 300:
            return
        try:
            reason = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = body[:2000].decode(errors="replace")
        raise EngineRefused(self.name, call.action, f"HTTP {status}: {reason}")

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
            whole = {"prompt_token_ids": prompt, **choice}
            missing = [key for key in ("token_ids", "prompt_token_ids", "logprobs") if whole.get(key) is None]
            if missing:
                raise EngineRefused(self.name, "answer", f"choice {choice.get('index')} has no {', '.join(missing)}")
            choices.append(whole)
        return {**{key: value for key, value in body.items() if key != "prompt_token_ids"}, "choices": choices}

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:
        """Every choice gets `token_ids`, empty where a chunk has none; a choice's first has the prompt's ids."""
        prompt: Any = chunk.get("prompt_token_ids")
        extra = {} if prompt is None else {"prompt_token_ids": prompt}
        choices = [{"token_ids": [], **extra, **choice} for choice in chunk.get("choices", [])]
        return {**{key: value for key, value in chunk.items() if key != "prompt_token_ids"}, "choices": choices}


def _checked(name: str, value: Any) -> Any:
    kind = ENGINE_ARGS.get(name)
    if kind is None:
        raise UnknownArgument(name, where="engine_args of the torch inference engine", known=ENGINE_ARGS)
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"engine_args of the torch inference engine: {name}={value!r} is no {kind.__name__}.")
    return value
