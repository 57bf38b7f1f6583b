"""The plainest backend that meets every MUST it can: one process, no engine, transformers and PEFT for everything.

It samples a token at a time and trains a sequence at a time, so it is only for tiny models. It shows that the suites
ask for nothing that is the local backend's own, and its mutants show that the checks can fail. It is served by
`handle`, which takes and gives httpx messages; there is no server.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import httpx
import numpy as np

from art_core import (
    BackendCapability,
    CheckpointRef,
    LocalTrainResult,
    ModelKey,
    PolicyModel,
    PublicationReceipt,
    Registration,
    SavedStep,
    Trajectory,
    TrajectoryGroup,
    announce,
    check_groups,
    inference_name,
    installed_plugins,
    publish_saved,
    resolve_base_model,
    run_step,
)
from art_core.cancellation import to_the_end
from art_core.errors import (
    CheckpointInUse,
    CheckpointNotFound,
    InvalidName,
    NotRegistered,
    PublicationFailed,
)
from art_core.names import parse_inference_name
from art_core.publication import publish
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, saving, step_folder, whole_steps
from art_engine_kit.served_steps import ServedSteps
from art_engine_kit.sft_options import SftOptions
from art_engine_kit.train_options import TrainOptions

from .oracle import Oracle, oracle_for
from .reference_publisher import ReferencePublisher
from .reference_sampler import Rows
from .reference_trainer import Row, train_step
from .tiny_model import write_adapter

Cap = BackendCapability
URL = "http://reference.invalid"


@dataclass
class ServedModel:
    """One registered model: its base weights, its folder, and what is served of it."""

    key: ModelKey
    base: Path
    checkpoints: Path
    steps: ServedSteps
    adapters: dict[int, Path] = field(default_factory=dict)
    training: asyncio.Lock = field(default_factory=asyncio.Lock)

    def ref(self, step: int) -> CheckpointRef:
        """The checkpoint of a step."""
        return CheckpointRef(self.key, step, step_folder(self.checkpoints, step))


class ReferenceBackend:
    """See `art_core.Backend`. `path` holds the checkpoints."""

    name = "reference"
    capabilities = frozenset(
        {
            *(Cap.LEASES, Cap.DELETE_CHECKPOINTS, Cap.FORK, Cap.PULL, Cap.WARM_START),
            *(Cap.CHECKPOINTS_ON_DISK, Cap.PUBLICATION_HOOKS, Cap.CONCURRENT_INFERENCE, Cap.SFT),
        }
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = f"sk-{uuid.uuid4().hex}"
        self.registry = installed_plugins()
        self.models: dict[ModelKey, ServedModel] = {}
        self._registering = asyncio.Lock()

    def capabilities_for(self, model: PolicyModel) -> frozenset[Cap]:  # noqa: ARG002
        """The same for every model."""
        return self.capabilities

    async def register(self, model: PolicyModel) -> Registration:
        """Serve the model at its latest whole checkpoint, or at step 0."""
        key = ModelKey(model.project, model.name)
        async with self._registering:
            if key not in self.models:
                base = await resolve_base_model(self.registry, model.base_model)
                served = self._open(key, base)
                await publish(served.ref(max(whole_steps(served.checkpoints))), self.publisher(served))
                self.models[key] = served
        return Registration(
            inference_base_url=f"{URL}/{key.project}/v1", inference_api_key=self.key, base_path=self.path
        )

    async def train(
        self, model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], **options: Any
    ) -> LocalTrainResult:
        """Train one step, a sequence at a time, and publish it."""
        chosen = TrainOptions.of(options, where="ReferenceBackend.train")
        check_groups(trajectory_groups)
        return await self._train(model, trajectory_groups, trained_rows(trajectory_groups), chosen.learning_rate)

    async def train_sft(
        self, model: PolicyModel, trajectories: Sequence[Trajectory], **options: Any
    ) -> LocalTrainResult:
        """Train one step on the last reply of each conversation, all in one batch, and publish it."""
        chosen = SftOptions.of(options, where="ReferenceBackend.train_sft")
        rows = reply_rows(oracle_for(self._served(model).base), trajectories)
        return await self._train(model, [TrajectoryGroup(trajectories)], rows, float(np.mean(chosen.learning_rate)))

    async def _train(
        self, model: PolicyModel, groups: Sequence[TrajectoryGroup], rows: Sequence[Row], rate: float
    ) -> LocalTrainResult:
        served = self._served(model)
        await served.training.acquire()
        step = max(whole_steps(served.checkpoints)) + 1
        verbs = self.step(served, step, rows, rate)
        return await run_step(self.registry, self, model, groups, verbs, step=step)

    async def get_step(self, model: PolicyModel) -> int:
        """The routed step."""
        return self._served(model).steps.routed or 0

    async def list_steps(self, model: PolicyModel) -> list[int]:
        """The whole checkpoints on disk."""
        return sorted(whole_steps(self._served(model).checkpoints))

    def inference_name(self, model: PolicyModel, step: int | None = None) -> str:
        """name@step."""
        return inference_name(model.name, self._served(model).steps.routed if step is None else step)

    @asynccontextmanager
    async def lease(self, model: PolicyModel, step: int | None = None) -> AsyncIterator[str]:
        """Keep a step."""
        steps = self._served(model).steps
        held = (steps.routed or 0) if step is None else step
        steps.lease(held)
        try:
            yield inference_name(model.name, held)
        finally:
            steps.end_lease(held)

    async def delete_checkpoints(self, model: PolicyModel, steps: Sequence[int]) -> list[int]:
        """Delete steps that nobody uses."""
        served = self._served(model)
        there = whole_steps(served.checkpoints)
        wanted = [step for step in sorted(set(steps)) if step in there]
        if any(served.steps.in_use(step) for step in wanted):
            raise CheckpointInUse(f"{served.key}: one of {wanted} is served or leased, so nothing was deleted.")
        for step in wanted:
            served.steps.remove(step)
            shutil.rmtree(there[step])
            await announce(self.registry, "art_checkpoint_deleted", model=model, checkpoint=served.ref(step))
        return wanted

    async def fork_checkpoint(
        self,
        model: PolicyModel,
        from_model: str,
        *,
        from_project: str | None = None,
        not_after_step: int | None = None,
    ) -> int:
        """Copy another model's adapter to the next step of this one, and publish it."""
        source = whole_steps(self._folder(ModelKey(from_project or model.project, from_model)))
        allowed = [step for step in source if not_after_step is None or step <= not_after_step]
        if not allowed:
            raise CheckpointNotFound(f"{from_model} has no checkpoint to fork from; there: {sorted(source)}.")
        served = self._served(model)
        await served.training.acquire()
        step = max(whole_steps(served.checkpoints)) + 1
        self.copy(served, step, source[max(allowed)])
        await publish_saved(self.registry, model, served.ref(step), self.step(served, step))
        return step

    async def pull_checkpoint(
        self, model: PolicyModel, *, step: int | Literal["latest"] | None = None, local_path: Path | str | None = None
    ) -> Path:
        """Copy an adapter folder out."""
        served = self._served(model)
        wanted = served.steps.routed if step in (None, "latest") else step
        destination = Path(local_path) if local_path else self.path / "pulled" / f"{served.key.name}-{wanted}"
        destination.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(served.ref(int(wanted or 0)).path / name, destination / name)
        return destination

    async def close(self) -> None:
        """Forget everything but the files."""
        self.models.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        """Answer a chat completion, as a gateway would."""
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, "the API key is missing or wrong")
        body = json.loads(request.content)
        project = request.url.path.strip("/").partition("/")[0]
        try:
            name, asked = parse_inference_name(body["model"])
            served = self.models[ModelKey(project, name)]
            step = served.steps.acquire(asked)
        except (KeyError, CheckpointNotFound, InvalidName) as error:
            there = [inference_name(m.key.name, s) for m in self.models.values() for s in m.steps.loaded]
            return _error(404, f"{body['model']!r} is not served ({error}); served: {', '.join(there)}")
        try:
            choices = await self.sample(served, step, body)
        finally:
            served.steps.release(step)
        return httpx.Response(200, json={"model": inference_name(name, step), "choices": choices})

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Sample the choices of one request side by side, a token of each at a time."""
        oracle, rng, count = oracle_for(served.base), np.random.default_rng(), body.get("n") or 1
        prompt = oracle.chat_ids(body["messages"], body.get("tools"))
        rows: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        growing = Rows(prompt, count)
        for _ in range(body.get("max_tokens") or 16):
            for table, ids, values in zip(
                growing.logprobs(served.base, served.adapters[step]), rows, logprobs, strict=True
            ):
                chances = np.exp(table / max(float(body.get("temperature", 1.0)), 1e-4))
                ids.append(int(rng.choice(len(chances), p=chances / chances.sum())))
                values.append(float(table[ids[-1]]))
            growing.append([ids[-1] for ids in rows])
            await asyncio.sleep(0)
        end = oracle.tokenizer.eos_token_id
        choices = []
        for index, (ids, values) in enumerate(zip(rows, logprobs, strict=True)):
            stop = ids.index(end) + 1 if end in ids else len(ids)
            content: list[dict[str, Any]] = [
                {"token": str(i), "logprob": v, "bytes": None, "top_logprobs": []}
                for i, v in zip(ids[:stop], values[:stop], strict=True)
            ]
            choices.append(
                {
                    "index": index,
                    "finish_reason": "stop" if end in ids else "length",
                    "message": {"role": "assistant", "content": oracle.text(ids[:stop])},
                    "logprobs": {"content": content},
                    "token_ids": ids[:stop],
                    "prompt_token_ids": prompt,
                    "policy_version": step,
                }
            )
        return choices

    def publisher(self, served: ServedModel) -> ReferencePublisher:
        """What takes a checkpoint of a model through the stages."""
        return ReferencePublisher(served.base, served.steps, served.adapters, self.path / "loaded")

    def step(
        self,
        served: ServedModel,
        step: int,
        rows: Sequence[Row] = (),
        rate: float = 0.0,
    ) -> ReferenceStep:
        """The verbs of one step, which ends the training lock."""
        return ReferenceStep(self, served, step, rows, rate)

    def _open(self, key: ModelKey, base: Path) -> ServedModel:
        adapter = base if (base / ADAPTER_CONFIG).is_file() else None
        if adapter is not None:
            base = Path(json.loads((adapter / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"])
        served = ServedModel(key, base, self._folder(key), ServedSteps(key))
        if not whole_steps(served.checkpoints):
            if adapter is None:
                adapter = write_adapter(self.path / "identity" / uuid.uuid4().hex, base, seed=1, strength=0.0)
            self.copy(served, 0, adapter)
        return served

    def copy(self, served: ServedModel, step: int, adapter: Path) -> None:
        """Make `adapter` the checkpoint of a step."""
        with saving(served.ref(step).path, step=step, base_model=str(served.base), engine=self.name) as folder:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                shutil.copyfile(adapter / name, folder / name)

    def _folder(self, key: ModelKey) -> Path:
        return key.folder(self.path) / "checkpoints"

    def _served(self, model: PolicyModel) -> ServedModel:
        key = ModelKey(model.project, model.name)
        if key not in self.models:
            raise NotRegistered(f"{key} is not registered with this backend; await backend.register(model) first.")
        return self.models[key]


@dataclass
class ReferenceStep:
    """The verbs of one training step, for `run_step`."""

    backend: ReferenceBackend
    served: ServedModel
    step: int
    rows: Sequence[Row]
    rate: float

    async def train_and_save(self) -> SavedStep[LocalTrainResult]:
        """From the routed step; with nothing to train on, a copy of it."""
        served, checkpoint = self.served, self.served.ref(self.step)
        start = served.ref(served.steps.routed or 0).path
        metrics = {"data/step_num_gradient_steps": 0.0}
        if self.rows:
            base, rows, rate = served.base, self.rows, self.rate
            with saving(checkpoint.path, step=self.step, base_model=str(base), engine=self.backend.name) as folder:
                # Its thread would go on writing into a folder that is gone.
                metrics = await to_the_end(asyncio.to_thread(train_step, base, start, folder, rows, rate))
        else:
            self.backend.copy(served, self.step, start)
        result = LocalTrainResult(step=self.step, metrics=metrics, checkpoint_path=str(checkpoint.path))
        return SavedStep(checkpoint, result)

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        """A checkpoint that can't be published is put aside, so that its step can be made again."""
        try:
            return await publish(checkpoint, self.backend.publisher(self.served))
        except PublicationFailed as error:
            error.put_aside = self._aside(checkpoint).path
            raise

    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        """Beside its step's place, whole."""
        if self.served.steps.routed == checkpoint.step:
            return PublicationReceipt(
                model=checkpoint.model, step=checkpoint.step, inference_name=checkpoint.inference_name
            )
        return self._aside(checkpoint)

    async def let_go(self) -> None:
        """The next step of the model may begin."""
        self.served.training.release()

    def _aside(self, checkpoint: CheckpointRef) -> CheckpointRef:
        aside = checkpoint.path.with_name(f"{checkpoint.path.name}.refused-{uuid.uuid4().hex[:8]}")
        return replace(checkpoint, path=checkpoint.path.rename(aside))


