"""Sorts a model's `_internal_config`: what goes to the inference engine, what to the trainer, what to the new adapter.

The names and values were judged when the model was made (`art.dev`); here only what this backend can't do is refused.
Knows no engine: what an engine takes as its arguments is the engine's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from art_core.errors import UnsupportedCapability
from art_engine_kit.lora_shape import LoraShape
from art_engine_kit.training_wire import AdapterOptions

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
    """Sort an `_internal_config` that was read already. Raises UnsupportedCapability or ValueError for what this
    backend can't do.
    """
    left = dict(config or {})
    engine_args, init_args = dict(left.pop("engine_args", {})), dict(left.pop("init_args", {}))
    trainer_args, peft_args = dict(left.pop("trainer_args", {})), dict(left.pop("peft_args", {}))
    lora = LoraShape.of(peft_args)
    if left.pop("rollout_weights_mode", "lora") == "merged":
        raise UnsupportedCapability(
            "local",
            "rollout_weights_mode='merged'",
            "Leave it out: rollouts then use the LoRA adapter itself ('lora').",
        )
    lengths = [args.pop("max_seq_length", None) for args in (init_args, trainer_args)]
    max_seq_length = next((length for length in lengths if length is not None), None)
    settings = ModelSettings(
        inference_dtype=engine_args.pop("dtype", "auto"),
        training_dtype=init_args.pop("dtype", "auto"),
        max_model_len=engine_args.pop("max_model_len", None),
        max_lora_rank=engine_args.pop("max_lora_rank", max(DEFAULT_MAX_LORA_RANK, lora.r)),
        engine_args=engine_args,
        init_args=init_args,
        trainer_gpu_ids=left.pop("trainer_gpu_ids", None),
        inference_gpu_ids=left.pop("inference_gpu_ids", None),
        adapter=AdapterOptions(
            peft_args=peft_args,
            trainer_args=trainer_args,
            chat_template=_chat_template(left.pop("chat_template", None), left.pop("chat_template_path", None)),
            chat_template_kwargs=left.pop("chat_template_kwargs", {}),
            **({} if max_seq_length is None else {"max_seq_length": max_seq_length}),
        ),
    )
    for name in left:
        raise UnsupportedCapability("local", f"_internal_config[{name!r}]", "Leave it out.")
    return settings


def _chat_template(text: str | None, path: str | None) -> str | None:
    if path is None:
        return text or None
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"_internal_config['chat_template_path']: {file} cannot be read: {error}") from error
