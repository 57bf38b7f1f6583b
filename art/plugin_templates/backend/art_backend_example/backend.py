"""The backend: models by name, the verbs of a step, and chat completions. Knows art_core alone, and `served`.

It gives the verbs of a step to `run_step` and its stages of publication to `publish`; what it doesn't declare it
refuses. Requests are taken by `handle`, as httpx messages; there is no server. What needs torch is in `served`,
imported with the first model.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import httpx

from art_core import (
    BackendCapability,
    CheckpointRef,
    LocalTrainResult,
    ModelKey,
    PolicyModel,
    PublicationReceipt,
    Registration,
    SavedStep,
    TrainResult,
    Trajectory,
    TrajectoryGroup,
    check_groups,
    inference_name,
    installed_plugins,
    resolve_base_model,
    run_step,
)
from art_core.cancellation import to_the_end
from art_core.errors import (
    AdapterMismatch,
    CheckpointNotFound,
    EngineRefused,
    InvalidName,
    NotRegistered,
    PublicationFailed,
    UnknownArgument,
    UnsupportedCapability,
)
from art_core.names import parse_inference_name
from art_core.publication import publish

from .plugin import CAPABILITIES

if TYPE_CHECKING:
    from .served import Served

OPTIONS = {"learning_rate": 5e-6, "save_checkpoint": True, "packed_sequence_length": None}  # yours: what train takes
URL = "http://example.invalid"  # yours: where models are asked
MAX_RANK = 64


class ExampleBackend:
    """See `art_core.Backend`."""

    name = "example"
    capabilities = CAPABILITIES

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.key = f"example-{uuid.uuid4().hex}"
        self._models: dict[ModelKey, Served] = {}
        self._registering = asyncio.Lock()

    def capabilities_for(self, model: PolicyModel) -> frozenset[BackendCapability]:
        return self.capabilities

    async def register(self, model: PolicyModel) -> Registration:
        key = ModelKey(model.project, model.name)
        async with self._registering:
            if key not in self._models:
                base = await resolve_base_model(installed_plugins(), model.base_model)
                # A thread can't be cancelled: half done, it would go on writing beside the next call.
                await to_the_end(self._open_and_publish(key, base))
        url = f"{URL}/{key.project}/v1"
        return Registration(inference_base_url=url, inference_api_key=self.key, base_path=self.path)

    async def _open_and_publish(self, key: ModelKey, base: Path) -> None:
        served = await asyncio.to_thread(_open, key, key.folder(self.path) / "example", base)
        await publish(served.checkpoint(served.saved()[-1]), Publisher(served))
        self._models[key] = served

    async def train(
        self, model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], **options: Any
    ) -> TrainResult:
        for name in options:
            if name not in OPTIONS:
                raise UnknownArgument(name, where="ExampleBackend.train", known=OPTIONS)
        check_groups(trajectory_groups)
        served = self._served(model)
        await served.training.acquire()
        step = served.saved()[-1] + 1
        verbs = Step(served, step, trajectory_groups, {**OPTIONS, **options}["learning_rate"])
        return await run_step(installed_plugins(), self, model, trajectory_groups, verbs, step=step)

    async def train_sft(self, model: PolicyModel, trajectories: Sequence[Trajectory], **options: Any) -> TrainResult:
        raise self._unsupported(BackendCapability.SFT, "Use art-backend-local: pip install art-backend-local.")

    async def get_step(self, model: PolicyModel) -> int:
        return self._served(model).routed

    async def list_steps(self, model: PolicyModel) -> list[int]:
        return self._served(model).saved()

    def inference_name(self, model: PolicyModel, step: int | None = None) -> str:
        return inference_name(model.name, self._served(model).routed if step is None else step)

    def lease(self, model: PolicyModel, step: int | None = None) -> AbstractAsyncContextManager[str]:
        raise self._unsupported(BackendCapability.LEASES, "Ask for the step by its name; it stays loaded.")

    async def delete_checkpoints(self, model: PolicyModel, steps: Sequence[int]) -> list[int]:
        raise self._unsupported(BackendCapability.DELETE_CHECKPOINTS, "Delete the folders when nothing runs.")

    async def fork_checkpoint(
        self,
        model: PolicyModel,
        from_model: str,
        *,
        from_project: str | None = None,
        not_after_step: int | None = None,
    ) -> int:
        raise self._unsupported(BackendCapability.FORK, "Copy the model's folder when nothing runs.")

    async def pull_checkpoint(
        self, model: PolicyModel, *, step: int | Literal["latest"] | None = None, local_path: Path | str | None = None
    ) -> Path:
        raise self._unsupported(BackendCapability.PULL, "Copy the folder that TrainResult names.")

    async def close(self) -> None:
        for served in self._models.values():
            served.thread.shutdown(wait=False)
        self._models.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        """Answer a chat completion."""
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, "the API key is missing or wrong")
        body = json.loads(request.content)
        try:
            name, asked = parse_inference_name(body["model"])
            served = self._models[ModelKey(request.url.path.strip("/").partition("/")[0], name)]
            step = served.routed if asked is None else asked
            if not served.has(step) or step > served.routed:
                raise CheckpointNotFound(f"step {step} is not served")
        except (KeyError, CheckpointNotFound, InvalidName):
            there = [inference_name(m.key.name, step) for m in self._models.values() for step in range(m.routed + 1)]
            return _error(404, f"{body['model']!r} is not served; served: {', '.join(there)}")
        choices = [await _sample(served, step, body, index) for index in range(body.get("n") or 1)]
        return httpx.Response(200, json={"model": inference_name(name, step), "choices": choices})

    def _unsupported(self, capability: BackendCapability, instead: str) -> UnsupportedCapability:
        return UnsupportedCapability(self.name, str(capability), instead)

    def _served(self, model: PolicyModel) -> Served:
        key = ModelKey(model.project, model.name)
        if key not in self._models:
            raise NotRegistered(f"{key} is not registered with this backend; await backend.register(model) first.")
        return self._models[key]


@dataclass
class Step:
    """The verbs of one training step."""

    served: Served
    step: int
    groups: Sequence[TrajectoryGroup]
    learning_rate: float

    async def train_and_save(self) -> SavedStep[LocalTrainResult]:
        checkpoint = self.served.checkpoint(self.step)
        try:
            metrics = await to_the_end(self.served.work(self.served.train, self.step, self.groups, self.learning_rate))
        except asyncio.CancelledError:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            raise
        result = LocalTrainResult(step=self.step, metrics=metrics, checkpoint_path=str(checkpoint.path))
        return SavedStep(checkpoint, result)

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        try:
            return await publish(checkpoint, Publisher(self.served))
        except PublicationFailed as error:
            error.put_aside = self._aside(checkpoint).path
            raise

    async def put_aside(self, checkpoint: CheckpointRef) -> PublicationReceipt | CheckpointRef:
        if self.served.routed == checkpoint.step:
            name = checkpoint.inference_name
            return PublicationReceipt(model=checkpoint.model, step=checkpoint.step, inference_name=name)
        return self._aside(checkpoint)

    async def let_go(self) -> None:
        self.served.training.release()

    def _aside(self, checkpoint: CheckpointRef) -> CheckpointRef:
        place = checkpoint.path.with_name(f"{checkpoint.path.name}.refused-{uuid.uuid4().hex[:8]}")
        return replace(checkpoint, path=checkpoint.path.rename(place))


@dataclass
class Publisher:
    """How a checkpoint of one model gets served."""

    served: Served

    async def check(self, checkpoint: CheckpointRef) -> None:
        rank = json.loads((checkpoint.path / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        if rank > MAX_RANK:
            raise AdapterMismatch(f"the adapter in {checkpoint.path} has rank {rank}, more than {MAX_RANK}.")

    async def load(self, checkpoint: CheckpointRef) -> None:
        await self.served.work(self.served.load, checkpoint)

    async def verify(self, checkpoint: CheckpointRef) -> None:
        off = await self.served.work(self.served.off, checkpoint)
        if not off < 0.05:
            raise EngineRefused("example", f"answer as {checkpoint.inference_name}", f"it is off by {off:.3f}")

    async def route(self, checkpoint: CheckpointRef) -> None:
        self.served.routed = checkpoint.step

    async def unload(self, checkpoint: CheckpointRef) -> None:
        if self.served.has(checkpoint.step):
            await self.served.work(self.served.forget, f"s{checkpoint.step}")


async def _sample(served: Served, step: int, body: dict[str, Any], index: int) -> dict[str, Any]:
    """One choice, a token at a time, with its token ids and logprobs."""
    text = served.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    prompt = served.tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < (body.get("max_tokens") or 16) and served.tokenizer.eos_token_id not in ids:
        temperature = float(body.get("temperature", 1.0))
        token, logprob = await served.work(served.next_token, step, [*prompt, *ids], temperature)
        ids.append(token)
        logprobs.append(logprob)
    content: list[dict[str, Any]] = [
        {"token": str(token), "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(ids, logprobs, strict=True)
    ]
    return {
        "index": index,
        "finish_reason": "stop" if served.tokenizer.eos_token_id in ids else "length",
        "message": {"role": "assistant", "content": served.tokenizer.decode(ids)},
        "logprobs": {"content": content},
        "token_ids": ids,
        "prompt_token_ids": prompt,
        "policy_version": step,
    }


def _error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})


def _open(key: ModelKey, folder: Path, base: Path) -> Served:
    from .served import Served

    return Served.open(key, folder, base)
