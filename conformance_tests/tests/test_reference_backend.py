"""The reference backend under the same suites as every other, and one mutant of it for each check that it can break."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from art_conformance import BackendConformance, PublicationConformance
from art_conformance.backend_fixtures import agents
from art_conformance.oracle import oracle_for
from art_conformance.reference_backend import ReferenceBackend, ReferenceStep, ServedModel
from art_conformance.reference_publisher import ReferencePublisher
from art_conformance.requirements import checks_of
from art_conformance.tiny_model import write_adapter
from art_core import (
    ArtError,
    CheckpointRef,
    LocalTrainResult,
    ModelKey,
    Registration,
    SavedStep,
    ServerlessTrainResult,
    announce,
)

SUITES = (PublicationConformance, BackendConformance)


class _Reference:
    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls) -> Any:
        return ReferenceBackend

    @pytest.fixture(scope="class")
    @classmethod
    def transport(cls) -> httpx.AsyncBaseTransport:
        async def handle(request: httpx.Request) -> httpx.Response:
            # Keys are the backends' own, so the one that a request is for is found by its key.
            for backend in list(BACKENDS.values()):
                if request.headers.get("Authorization") == f"Bearer {backend.key}":
                    return await backend.handle(request)
            return httpx.Response(401, json={"error": {"message": "the API key is missing or wrong"}})

        return httpx.MockTransport(handle)


BACKENDS: dict[str, ReferenceBackend] = {}


@pytest.fixture(scope="module", autouse=True)
def known_backends() -> Any:
    """Every reference backend that is made while these tests run."""
    original = ReferenceBackend.__init__

    def remember(self: ReferenceBackend, path: Path) -> None:
        original(self, path)
        BACKENDS[self.key] = self

    patch = pytest.MonkeyPatch()
    patch.setattr(ReferenceBackend, "__init__", remember)
    yield
    patch.undo()
    BACKENDS.clear()


class TestReferencePublication(_Reference, PublicationConformance):
    known_failures = {"PUB-020": "it has no inference server that could be killed"}  # noqa: RUF012


class TestReferenceBackend(_Reference, BackendConformance):
    pass


class UncheckedPublisher(ReferencePublisher):
    async def check(self, checkpoint: CheckpointRef) -> None:
        return None


class UnverifiedPublisher(ReferencePublisher):
    async def verify(self, checkpoint: CheckpointRef) -> None:
        return None


def with_publisher(kind: type[ReferencePublisher]) -> type[ReferenceBackend]:
    class Mutant(ReferenceBackend):
        def publisher(self, served: ServedModel) -> ReferencePublisher:
            return kind(served.base, served.steps, served.adapters, self.path / "loaded")

    return Mutant


def with_choice(change: Any) -> type[ReferenceBackend]:
    """Every choice is changed before it is given; `change(choice)`."""

    class Mutant(ReferenceBackend):
        async def sample(self, served: ServedModel, step: int, body: Any) -> Any:
            choices = await super().sample(served, step, body)
            for choice in choices:
                change(choice)
            return choices

    return Mutant


class StaleAdapter(ReferenceBackend):
    """Says the new step and answers with the old one's weights, as when a reload is forgotten."""

    async def sample(self, served: ServedModel, step: int, body: Any) -> Any:
        choices = await super().sample(served, max(0, step - 1), body)
        return [{**choice, "policy_version": step} for choice in choices]


class FollowsTheRoute(ReferenceBackend):
    """A request under way switches to the new weights, as when an adapter is replaced in place."""

    async def sample(self, served: ServedModel, step: int, body: Any) -> Any:
        class Latest(dict[int, Path]):
            def __getitem__(self, key: int) -> Path:
                return served.adapters[served.steps.routed or 0]

        return await super().sample(replace(served, adapters=Latest()), step, body)


