"""Reads a model's `_internal_config`: what goes to the inference engine, what to the trainer, what to the new adapter.

Knows the names of `art.dev.InternalModelConfig` and refuses all others. Knows no engine: what an engine takes as its
arguments is the engine's to say.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from art_core import InferenceCapability
from art_core.errors import UnknownArgument, UnsupportedCapability
from art_engine_kit.training_wire import AdapterOptions

from .lora_shape import LoraShape

_KNOWN = (
    "init_args", "engine_args", "peft_args", "trainer_args", "trainer_gpu_ids", "inference_gpu_ids",
    "rollout_weights_mode", "chat_template", "chat_template_path", "chat_template_kwargs",
)  # fmt: skip
_MAPPINGS = ("init_args", "engine_args", "peft_args", "trainer_args", "chat_template_kwargs")
DEFAULT_MAX_LORA_RANK = 16


class ModelSettings(BaseModel):
    """A model's settings as they travel to the host. GPU ids are None when the model shares its devices.

    `max_model_len` and `max_seq_length` are in tokens. `engine_args` and `init_args` hold what is left for the engines.
    """

    model_config = ConfigDict(frozen=True)

    engine_args: dict[str, Any] = {}
    init_args: dict[str, Any] = {}
    adapter: AdapterOptions = AdapterOptions()
    trainer_gpu_ids: tuple[int, ...] | None = None
    inference_gpu_ids: tuple[int, ...] | None = None
    inference_dtype: str = "auto"
    training_dtype: str = "auto"
    max_model_len: int | None = None
    max_lora_rank: int = DEFAULT_MAX_LORA_RANK

    @property
    def dedicated(self) -> bool:
        """True when training and inference have GPUs of their own."""
        return self.trainer_gpu_ids is not None

    def inference_key(self) -> str:
        """Equal for models that one inference server can serve together, base model apart."""
        return json.dumps(
            [self.engine_args, self.inference_gpu_ids, self.inference_dtype, self.max_model_len, self.max_lora_rank,
             self.adapter.chat_template],
            sort_keys=True, default=str,
        )  # fmt: skip

    def training_key(self) -> str:
        """Equal for models that one training worker can train in turn, base model apart."""
        return json.dumps(
            [self.init_args, self.trainer_gpu_ids, self.training_dtype, self.adapter.max_seq_length],
            sort_keys=True, default=str,
        )  # fmt: skip


def read_settings(config: Mapping[str, Any] | None) -> ModelSettings:
    """Read `_internal_config`. Raises UnknownArgument for a name that nothing reads and ValueError for a bad value."""
    given = dict(config or {})
    for name in given:
        if name not in _KNOWN:
            raise UnknownArgument(name, where="_internal_config", known=_KNOWN)
    for name in _MAPPINGS:
        if not isinstance(given.get(name) or {}, Mapping):
            raise ValueError(f"_internal_config[{name!r}] must be a dictionary, not {given[name]!r}.")
    engine_args, init_args = dict(given.get("engine_args") or {}), dict(given.get("init_args") or {})
    trainer_args, peft_args = dict(given.get("trainer_args") or {}), dict(given.get("peft_args") or {})
    lora = LoraShape.of(peft_args)
    trainer_gpu_ids, inference_gpu_ids = _devices(given, "trainer_gpu_ids"), _devices(given, "inference_gpu_ids")
    _check_modes(trainer_gpu_ids, inference_gpu_ids, given.get("rollout_weights_mode") or "lora")
    max_seq_length = init_args.pop("max_seq_length", None) or trainer_args.pop("max_seq_length", None)
    lengths = {} if max_seq_length is None else {"max_seq_length": int(max_seq_length)}
    return ModelSettings(
        inference_dtype=str(engine_args.pop("dtype", "auto")),
        training_dtype=str(init_args.pop("dtype", "auto")),
        max_model_len=engine_args.pop("max_model_len", None),
        max_lora_rank=int(engine_args.pop("max_lora_rank", max(DEFAULT_MAX_LORA_RANK, lora.r))),
        engine_args=engine_args,
        init_args=init_args,
        trainer_gpu_ids=trainer_gpu_ids,
        inference_gpu_ids=inference_gpu_ids,
        adapter=AdapterOptions(
            peft_args=peft_args,
            trainer_args=trainer_args,
            chat_template=_chat_template(given),
            chat_template_kwargs=dict(given.get("chat_template_kwargs") or {}),
            **lengths,
        ),
    )


def _devices(given: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    ids = given.get(name)
    if ids is None:
        return None
    if not isinstance(ids, list | tuple) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(
            f"_internal_config[{name!r}] must be a list of at least one GPU index such as [0], not {ids!r}."
        )
    return tuple(ids)


def _check_modes(trainer: tuple[int, ...] | None, inference: tuple[int, ...] | None, weights_mode: str) -> None:
    if (trainer is None) != (inference is None):
        missing = "inference_gpu_ids" if inference is None else "trainer_gpu_ids"
        raise ValueError(
            f"_internal_config: dedicated mode needs trainer_gpu_ids and inference_gpu_ids both; {missing} is missing."
            " Give both, or neither to share the device."
        )
    if trainer is not None and inference is not None and set(trainer) & set(inference):
        both = sorted(set(trainer) & set(inference))
        raise ValueError(
            f"_internal_config: GPU {both} is in trainer_gpu_ids and in inference_gpu_ids; they must be disjoint."
        )
    if weights_mode not in ("lora", "merged"):
        raise ValueError(f"_internal_config['rollout_weights_mode'] must be 'lora' or 'merged', not {weights_mode!r}.")
    if weights_mode == "merged":
        if trainer is None:
            raise ValueError(
                "_internal_config: rollout_weights_mode='merged' needs dedicated mode (trainer_gpu_ids and"
                " inference_gpu_ids)."
            )
        raise UnsupportedCapability(
            "local",
            "rollout_weights_mode='merged'",
            "Leave it out: rollouts then use the LoRA adapter itself ('lora').",
        )


def _chat_template(given: Mapping[str, Any]) -> str | None:
    text, path = given.get("chat_template"), given.get("chat_template_path")
    if text and path:
        raise ValueError("_internal_config: give chat_template (the text) or chat_template_path (a file), not both.")
    if path:
        file = Path(path).expanduser()
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"_internal_config['chat_template_path']: {file} cannot be read: {error}") from error
    return text or None


def works_at_once(settings: ModelSettings, declared: Collection[object], *, has_gpu: bool, attached: bool) -> bool:
    """True when inference goes on while a step trains: on devices of their own, on a server of the user's (`attached`,
    whose device is not ours to give), or on a CPU with an engine that declares CONCURRENT_TRAINING. Two processes on
    one GPU take turns whatever they declare, since its memory is one.
    """
    return settings.dedicated or attached or (not has_gpu and InferenceCapability.CONCURRENT_TRAINING in declared)
