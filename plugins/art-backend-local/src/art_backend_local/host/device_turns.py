"""Who has the device: inference steps aside while a step trains, unless both can work at once.

Knows the capabilities that engines declare; knows no jobs and no checkpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from art_core import ArtError, EngineCall, InferenceCapability
from art_core.errors import ProcessFailed

from ..servers.replicas import Replicas

DRAIN_LIMIT_S = 1200.0


@asynccontextmanager
async def inference_aside(server: Replicas, *, report: Callable[[str], None]) -> AsyncIterator[None]:
    """Hold inference while the block runs. New requests wait at the gate; those under way are paused, or waited for
    when the engine declares no PAUSE. An engine that declares SLEEP gives its memory back meanwhile.
    """
    declared = server.engine.capabilities
    server.gate.clear()
    undo: list[EngineCall] = []
    try:
        if InferenceCapability.PAUSE in declared:
            undo.append(server.engine.resume())
            await server.call(server.engine.pause())
        else:
            await _drained(server)
        if InferenceCapability.SLEEP in declared:
            undo.append(server.engine.wake())
            await server.call(server.engine.sleep())
        yield
    finally:
        await asyncio.shield(asyncio.ensure_future(_undo(server, undo, report)))


async def _drained(server: Replicas) -> None:
    try:
        await server.drained(DRAIN_LIMIT_S)
    except TimeoutError:
        raise ProcessFailed(
            f"{server.in_flight} requests did not end within {DRAIN_LIMIT_S:g} s, so training on the same device can't"
            " begin. Limit their max_tokens, or use dedicated mode (trainer_gpu_ids and inference_gpu_ids)."
        ) from None


async def _undo(server: Replicas, calls: list[EngineCall], report: Callable[[str], None]) -> None:
    try:
        for call in reversed(calls):
            await server.call(call)
    except ArtError as error:
        # A server that died meanwhile comes back awake by itself.
        if server.up:
            report(f"inference could not go on after training: {error}")
    finally:
        server.gate.set()
