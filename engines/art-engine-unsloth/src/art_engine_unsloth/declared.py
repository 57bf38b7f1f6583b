"""What engine unsloth declares, the same on every machine, and what users may set. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from art_core import TrainingCapability

CAPABILITIES: Final = frozenset(
    {
        TrainingCapability.PREFIX_SHARING,
        TrainingCapability.KL_REFERENCE,
        TrainingCapability.EXACT_RESUME,
        TrainingCapability.SFT,
    }
)
# `gradient_checkpointing` is the worker's own; the others are Unsloth's, by the names that its users know.
INIT_ARGS: Final = ("load_in_4bit", "use_gradient_checkpointing")
Checkpointing = Literal["unsloth"] | bool


@dataclass(frozen=True)
class Settings:
    """How a base is loaded. `use_gradient_checkpointing` is None where each row's length decides."""

    load_in_4bit: bool = False
    use_gradient_checkpointing: Checkpointing | None = None

    @property
    def prepared_checkpointing(self) -> Checkpointing:
        """What the base is loaded with: what is prepared can be turned off row by row, and not the other way round."""
        return "unsloth" if self.use_gradient_checkpointing is None else self.use_gradient_checkpointing

    @classmethod
    def of(cls, init_args: Mapping[str, Any], *, worker: bool | None, on_gpu: bool) -> Settings:
        """Unsloth's `init_args`, all of which are known, beside the worker's `gradient_checkpointing`.

        Raises ValueError for what Unsloth can't do there, or what says two things at once.
        """
        four_bit, mode = init_args.get("load_in_4bit", False), init_args.get("use_gradient_checkpointing")
        if not isinstance(four_bit, bool):
            raise ValueError(f"load_in_4bit is {four_bit!r}; give True or False.")
        if four_bit and not on_gpu:
            raise ValueError(
                "load_in_4bit needs a GPU: on a CPU Unsloth would load the base model in 16 bit without a word."
                " Leave it out, or name a GPU in trainer_gpu_ids."
            )
        if mode is not None and mode != "unsloth" and not isinstance(mode, bool):
            raise ValueError(f"use_gradient_checkpointing is {mode!r}; give 'unsloth', True or False.")
        if mode is not None and worker is not None:
            raise ValueError("give use_gradient_checkpointing or gradient_checkpointing, not both: they mean the same.")
        if worker is not None:
            mode = "unsloth" if worker else False
        return cls(load_in_4bit=four_bit, use_gradient_checkpointing=mode)
