"""A constant number of chat completions in flight through a gateway, and what was wrong with any of them.

Half of them ask for the model's latest step, half for the latest step that was announced. Knows hooks and the gateway's
answers; knows no backend.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

import art
from art_core import CheckpointRef, Registration, hookimpl, inference_name

REQUEST_LIMIT_S = 600.0
PAUSE_AFTER_FAILURE_S = 0.5
QUESTION = "Tell me something about a small shop."


@dataclass
class SeenSteps:
    """A plugin, registered by hand: the latest step that is saved and the latest that is published, of one model."""

    saved: int = 0
    published: int = 0
    art_api: int = 1

    @hookimpl
    def art_checkpoint_saved(self, checkpoint: CheckpointRef) -> None:
        """It may be routed from now on."""
        self.saved = checkpoint.step

    @hookimpl
    async def art_checkpoint_published(self, checkpoint: CheckpointRef) -> None:
        """No older step may answer a request that is sent from now on."""
        self.published = checkpoint.step


async def small_groups(model: art.TrainableModel, tokens: int) -> list[art.TrajectoryGroup]:
    """One small group, sampled from the model, rewarded so that there is something to learn from."""
    messages: art.Messages = [{"role": "user", "content": QUESTION}]
    completion = await model.openai_client().chat.completions.create(
        messages=messages, model=model.get_inference_name(), max_tokens=tokens, n=4
    )
    return [
        art.TrajectoryGroup(
            art.Trajectory(messages_and_choices=[*messages, choice], reward=float(index % 2))
            for index, choice in enumerate(completion.choices)
        )
    ]


@dataclass
class Traffic:
    """Requests of one model. `answered` counts good answers and `tokens` what they hold; `failed` and `mislabelled`
    hold a sentence for each bad one.
    """

    name: str
    registration: Registration
    steps: SeenSteps
    max_tokens: int
    answered: int = 0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    mislabelled: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Traffic:
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.registration.inference_api_key}"},
            limits=httpx.Limits(max_connections=None),
            timeout=REQUEST_LIMIT_S,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def keep_in_flight(self, count: int) -> None:
        """Keep this many requests under way until the block is left."""
        self._tasks += [
            asyncio.create_task(self._keep_asking(index), name=f"rollouts {index}") for index in range(count)
        ]

    async def ask(self, asked: str, max_tokens: int) -> dict[str, Any] | None:
        """One request; gives its answer, or None when it failed, which is then noted."""
        before = self.steps.published
        body = {
            "model": asked,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": max_tokens,
            "temperature": 1.0,
        }
        url = f"{self.registration.inference_base_url.rstrip('/')}/chat/completions"
        try:
            answer = await self._client.post(url, json=body)
        except httpx.HTTPError as error:
            self.failed.append(f"{asked}: {error!r}")
            return None
        if answer.status_code != 200:
            self.failed.append(f"{asked}: HTTP {answer.status_code}: {answer.text[:300]}")
            return None
        content: dict[str, Any] = answer.json()
        problem = wrong_label(
            self.name, asked, content, answer.headers.get("x-art-step"), not_before=before, not_after=self.steps.saved
        )
        if problem:
            self.mislabelled.append(problem)
        self.answered += 1
        self.tokens += sum(len(choice["token_ids"]) for choice in content["choices"])
        return content

    async def first_token(self) -> tuple[float, int]:
        """Ask for one token of the latest step; gives the time (Unix seconds) of its arrival, and its step.

        Raises RuntimeError when the request fails.
        """
        content = await self.ask(self.name, 1)
        if content is None:
            raise RuntimeError(f"the request for the first token failed: {self.failed[-1]}")
        return time.time(), int(content["choices"][0]["policy_version"])

    async def _keep_asking(self, index: int) -> None:
        while True:
            asked = self.name if index % 2 == 0 else inference_name(self.name, self.steps.published)
            if await self.ask(asked, self.max_tokens) is None:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)


def wrong_label(
    name: str, asked: str, content: dict[str, Any], header: str | None, *, not_before: int, not_after: int
) -> str:
    """What is wrong with the names and steps that an answer carries; empty when they are those of what was asked.

    A request for the latest step may be answered by any step from `not_before`, published when it was sent, to
    `not_after`, the latest one saved by now.
    """
    versions = {choice.get("policy_version") for choice in content["choices"]}
    if len(versions) != 1:
        return f"{asked}: one answer holds the steps {versions}"
    (version,) = versions
    if type(version) is not int or content["model"] != inference_name(name, version) or header != str(version):
        return f"{asked}: the answer says model {content['model']}, policy_version {version!r}, x-art-step {header}"
    if asked == name:
        right = not_before <= version <= not_after
        return "" if right else f"{asked}: step {version} answers, not one of {not_before} to {not_after}"
    return "" if asked == inference_name(name, version) else f"{asked}: step {version} answers"
