"""Finds the reference policy that a KL penalty asks for. Knows hooks and folders; a step of the model's own is the
host's to find.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from art_core import PluginRegistry, PolicyModel, resolve_checkpoint
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import KlReference

from ..wire.messages import OwnStep


async def find_reference(
    registry: PluginRegistry, model: PolicyModel, options: TrainOptions, *, own_steps: Collection[int]
) -> OwnStep | KlReference | None:
    """What the options say: a step, an adapter folder, the base model for a penalty without either, None for none.
    Plugins are asked for a step that the backend doesn't have.

    Raises ValueError when `kl_ref_adapter_path` is no adapter folder.
    """
    step = options.kl_penalty_reference_step
    if step is not None:
        folder = None if step in own_steps else await resolve_checkpoint(registry, model, step)
        return OwnStep(step=step) if folder is None else KlReference(adapter=folder)
    if options.kl_ref_adapter_path is not None:
        return KlReference(adapter=await asyncio.to_thread(_adapter_folder, options.kl_ref_adapter_path))
    return KlReference() if options.kl_penalty_coef > 0 else None


def _adapter_folder(given: Path) -> Path:
    folder = given.expanduser().resolve()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"LocalBackend.train: kl_ref_adapter_path={str(given)!r} is not a PEFT adapter folder.")
    return folder
