"""Whether a server answers as a checkpoint: its canary prompts asked under the adapter's name, all at once, and read.

Knows the checkpoint's folder and one connection; what the answers mean is `canary_reading`'s. The prompts may be asked
before it is known what they should be answered with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from art_core.errors import EngineRefused
from art_engine_kit.canary import read_canary

from .canary_reading import CanaryAnswer, canary_request, first_token, first_tokens, read_canary_answers
from .engine_connection import EngineConnection

# Any ids will do to see that an engine answers; a checkpoint without canary has no better ones.
_PROBE = ((1, 2, 3),)


@dataclass(frozen=True)
class CanaryAnswers:
    """What one server said to canary prompts: for each, its most likely next token and that token's logprob."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[CanaryAnswer]


async def ask_canary(connection: EngineConnection, adapter: str, prompts: Sequence[Sequence[int]]) -> CanaryAnswers:
    """Ask a server under an adapter's name. Raises EngineRefused when it gives no answer to one of them.

    All are one question, which an engine computes in one step. One that takes a prompt at a time is asked so: all at
    once too, since each in its turn would wait for the rollouts' next step.
    """
    if len(prompts) > 1:
        try:
            found = first_tokens(await connection.complete(canary_request(*prompts), adapter))
        except (EngineRefused, ValueError):
            found = []
        if len(found) == len(prompts):
            return CanaryAnswers(prompts, found)
    each = (_first_token(connection, adapter, prompt) for prompt in prompts)
    answers = await asyncio.gather(*each, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return CanaryAnswers(prompts, [answer for answer in answers if not isinstance(answer, BaseException)])


async def verify_adapter(
    connection: EngineConnection, adapter: str, folder: Path, answered: CanaryAnswers | None = None
) -> None:
    """Raises EngineRefused unless the server answers under the name `adapter`, as the checkpoint in `folder`.

    `answered` is what it said before, where it was asked; it counts if it was asked what the canary asks. A checkpoint
    without a canary, such as step 0, is verified by answering at all.
    """
    canary = await asyncio.to_thread(read_canary, folder)
    prompts = [prompt.token_ids for prompt in canary.prompts] if canary is not None else []
    if answered is None or list(map(list, answered.prompts)) != prompts:
        answered = await ask_canary(connection, adapter, prompts or _PROBE)
    if canary is None or not prompts:
        return
    reading = read_canary_answers(canary, answered.answers)
    if reading.problem:
        raise EngineRefused(connection.engine.name, f"answer as {adapter}", reading.problem)


async def _first_token(connection: EngineConnection, adapter: str, prompt: Sequence[int]) -> CanaryAnswer:
    answer = await connection.complete(canary_request(prompt), adapter)
    try:
        return first_token(answer)
    except ValueError as error:
        raise EngineRefused(connection.engine.name, f"answer as {adapter}", str(error)) from error
