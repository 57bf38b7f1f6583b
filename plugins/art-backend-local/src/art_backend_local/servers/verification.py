"""Whether a server answers as a checkpoint: its canary prompts asked under the adapter's name, all at once, and read.

Knows the checkpoint's folder and one connection; what the answers mean is `canary`'s.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from art_core.errors import EngineRefused
from art_engine_kit.canary import CanaryPrompt, read_canary

from .canary_reading import canary_request, first_token, read_canary_answers
from .engine_connection import EngineConnection

# Any ids will do to see that an engine answers; a checkpoint without canary has no better ones.
_PROBE = CanaryPrompt(token_ids=[1, 2, 3], expected={})


async def verify_adapter(connection: EngineConnection, adapter: str, folder: Path) -> None:
    """Raises EngineRefused unless the server answers under the name `adapter`, as the checkpoint in `folder`.

    A checkpoint without a canary, such as step 0, is verified by answering at all.
    """
    canary = await asyncio.to_thread(read_canary, folder)
    prompts = canary.prompts if canary is not None and canary.prompts else [_PROBE]
    # One batch in the engine: asked in turn, each would wait for the rollouts' next step.
    asked = (_first_token(connection, adapter, prompt) for prompt in prompts)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    if canary is None or not canary.prompts:
        return
    given = [answer for answer in answers if not isinstance(answer, BaseException)]
    reading = read_canary_answers(canary, given)
    if reading.problem:
        raise EngineRefused(connection.engine.name, f"answer as {adapter}", reading.problem)


async def _first_token(connection: EngineConnection, adapter: str, prompt: CanaryPrompt) -> tuple[int, float]:
    answer = await connection.complete(canary_request(prompt), adapter)
    try:
        return first_token(answer)
    except ValueError as error:
        raise EngineRefused(connection.engine.name, f"answer as {adapter}", str(error)) from error