def reply_rows(oracle: Oracle, trajectories: Sequence[Trajectory]) -> list[Row]:
    """(prompt, ids, 1) of the last reply of every conversation."""
    rows: list[Row] = []
    for trajectory in trajectories:
        *before, reply = trajectory.messages()
        ids = oracle.tokenizer(str(reply["content"]), add_special_tokens=False)["input_ids"]
        rows.append((oracle.chat_ids(before), ids, 1.0))
    return rows


def trained_rows(groups: Sequence[TrajectoryGroup]) -> list[Row]:
    """(prompt, sampled ids, advantage) of every choice whose advantage isn't 0."""
    rows: list[Row] = []
    for group in groups:
        rewards = np.array([trajectory.reward for trajectory in group])
        for trajectory in group:
            advantage = float((trajectory.reward - rewards.mean()) / (rewards.std() + 1e-6))
            for choice in trajectory.choices() if advantage else ():
                extra: Any = choice
                rows.append((list(extra.prompt_token_ids), list(extra.token_ids), advantage))
    return rows


def _error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})


def transport_to(opened: Sequence[ReferenceBackend]) -> httpx.MockTransport:
    """What agents of several reference backends ask through: each by its key; a wrong one the newest refuses."""

    async def handle(request: httpx.Request) -> httpx.Response:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return await next((each for each in opened if each.key == key), opened[-1]).handle(request)

    return httpx.MockTransport(handle)