class ServesBaseForUnknown(ReferenceBackend):
    async def handle(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle(request)
        if answer.status_code != 404:
            return answer
        return httpx.Response(200, json={"model": "base", "choices": []})


class PlainName(ReferenceBackend):
    async def handle(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle(request)
        if answer.status_code != 200:
            return answer
        body = answer.json()
        return httpx.Response(200, json={**body, "model": body["model"].partition("@")[0]})


def with_step(kind: type[ReferenceStep]) -> type[ReferenceBackend]:
    class Mutant(ReferenceBackend):
        def step(self, served: ServedModel, step: int, *given: Any) -> ReferenceStep:
            return kind(**vars(super().step(served, step, *given)))

    return Mutant


class RoutesBeforePermission(ReferenceStep):
    async def train_and_save(self) -> SavedStep[LocalTrainResult]:
        saved = await super().train_and_save()
        publisher = self.backend.publisher(self.served)
        await publisher.load(saved.checkpoint)
        await publisher.route(saved.checkpoint)
        return saved


class DropsRequestsAtPublish(ReferenceBackend):
    """While a step trains nothing is answered."""

    async def handle(self, request: httpx.Request) -> httpx.Response:
        if any(served.training.locked() for served in self.models.values()):
            return httpx.Response(503, json={"error": {"message": "training"}})
        return await super().handle(request)


class StuckAfterRefusal(ReferenceBackend):
    """A refused checkpoint keeps its step's place, and the next one can't be saved."""

    refused = False

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        if self.refused:
            raise ArtError("the step exists already")
        try:
            return await super().train(model, trajectory_groups, **options)
        except ArtError:
            self.refused = True
            raise


class SwallowsRefusal(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        try:
            return await super().train(model, trajectory_groups, **options)
        except Exception:
            return LocalTrainResult(step=await self.get_step(model))


class AnnouncesTwice(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        await announce(self.registry, "art_after_train", backend=self, model=model, result=result)
        return result


class AnnouncesSuccessAlways(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        try:
            return await super().train(model, trajectory_groups, **options)
        except BaseException:
            told = {"backend": self, "model": model}
            await announce(self.registry, "art_after_train", **told, result=LocalTrainResult(step=0))
            raise


class ListenersCanRefuse(ReferenceBackend):
    """A listener's error reaches the caller."""

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        with pytest.warns() as warned:
            result = await super().train(model, trajectory_groups, **options)
        if warned:
            raise RuntimeError(str(warned[0].message))
        return result


class NamedBadly(ReferenceBackend):
    name = "The Reference"


class Changing(ReferenceBackend):
    @property
    def capabilities(self) -> Any:  # type: ignore[override]
        return frozenset(list(ReferenceBackend.capabilities)[len(self.models) :])

    @capabilities.setter
    def capabilities(self, value: Any) -> None: ...


class NewKeyEachTime(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        registration = await super().register(model)
        return replace(registration, inference_base_url=registration.inference_base_url + f"?{uuid.uuid4().hex}")


class NoKey(ReferenceBackend):
    async def handle(self, request: httpx.Request) -> httpx.Response:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return await super().handle(request)


class LogsToo(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        told = {"model": model, "step": result.step, "split": "train"}
        await announce(self.registry, "art_log_metrics", **told, metrics=result.metrics)
        return result


class NoMetrics(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        return replace(await super().train(model, trajectory_groups, **options), metrics={})


class IgnoresUnknown(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        return await super().train(model, trajectory_groups, learning_rate=options.get("learning_rate", 1e-5))


class TakesAnyReward(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        for group in trajectory_groups:
            for trajectory in group:
                trajectory.reward = trajectory.reward if np.isfinite(trajectory.reward) else 0.0
        return await super().train(model, trajectory_groups, **options)


class NeedsSomethingToTrain(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        if not trajectory_groups:
            raise ArtError("nothing to train")
        return await super().train(model, trajectory_groups, **options)


class TrainsStrangers(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        await self.register(model)
        return await super().train(model, trajectory_groups, **options)


class NamesAnotherStep(ReferenceBackend):
    def inference_name(self, model: Any, step: int | None = None) -> str:
        return super().inference_name(model, step or 0)


class ListsNewestFirst(ReferenceBackend):
    async def list_steps(self, model: Any) -> list[int]:
        return (await super().list_steps(model))[::-1]


class TakesAnyName(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        clean = replace(model, name="clean", project="clean")
        return await super().register(clean)


class InventsBase(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        if not Path(model.base_model).exists():
            return Registration(inference_base_url="http://x", inference_api_key=self.key)
        return await super().register(model)


class ForgetsProject(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        return await super().register(replace(model, project="conformance"))

    def _served(self, model: Any) -> ServedModel:
        return super()._served(replace(model, project="conformance"))


class TrainsAtOnce(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        return replace(result, step=1)


class NotReproducible(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        noise = float(np.random.default_rng().normal())
        return replace(result, metrics={**result.metrics, "loss/train": noise})


class DeclaresLess(ReferenceBackend):
    """Declares nothing, and does it all the same."""

    capabilities = frozenset()


class LeaseOfAnother(ReferenceBackend):
    @asynccontextmanager
    async def lease(self, model: Any, step: int | None = None) -> AsyncIterator[str]:
        yield self.inference_name(model, 0)


class LeasesOnce(ReferenceBackend):
    """The first who lets go ends the lease of all."""

    @asynccontextmanager
    async def lease(self, model: Any, step: int | None = None) -> AsyncIterator[str]:
        steps = self._served(model).steps
        held = (steps.routed or 0) if step is None else step
        if held not in self.leased:
            steps.lease(held)
            self.leased.add(held)
        try:
            yield self.inference_name(model, held)
        finally:
            if held in self.leased:
                self.leased.remove(held)
                steps.end_lease(held)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.leased: set[int] = set()


class LearnsNothingFromReplies(ReferenceBackend):
    async def train_sft(self, model: Any, trajectories: Any, **options: Any) -> LocalTrainResult:
        return await super().train_sft(model, trajectories, **{**options, "learning_rate": 0.0})


class TakesAnyBatchSize(ReferenceBackend):
    async def train_sft(self, model: Any, trajectories: Any, **options: Any) -> LocalTrainResult:
        return await super().train_sft(model, trajectories, learning_rate=1e-3)


class OneArtifact(ReferenceBackend):
    """Says that it keeps artifacts, and gives every step the model's own name."""

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> Any:
        result = await super().train(model, trajectory_groups, **options)
        return ServerlessTrainResult(step=result.step, metrics=result.metrics, artifact_name=model.name)


class DeletesAnything(ReferenceBackend):
    async def delete_checkpoints(self, model: Any, steps: Any) -> list[int]:
        return list(steps)


class ForksNothing(ReferenceBackend):
    async def fork_checkpoint(self, model: Any, from_model: str, **settings: Any) -> int:
        return 0


class PullsOldest(ReferenceBackend):
    async def pull_checkpoint(self, model: Any, *, step: Any = None, local_path: Any = None) -> Path:
        return await super().pull_checkpoint(model, step=0, local_path=local_path)


class ColdStart(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        key = ModelKey(model.project, model.name)
        registration = await super().register(model)
        served = self.models[key]
        if Path(model.base_model) != served.base:
            served.adapters[0] = write_adapter(self.path / uuid.uuid4().hex, served.base, seed=3, strength=0.0)
        return registration


class PathOfAnother(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        return replace(result, checkpoint_path=str(self._served(model).ref(0).path))


class ForgetsAtClose(ReferenceBackend):
    async def close(self) -> None:
        await super().close()
        shutil.rmtree(self.path, ignore_errors=True)


class NotUnsaved(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        if not options.get("save_checkpoint", True):
            return LocalTrainResult(step=1)
        return await super().train(model, trajectory_groups, **options)


def _next_version(choice: Any) -> None:
    choice["policy_version"] += 1


def _no_prompt(choice: Any) -> None:
    del choice["prompt_token_ids"]


MUTANTS: dict[str, type[ReferenceBackend]] = {
    "PUB-001": with_choice(_next_version),
    "PUB-002": StaleAdapter,
    "PUB-003": PlainName,
    "PUB-004": ServesBaseForUnknown,
    "PUB-005": with_choice(_no_prompt),
    "PUB-006": with_step(RoutesBeforePermission),
    "PUB-007": FollowsTheRoute,
    "PUB-008": DropsRequestsAtPublish,
    "PUB-010": with_publisher(UncheckedPublisher),
    "PUB-011": with_publisher(UnverifiedPublisher),
    "PUB-012": SwallowsRefusal,
    "PUB-013": StuckAfterRefusal,
    "PUB-014": AnnouncesTwice,
    "PUB-015": AnnouncesSuccessAlways,
    "PUB-016": ListenersCanRefuse,
    "BCK-001": NamedBadly,
    "BCK-002": Changing,
    "BCK-003": NewKeyEachTime,
    "BCK-004": NewKeyEachTime,
    "BCK-005": NoKey,
    "BCK-006": NoMetrics,
    "BCK-007": LogsToo,
    "BCK-008": IgnoresUnknown,
    "BCK-009": TakesAnyReward,
    "BCK-010": NeedsSomethingToTrain,
    "BCK-011": TrainsStrangers,
    "BCK-013": ListsNewestFirst,
    "BCK-014": TakesAnyName,
    "BCK-015": InventsBase,
    "BCK-016": ForgetsProject,
    "BCK-017": TrainsAtOnce,
    "BCK-018": NotReproducible,
    "BCK-019": DeclaresLess,
    "BCK-020": LeaseOfAnother,
    "BCK-021": DeletesAnything,
    "BCK-022": ForksNothing,
    "BCK-023": PullsOldest,
    "BCK-024": ColdStart,
    "BCK-025": PathOfAnother,
    "BCK-026": DropsRequestsAtPublish,
    "BCK-030": ForgetsAtClose,
    "BCK-031": NotUnsaved,
    "BCK-032": NamesAnotherStep,
    "BCK-033": LeasesOnce,
    "BCK-034": LearnsNothingFromReplies,
    "BCK-035": TakesAnyBatchSize,
    "BCK-036": AnnouncesTwice,
    "BCK-037": OneArtifact,
}
WITHOUT_MUTANT = {"PUB-020": "the reference backend has no server to kill"}


async def run_check(id: str, kind: type[ReferenceBackend], base_model: Path, tmp_path: Path, factory: Any) -> None:
    """Call the method that checks `id` on a backend of `kind`, with what its parameters ask for."""
    suite, name = next((s, name) for s in SUITES for name, _, r in checks_of(s) if r.id == id)
    method = getattr(suite(), name)
    backend = kind(tmp_path / "backend")
    transport = httpx.MockTransport(partial(_to_the_newest, backend))
    async with agents(lambda: backend, base_model, tmp_path, transport) as new_agent:
        parameters = inspect.signature(method).parameters
        there = {
            "backend": backend,
            "new_agent": new_agent,
            "oracle": oracle_for(base_model),
            "conformance_model": base_model,
            "tmp_path": tmp_path,
            "open_backend": kind,
            "tmp_path_factory": factory,
        }
        if "agent" in parameters:
            there["agent"] = await new_agent()
        await method(**{parameter: there[parameter] for parameter in parameters})


async def _to_the_newest(backend: ReferenceBackend, request: httpx.Request) -> httpx.Response:
    """By key, or to the check's own backend, which refuses a wrong key itself."""
    chosen = BACKENDS.get(request.headers.get("Authorization", "").removeprefix("Bearer "), backend)
    return await chosen.handle(request)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize("id", MUTANTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_the_check_notices(id: str, own_tiny_model: Path, tmp_path: Path, tmp_path_factory: Any) -> None:
    with pytest.raises((AssertionError, ArtError, pytest.fail.Exception)):
        await run_check(id, MUTANTS[id], own_tiny_model, tmp_path, tmp_path_factory)


class DrainsBeforeItPublishes(ReferenceBackend):
    """While a step is published nothing is under way: requests wait for it, and it waits for requests."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open = asyncio.Event()
        self.open.set()
        self.under_way = 0

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await self.open.wait()
        self.under_way += 1
        try:
            return await super().handle(request)
        finally:
            self.under_way -= 1

    def publisher(self, served: ServedModel) -> ReferencePublisher:
        backend = self

        class Publisher(ReferencePublisher):
            async def check(self, checkpoint: CheckpointRef) -> None:
                if checkpoint.step:
                    backend.open.clear()
                while backend.under_way:
                    await asyncio.sleep(0.01)
                await super().check(checkpoint)

        return Publisher(served.base, served.steps, served.adapters, self.path / "loaded")

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        try:
            return await super().train(model, trajectory_groups, **options)
        finally:
            self.open.set()


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="function")
async def test_requests_in_flight_are_not_taken_for_granted(
    own_tiny_model: Path, tmp_path: Path, tmp_path_factory: Any
) -> None:
    with pytest.raises(AssertionError, match="it shows nothing"):
        await run_check("PUB-007", DrainsBeforeItPublishes, own_tiny_model, tmp_path, tmp_path_factory)


def test_every_check_has_a_mutant_or_a_reason() -> None:
    live = {requirement.id for suite in SUITES for _, _, requirement in checks_of(suite)}
    assert live == MUTANTS.keys() | WITHOUT_MUTANT.keys()
    assert not MUTANTS.keys() & WITHOUT_MUTANT.keys()
