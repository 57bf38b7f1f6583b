"""How the reference backend takes a checkpoint through check, load, verify and route.

Implements `art_core.Publisher` with plain files; what is loaded is a copy, so that nothing on disk can change under it.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from art_core import CheckpointRef
from art_core.errors import AdapterMismatch, EngineRefused
from art_engine_kit.canary import read_canary
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_manifest
from art_engine_kit.served_steps import ServedSteps

from .oracle import oracle_for
from .tiny_model import shapes_of

MAX_RANK, TOLERANCE = 64, 0.2


class ReferencePublisher:
    """For one model: `adapters` are the loaded copies by step."""

    def __init__(self, base: Path, steps: ServedSteps, adapters: dict[int, Path], loaded: Path) -> None:
        self.base = base
        self.steps = steps
        self.adapters = adapters
        self.loaded = loaded

    async def check(self, checkpoint: CheckpointRef) -> None:
        """Files as the manifest says, shapes of the base, finite values."""
        read_manifest(checkpoint.path, hashes=True)
        rank = json.loads((checkpoint.path / ADAPTER_CONFIG).read_bytes())["r"]
        if rank > MAX_RANK:
            raise AdapterMismatch(f"the adapter has rank {rank}, more than {MAX_RANK}.")
        try:
            tensors = load_file(checkpoint.path / ADAPTER_WEIGHTS)
        except SafetensorError as error:
            raise AdapterMismatch(f"the adapter's weights cannot be read: {error}") from error
        shapes = shapes_of(self.base)
        allowed = {}
        for layer in range(shapes.layers):
            for module, (out_features, in_features) in shapes.modules.items():
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                allowed[f"{prefix}.lora_A.weight"] = (rank, in_features)
                allowed[f"{prefix}.lora_B.weight"] = (out_features, rank)
        for name, values in tensors.items():
            if allowed.get(name) != values.shape:
                raise AdapterMismatch(f"{name} has shape {values.shape}, and {allowed.get(name)} is needed.")
            if not np.isfinite(values).all():
                raise AdapterMismatch(f"{name} has values that are not finite.")

    async def load(self, checkpoint: CheckpointRef) -> None:
        """Copy the adapter to where nobody writes."""
        folder = self.loaded / uuid.uuid4().hex
        folder.mkdir(parents=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(checkpoint.path / name, folder / name)
        self.adapters[checkpoint.step] = folder

    async def verify(self, checkpoint: CheckpointRef) -> None:
        """The loaded copy answers the canary."""
        canary = read_canary(checkpoint.path)
        for prompt in canary.prompts if canary is not None else ():
            found = oracle_for(self.base).next_logprobs(prompt.token_ids, self.adapters[checkpoint.step])[-1]
            off = max(abs(float(found[token]) - value) for token, value in prompt.expected.items())
            if off > TOLERANCE:
                raise EngineRefused("reference", f"answer as {checkpoint.inference_name}", f"it is off by {off:.2f}")

    async def route(self, checkpoint: CheckpointRef) -> None:
        """New requests go to it."""
        self.steps.add(checkpoint.step)
        self.steps.route(checkpoint.step)

    async def unload(self, checkpoint: CheckpointRef) -> None:
        """Forget the copy."""
        self.adapters.pop(checkpoint.step, None)
