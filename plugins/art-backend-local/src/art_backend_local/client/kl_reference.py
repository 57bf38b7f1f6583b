"""Finds the reference policy of a KL penalty when it isn't one of the model's own steps. Knows hooks and folders."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from art_core import PluginRegistry, PolicyModel, resolve_checkpoint
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG
from art_engine_kit.train_options import TrainOptions


async def find_reference(
    registry: PluginRegistry, model: PolicyModel, options: TrainOptions, *, own_steps: Collection[int]
) -> tuple[Path | None, TrainOptions]:
    """The reference's adapter folder, and the options that go with it; None for a step of the model's own and for the
    base model. Plugins are asked for a step that the backend doesn't have.

    Raises ValueError when `kl_ref_adapter_path` is no adapter folder.
    """
    step = options.kl_penalty_reference_step
    if step is not None and step not in own_steps:
        folder = await resolve_checkpoint(registry, model, step)
        if folder is not None:
            return folder, options.model_copy(update={"kl_penalty_reference_step": None})
    if options.kl_ref_adapter_path is None:
        return None, options
    folder = await asyncio.to_thread(_adapter_folder, options.kl_ref_adapter_path)
    return folder, options.model_copy(update={"kl_ref_adapter_path": folder})


def _adapter_folder(given: Path) -> Path:
    folder = given.expanduser().resolve()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"LocalBackend.train: kl_ref_adapter_path={str(given)!r} is not a PEFT adapter folder.")
    return folder
