"""What a training library has to offer for the shared trainer to train with it: the border of a training engine.

A policy is a base model with one trainable LoRA adapter. It turns a packed row into hidden states; logprobs, losses,
the optimizer and checkpoints are the trainer's. A factory `(PolicyRequest) -> Policy` is named `module:attr` to the
worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from .packing import PackedRow


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """What the worker asks of a policy factory.

    `base_model` is a folder of weights with its tokenizer. `dtype` "auto" means bf16 where the machine computes in
    it, else fp32. `device` "auto" means the first CUDA device, else the CPU. `gradient_checkpointing` None lets the
    policy decide row by row. `max_seq_length` is the longest row, in tokens, for libraries that fix it on loading.
    `init_args` are the engine's own; an unknown one is refused by name.
    """

    base_model: Path
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool | None = None
    max_seq_length: int = 32768
    init_args: Mapping[str, Any] | None = None


class Policy(Protocol):
    """A base model with one trainable adapter."""

    @property
    def engine(self) -> str:
        """The training engine's registered name, for the checkpoint's manifest."""

    @property
    def base_model(self) -> str:
        """The base model's folder or name, for the checkpoint's manifest."""

    @property
    def device(self) -> torch.device:
        """Where hidden states are computed."""

    @property
    def tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer. Used only for choices that came without token ids."""

    @property
    def max_length(self) -> int:
        """The longest sequence the base model takes, in tokens."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""

    @property
    def output_weight(self) -> torch.Tensor:
        """The frozen output matrix [vocabulary, hidden size]; logits are hidden states times its transpose."""

    @property
    def sharded(self) -> bool:
        """Whether each of several ranks holds but a part of the base, so that none computes without all others."""

    def adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name, in an order that is the same after every load. fp32 whatever the base's
        dtype.
        """

    def hidden_states(self, row: PackedRow) -> torch.Tensor:
        """Final hidden states [S, hidden size] of a packed row, each token seeing its ancestors and itself.

        What `output_weight` is applied to. Carries gradients towards the adapter where gradients are enabled.
        """

    def attention_mask_bytes(self, tokens: int, /) -> int:
        """What attention over a packed row of so many tokens takes for a mask of all pairs of them; 0 where its library
        computes trees without one.
        """

    def load_adapter(self, folder: Path) -> None:
        """Make the PEFT adapter in `folder` the trainable one. Raises AdapterMismatch when it does not fit the base."""

    def save_adapter(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, PEFT's format, into an existing folder."""

    def reference(self, folder: Path | None) -> AbstractContextManager[None]:
        """Within the block hidden states are those of the adapter in `folder`, or of the base alone for None."""


class PolicyFactory(Protocol):
    """What `module:attr` has to name. Called once, in the worker process."""

    def __call__(self, request: PolicyRequest) -> Policy:
        """Load the base model."""
