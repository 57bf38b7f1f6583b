"""Items for a pair of engines on GPUs: steps are trained and published while rollouts run, on one GPU and on two.

Knows LocalBackend as a user does.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import art
from art.local import LocalBackend
from art_core import InferenceCapability, installed_plugins
from art_runtime.environments import engine_for

from .checklist import Item, NotPossible
from .gpu_serving import GpuRun
from .rollout_traffic import SeenSteps, Traffic, small_groups

STEPS: Final = 5
IN_FLIGHT: Final = 8
TOKENS: Final = 32
PLUGIN: Final = "gpu-check-steps"


def training_items(run: GpuRun, inference: str, training: str) -> list[Item]:
    """Shared and dedicated mode with one inference engine and one training engine."""
    about = f"{inference} + {training}"
    return [
        Item(about, f"shared mode: {STEPS} steps published under load", _shared(run, inference, training)),
        Item(about, f"dedicated mode: {STEPS} steps published under load", _dedicated(run, inference, training)),
    ]


def _shared(run: GpuRun, inference: str, training: str) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        declared = engine_for(installed_plugins().inference_engine(inference)).capabilities
        turns = "sleeps while a step trains" if InferenceCapability.SLEEP in declared else "pauses while a step trains"
        return f"{turns}; {await train_under_load(run, inference, training, {})}"

    return check


def _dedicated(run: GpuRun, inference: str, training: str) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        if len(run.gpus) < 2:
            raise NotPossible("dedicated mode needs two GPUs, and there is one")
        first, second = (gpu.index for gpu in run.gpus[:2])
        settings: art.dev.InternalModelConfig = {"trainer_gpu_ids": [first], "inference_gpu_ids": [second]}
        return await train_under_load(run, inference, training, settings)

    return check


async def train_under_load(run: GpuRun, inference: str, training: str, settings: art.dev.InternalModelConfig) -> str:
    """Train and publish steps with requests in flight. Raises RuntimeError when one failed, was mislabelled, or none
    came through.
    """
    path = Path(run.folder) / f"{inference}-{training}-{'dedicated' if settings else 'shared'}"
    seen = SeenSteps()
    installed_plugins().register(seen, name=PLUGIN)
    try:
        backend = LocalBackend(
            in_process=True, path=path, inference_engine=inference, training_engine=training, show_progress=False
        )
        async with backend:
            model = art.TrainableModel(
                name="agent",
                project="gpu-check",
                base_model=str(run.base_model),
                base_path=str(path),
                _internal_config=settings,
            )
            registration = await backend.register(model)
            await model.register(backend)
            groups = await small_groups(model, TOKENS)
            async with Traffic(model.name, registration, seen, TOKENS) as traffic:
                traffic.keep_in_flight(IN_FLIGHT)
                began = time.monotonic()
                for _ in range(STEPS):
                    await backend.train(model, groups, learning_rate=1e-5)
                seconds = (time.monotonic() - began) / STEPS
                last = await traffic.first_token()
    finally:
        installed_plugins().unregister(PLUGIN)
    problems = [*traffic.failed, *traffic.mislabelled]
    if problems:
        raise RuntimeError(f"{len(problems)} of {traffic.answered} requests failed or were mislabelled: {problems[0]}")
    if last[1] != STEPS:
        raise RuntimeError(f"step {STEPS} is published, and step {last[1]} answers")
    return f"{seconds:.1f} s a step, {traffic.answered} requests answered, none failed or mislabelled"
