"""A backend whose steps are numbers and whose training is a pause: what is measured beside it is the client's own.

Knows the Backend protocol; serves and computes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from art_core import BackendCapability, LocalTrainResult, Registration, TrajectoryGroup, inference_name


class SimulatedBackend:
    """Trains by sleeping; keeps when each step began and ended, and how many groups it had. `after_step` is called at
    the end of each.
    """

    name = "simulated"
    capabilities = frozenset({BackendCapability.CONCURRENT_INFERENCE, BackendCapability.LEASES})

    def __init__(self, path: Path, train_s: float, after_step: Callable[[], object] = lambda: None) -> None:
        self.path, self.train_s, self.step = path, train_s, 0
        self._after_step = after_step
        self.spans: list[tuple[float, float]] = []
        self.sizes: list[int] = []

    def capabilities_for(self, model: Any) -> frozenset[BackendCapability]:  # noqa: ARG002
        return self.capabilities

    async def register(self, model: Any) -> Registration:  # noqa: ARG002
        return Registration(inference_base_url="http://127.0.0.1:9/v1", inference_api_key="none", base_path=self.path)

    async def train(self, model: Any, groups: Sequence[TrajectoryGroup], **options: Any) -> LocalTrainResult:  # noqa: ARG002
        began = time.monotonic()
        await asyncio.sleep(self.train_s)
        self.spans.append((began, time.monotonic()))
        self.sizes.append(len(groups))
        self.step += 1
        self._after_step()
        return LocalTrainResult(step=self.step)

    async def get_step(self, model: Any) -> int:  # noqa: ARG002
        return self.step

    async def list_steps(self, model: Any) -> list[int]:  # noqa: ARG002
        return list(range(self.step + 1))

    def inference_name(self, model: Any, step: int | None = None) -> str:
        return inference_name(model.name, self.step if step is None else step)

    @asynccontextmanager
    async def lease(self, model: Any, step: int | None = None) -> AsyncIterator[str]:
        yield self.inference_name(model, step)
