"""A model registered with a backend, used as an agent would use it: over HTTP, with any OpenAI client's requests.

Knows the protocol of backends and the form of the endpoint's answers; knows no backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from art_core import Backend, ModelKey, Registration, TrainResult, Trajectory, TrajectoryGroup

from .recorder import Recorder
from .serving import REQUEST_LIMIT_S, Sample, samples
from .training_data import PROMPTS, REWARDS

# So large that a step's answers are told from those of the one before; several such steps may take a tiny model apart.
RATE = 0.05
SMALL_RATE = 1e-3
ASK: list[Any] = [{"role": "user", "content": "Say something about the city."}]


@dataclass
class SuiteModel:
    """What a backend may know of a model: nothing but the protocol's members."""

    name: str
    project: str
    base_model: str
    base_path: str
    entity: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def internal_config(self) -> Mapping[str, Any]:
        return self.settings

    @property
    def key(self) -> ModelKey:
        """Its project and name."""
        return ModelKey(self.project, self.name)


@dataclass
class Agent:
    """A registered model, its endpoint, and what its hooks said."""

    backend: Backend
    model: SuiteModel
    registration: Registration
    client: httpx.AsyncClient
    heard: Recorder

    def named(self, step: int) -> str:
        """What to ask for at the endpoint for a step."""
        return self.backend.inference_name(self.model, step)

    async def post(self, name: str | None = None, *, key: str | None = None, **body: Any) -> httpx.Response:
        """Ask for a chat completion, of the latest step where no name is given, and give whatever comes back."""
        plain = self.registration.inference_model_name or self.model.name
        asked = {"model": name or plain, "messages": ASK, "max_tokens": 16, **body}
        token = self.registration.inference_api_key if key is None else key
        url = f"{self.registration.inference_base_url.rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return await self.client.post(url, json=asked, headers=headers, timeout=REQUEST_LIMIT_S)

    async def ask(self, name: str | None = None, **body: Any) -> list[Sample]:
        """Ask for a chat completion, which must work, and give its choices."""
        answer = await self.post(name, **body)
        assert answer.status_code == 200, f"HTTP {answer.status_code}: {answer.text[:1000]}"
        return samples(answer.json())

    async def groups(self, rewards: Sequence[float] = REWARDS) -> list[TrajectoryGroup]:
        """One group of sampled attempts for each of the suite's prompts."""
        return [await self._group(messages, rewards) for messages in PROMPTS]

    async def train(self, **options: Any) -> TrainResult:
        """Sample groups and train one step on them."""
        return await self.backend.train(self.model, await self.groups(), **{"learning_rate": RATE, **options})

    async def folder(self, step: int) -> Path:
        """The adapter folder of a step that this agent saw saved, fetched where the backend keeps it elsewhere."""
        path = self.heard.checkpoints()[step].path
        if not path.is_dir():
            path = Path(self.model.base_path) / "fetched" / f"{self.model.name}-{step}"
            if not path.is_dir():
                await self.backend.pull_checkpoint(self.model, step=step, local_path=path)
        return path

    async def _group(self, messages: list[Any], rewards: Sequence[float]) -> TrajectoryGroup:
        from openai.types.chat.chat_completion import Choice

        found = await self.ask(messages=messages, n=len(rewards), temperature=1.0, max_tokens=12)
        trajectories = [
            Trajectory(messages_and_choices=[*messages, Choice.model_validate(sample.choice)], reward=reward)
            for sample, reward in zip(found, rewards, strict=True)
        ]
        return TrajectoryGroup(trajectories)


def version_of(sample: Sample) -> int:
    """The step that a choice says it was sampled from."""
    version = sample.choice.get("policy_version")
    assert type(version) is int, f"a choice says policy_version={version!r}"
    return version
