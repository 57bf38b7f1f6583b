"""Loads a base model with Unsloth: the one place that imports it, and that says which bases it is taken for.

What importing Unsloth patches (transformers, PEFT, TRL, torch's checkpointing) is patched in this process alone. Knows
no adapter and no row.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..declared import Settings

# Those whose final hidden states times the output matrix are the logits, and whose layers Unsloth has kernels for.
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Base:
    """A base model as Unsloth loads it, frozen; `projections` are its linear layers by their paths."""

    model: Any
    unsloth: Any
    projections: dict[str, tuple[int, int]]

    @property
    def config(self) -> Any:
        """transformers' config."""
        return self.model.config

    @property
    def decoder(self) -> Any:
        """Maps ids to final hidden states. An adapter's layers are put into it."""
        return self.model.model

    @property
    def output_weight(self) -> Tensor:
        """[vocabulary, hidden size]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight


def import_unsloth() -> Any:
    """Unsloth's FastLanguageModel, that of a CPU where no GPU is to be seen. Takes 10 to 30 seconds the first time."""
    with redirect_stdout(sys.stderr):
        from unsloth import FastLanguageModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return FastLanguageModel


def load_base(folder: Path, config: Any, *, device: torch.device, dtype: torch.dtype, settings: Settings) -> Base:
    """Load the base model in `folder`, frozen. `config` is transformers'.

    Raises ValueError for one that isn't computed as it is meant.
    """
    refuse_windows(folder, config)
    unsloth = import_unsloth()
    on_gpu = device.type == "cuda"
    # In training mode transformers, which computes on a CPU, would leave out some of what is attended to.
    further = {} if on_gpu else {"attention_dropout": 0.0}
    with redirect_stdout(sys.stderr):
        model, _ = unsloth.from_pretrained(
            model_name=str(folder),
            # More would have Unsloth stretch the base's positions; longer rows are let through below.
            max_seq_length=config.max_position_embeddings,
            dtype=dtype,
            load_in_4bit=settings.load_in_4bit,
            local_files_only=True,
            use_gradient_checkpointing=settings.prepared_checkpointing,
            **further,
        )
    if model.device.type != device.type:
        raise ValueError(
            f"Unsloth loaded the base model onto {model.device}, and {device} was asked for: it found no GPU that it"
            " can use. See whether the environment's torch sees one."
        )
    if model.get_output_embeddings().bias is not None:
        raise ValueError(f"the base model in {folder} has an output bias, which no engine here computes.")
    model.requires_grad_(False)
    decoder = model.model
    # Both are switches of Unsloth's own. In training it drops a mask unless told to keep it, and its rows end at
    # max_seq_length unless they are packed.
    decoder._unsloth_keep_padding_mask = True
    decoder._unsloth_allow_packed_overlength = True
    projections = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return Base(model, unsloth, projections)


def require_family(folder: Path) -> None:
    """Raise ValueError for a base that Unsloth has no kernels for. Imports nothing for it."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"engine unsloth does not train the base model in {folder}: its model_type is {kind!r}, not one of"
            f" {', '.join(FAMILIES)}."
        )


def refuse_windows(folder: Path, config: Any) -> None:
    """Raise ValueError for a base whose layers see a part of a row only. `config` is transformers'."""
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds or getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"engine unsloth does not train the base model in {folder}: it has sliding windows, and a packed row needs"
            " a mask of its own."
        )
