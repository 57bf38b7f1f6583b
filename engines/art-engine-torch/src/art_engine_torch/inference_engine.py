"""Describes the torch inference server: the command that starts it and the calls that it understands.

Builds and reads, and does no I/O. The server itself is `server` and runs in a process of its own; nothing of it is
imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from art_core import InferenceLaunch, LaunchPlan
from art_core.errors import UnknownArgument
from art_engine_kit.environment import TORCH_VARIABLES, cuda_env
from art_engine_kit.openai_server import OpenAIServerEngine

from .declared import INFERENCE
from .names import API_KEY_VARIABLE

# engine_args that users may give, and the kind of value of each. All else follows from the launch.
ENGINE_ARGS: Final[Mapping[str, type]] = {
    "kv_cache_gb": float,
    "prefix_cache_gb": float,
    "max_num_seqs": int,
    "max_batch_tokens": int,
    "threads": int,
    "log_level": str,
    "trust_request_chat_template": bool,
}


class TorchInferenceEngine(OpenAIServerEngine):
    """See `art_core.engines.InferenceEngine`. Serves on one device, base traffic beside adapters.

    The server checks an adapter's shapes, rank and values itself. Asleep, the weights are in the host's memory on a
    GPU; on a CPU the caches are given back.
    """

    name = "torch"
    capabilities = INFERENCE
    names_fields = True

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
            argv += _argument(name, value)
        env = {**TORCH_VARIABLES, **cuda_env(config.devices)}
        return LaunchPlan(argv=tuple(argv), env=env, secret_env={API_KEY_VARIABLE: config.api_key})


def _argument(name: str, value: Any) -> list[str]:
    kind = ENGINE_ARGS.get(name)
    if kind is None:
        raise UnknownArgument(name, where="engine_args of the torch inference engine", known=ENGINE_ARGS)
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"engine_args of the torch inference engine: {name}={value!r} is no {kind.__name__}.")
    option = f"--{name.replace('_', '-')}"
    if kind is bool:
        return [option] if value else []
    return [option, str(value)]
