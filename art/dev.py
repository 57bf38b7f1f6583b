"""Settings for those who know the engine underneath: what `TrainableModel(_internal_config=...)` takes.

Nothing here is read silently: an unknown key is refused with the nearest name, and so is a combination of GPUs that
cannot work. What the settings mean is the engines' affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import TypedDict

from art_core.errors import UnknownArgument

__all__ = ["InternalModelConfig"]


class InternalModelConfig(TypedDict, total=False):
    """Engine and adapter settings.

    `init_args` go to the training engine's loading of the base model, `engine_args` to the inference engine.
    `peft_args` make the LoRA configuration (default r=8, lora_alpha=16, random_state=3407), `trainer_args` AdamW
    (default betas 0.9 and 0.99, weight decay 0.1, max_grad_norm 0.1) and `max_seq_length` (32768 tokens).
    `trainer_gpu_ids` and `inference_gpu_ids` are CUDA indices: both together make a dedicated backend.
    `rollout_weights_mode` says whether rollouts run on the adapter ("lora") or on merged weights ("merged", dedicated
    only). `chat_template` is the text of a Jinja template, `chat_template_path` a file that holds one,
    `chat_template_kwargs` its variables.
    """

    init_args: dict[str, Any]
    engine_args: dict[str, Any]
    peft_args: dict[str, Any]
    trainer_args: dict[str, Any]
    trainer_gpu_ids: list[int]
    inference_gpu_ids: list[int]
    rollout_weights_mode: Literal["lora", "merged"]
    chat_template: str
    chat_template_path: str
    chat_template_kwargs: dict[str, Any]


_OBJECTS = ("init_args", "engine_args", "peft_args", "trainer_args", "chat_template_kwargs")
_TEXTS = ("chat_template", "chat_template_path")
_GPUS = ("trainer_gpu_ids", "inference_gpu_ids")


def check_internal_config(config: Mapping[str, Any]) -> None:
    """Raise UnknownArgument for a key that nothing reads, ValueError or TypeError for a value that cannot work."""
    known = InternalModelConfig.__annotations__
    for name in config:
        if name not in known:
            raise UnknownArgument(name, where="InternalModelConfig", known=known)
    for name in _OBJECTS:
        if not isinstance(config.get(name, {}), Mapping):
            raise TypeError(f"_internal_config[{name!r}] must be a dictionary, not {type(config[name]).__name__}.")
    for name in _TEXTS:
        if not isinstance(config.get(name, ""), str):
            raise TypeError(f"_internal_config[{name!r}] must be text, not {type(config[name]).__name__}.")
    if all(name in config for name in _TEXTS):
        raise ValueError("give chat_template or chat_template_path, not both: there is one chat template.")
    dedicated = _check_gpus(config)
    mode = config.get("rollout_weights_mode", "lora")
    if mode not in ("lora", "merged"):
        raise ValueError(f"rollout_weights_mode must be 'lora' or 'merged', not {mode!r}.")
    if mode == "merged" and not dedicated:
        raise ValueError(
            "rollout_weights_mode='merged' needs dedicated GPUs: set trainer_gpu_ids and inference_gpu_ids,"
            " or leave 'lora'."
        )


def _check_gpus(config: Mapping[str, Any]) -> bool:
    """True for a dedicated configuration, False for a shared one."""
    given = [name for name in _GPUS if name in config]
    if not given:
        return False
    if len(given) == 1:
        missing = next(name for name in _GPUS if name not in config)
        raise ValueError(
            f"{given[0]} is set and {missing} is not: set both for dedicated GPUs, or neither for shared ones."
        )
    for name in _GPUS:
        ids = config[name]
        if not isinstance(ids, list | tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{name} must be a list of GPU indices such as [0], not {ids!r}.")
        if not ids:
            raise ValueError(f"{name} is empty: name at least one GPU, or leave out both lists for shared GPUs.")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{name}={list(ids)} names a GPU twice.")
    common = sorted(set(config[_GPUS[0]]) & set(config[_GPUS[1]]))
    if common:
        raise ValueError(
            f"trainer_gpu_ids and inference_gpu_ids share GPU {', '.join(map(str, common))}: dedicated GPUs must be"
            " disjoint. Leave out both lists to share."
        )
    return True
