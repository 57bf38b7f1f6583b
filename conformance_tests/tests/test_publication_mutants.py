"""For each check of publication a backend that breaks it, and of all checks of both suites no other.

They are the reference backend, spoiled in one place; but for a killed server, which takes a backend that has one.
"""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_conformance.catalogue import requirements_of
from art_conformance.reference_backend import ReferenceBackend, ReferenceStep, ServedModel
from art_conformance.reference_publisher import MAX_RANK, ReferencePublisher
from art_conformance.targets import command_of
from art_conformance.tiny_model import write_adapter
from art_core import (
    CheckpointRef,
    LocalTrainResult,
    PublicationReceipt,
    Registration,
    SavedStep,
    announce,
    installed_plugins,
)
from art_core.errors import PublicationFailed
from art_core.registry import instantiate

Choices = list[dict[str, Any]]


class ColdFirstAnswer(ReferenceBackend):
    """The first answer of all is sampled before the base's own adapter is in place."""

    cold = True

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> Choices:
        if self.cold and step == 0:
            self.cold = False
            other = write_adapter(self.path / "other", served.base, seed=5)
            return await super().sample(replace(served, adapters={0: other}), 0, body)
        return await super().sample(served, step, body)


class StaleChoices(ReferenceBackend):
    """Several choices at once come from a table of adapters that takes in every other checkpoint; here, not step 2."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tried: dict[Any, list[int]] = {}

    def publisher(self, served: ServedModel) -> ReferencePublisher:
        backend = self

        class Counting(ReferencePublisher):
            async def check(self, checkpoint: CheckpointRef) -> None:
                backend.tried.setdefault(checkpoint.model, []).append(checkpoint.step)
                await super().check(checkpoint)

        return Counting(served.base, served.steps, served.adapters, self.path / "loaded")

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> Choices:
        stale = step == 2 and body.get("n", 1) > 1 and self.tried[served.key] == [0, 1, 2]
        choices = await super().sample(served, 1 if stale else step, body)
        return [{**choice, "policy_version": step} for choice in choices]


class SaysWhatWasAsked(ReferenceBackend):
    """The plain name's answers don't say which step they are from."""

    async def handle(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle(request)
        if answer.status_code != 200:
            return answer
        return httpx.Response(200, json={**answer.json(), "model": json.loads(request.content)["model"]})


class BareNotFound(ReferenceBackend):
    """A 404 says nothing of what there is."""

    async def handle(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle(request)
        return httpx.Response(404, json={"error": "no such model"}) if answer.status_code == 404 else answer


class OwnSystemMessage(ReferenceBackend):
    """Every prompt gets a first message that nobody sent."""

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> Choices:
        messages = [{"role": "system", "content": "Answer."}, *body["messages"]]
        return await super().sample(served, step, {**body, "messages": messages})


class NamedTooEarly(ReferenceStep):
    """Its step can be asked for by name before plugins are asked; what is refused goes again."""

    async def train_and_save(self) -> SavedStep[LocalTrainResult]:
        saved = await super().train_and_save()
        self.served.adapters[self.step] = saved.checkpoint.path
        self.served.steps.add(self.step)
        return saved

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        try:
            return await super().publish(checkpoint)
        except PublicationFailed:
            self.served.steps.remove(self.step)
            raise

    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        self.served.steps.remove(self.step)
        return await super().put_aside(checkpoint)


class FollowsTheRoute(ReferenceBackend):
    """A request of several choices under way switches to new weights, as when an adapter is replaced in place."""

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> Choices:
        class Latest(dict[int, Path]):
            def __getitem__(self, key: int) -> Path:
                return served.adapters[served.steps.routed or 0]

        several = body.get("n", 1) > 1 and step == served.steps.routed
        return await super().sample(replace(served, adapters=Latest()) if several else served, step, body)


class DropsWhatSpansTwoSteps(ReferenceBackend):
    """From the second step on, requests under way fail when the next one is routed."""

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> Choices:
        before = served.steps.routed or 0
        choices = await super().sample(served, step, body)
        if 1 <= before < (served.steps.routed or 0):
            raise httpx.RemoteProtocolError("the adapter was unloaded under the request")
        return choices


class LooksAwayAboveTheRank(ReferencePublisher):
    """A rank above the limit is neither refused nor asked for its canary."""

    def _looks(self, checkpoint: CheckpointRef) -> bool:
        config = checkpoint.path / "adapter_config.json"
        return bool(json.loads(config.read_bytes())["r"] <= MAX_RANK)

    async def check(self, checkpoint: CheckpointRef) -> None:
        if self._looks(checkpoint):
            await super().check(checkpoint)

    async def verify(self, checkpoint: CheckpointRef) -> None:
        if self._looks(checkpoint):
            await super().verify(checkpoint)


class Unverified(ReferencePublisher):
    async def verify(self, checkpoint: CheckpointRef) -> None:
        return None


class RoutesWhatWasVetoed(ReferenceStep):
    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        publisher = self.backend.publisher(self.served)
        await publisher.load(checkpoint)
        await publisher.route(checkpoint)
        return self._aside(checkpoint)


class StuckAfterRefusal(ReferenceStep):
    """A refused checkpoint keeps its step's place, and no later one is published."""

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        if any(self.served.checkpoints.glob("*.refused-*")):
            raise PublicationFailed(f"the place of step {checkpoint.step} is taken.", stage="route")
        return await super().publish(checkpoint)


class ReceiptWithoutStages(ReferenceStep):
    """What is told of a publication doesn't say that it was checked and verified."""

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        return replace(await super().publish(checkpoint), seconds={})


class AnnouncesSuccessAlways(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        try:
            return await super().train(model, trajectory_groups, **options)
        except BaseException:
            told = {"backend": self, "model": model}
            await announce(self.registry, "art_after_train", **told, result=LocalTrainResult(step=0))
            raise


class LoadsTheFirstStepAgain(ReferenceBackend):
    """A model that is registered again is given its untrained weights under the step that it has."""

    async def register(self, model: Any) -> Registration:
        known = self.models.get(model.key)
        registration = await super().register(model)
        if known is not None and known.steps.routed is not None:
            known.adapters[known.steps.routed] = known.adapters.get(0, known.adapters[known.steps.routed])
        return registration


class ListenersCanRefuse(ReferenceBackend):
    """A listener's error reaches the caller."""

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "plugin .+ failed in", RuntimeWarning)
            return await super().train(model, trajectory_groups, **options)


def with_publisher(kind: type[ReferencePublisher]) -> type[ReferenceBackend]:
    class Mutant(ReferenceBackend):
        def publisher(self, served: ServedModel) -> ReferencePublisher:
            return kind(served.base, served.steps, served.adapters, self.path / "loaded")

    return Mutant


def with_step(kind: type[ReferenceStep]) -> type[ReferenceBackend]:
    class Mutant(ReferenceBackend):
        def step(self, served: ServedModel, step: int, *given: Any) -> ReferenceStep:
            return kind(**vars(super().step(served, step, *given)))

    return Mutant


# The check that must notice → the reference backend, broken.
MUTANTS: dict[str, type[ReferenceBackend]] = {
    "PUB-001": ColdFirstAnswer,
    "PUB-002": StaleChoices,
    "PUB-003": SaysWhatWasAsked,
    "PUB-004": BareNotFound,
    "PUB-005": OwnSystemMessage,
    "PUB-006": with_step(NamedTooEarly),
    "PUB-007": FollowsTheRoute,
    "PUB-008": DropsWhatSpansTwoSteps,
    "PUB-010": with_publisher(LooksAwayAboveTheRank),
    "PUB-011": with_publisher(Unverified),
    "PUB-012": with_step(RoutesWhatWasVetoed),
    "PUB-013": with_step(StuckAfterRefusal),
    "PUB-014": with_step(ReceiptWithoutStages),
    "PUB-015": AnnouncesSuccessAlways,
    "PUB-016": ListenersCanRefuse,
    "PUB-021": LoadsTheFirstStepAgain,
}


# The check whose mutant cannot but fail others too → which, since:
# BackendConformance vetoes steps in any order, and cancels them where they might be vetoed.
IMPLIED = {id: {"BCK-038", "BCK-040"} for id in ("PUB-012", "PUB-013")}

# Loaded by the local backend's host as a plugin. The others of its kind, engines and workers, know no replicas.
FIRST_FOR_ALL = """
from art_backend_local.servers.replicas import Replicas

art_api = 1

async def restore(self, member, connection):
    # A server that came back is given the first adapter's weights under each name, and isn't asked for its canary.
    first = next(iter(self._held.values()))
    for adapter, held in self._held.items():
        await connection.load(adapter, first.folder, held.fingerprint)
    member.connection = connection
    for adapter in self._held:
        for tenant in self._tenants:
            tenant.restored(adapter)
    self._some_up.set()

Replicas._restore = restore
"""
# The check that must notice → what spoils the local backend.
LOCAL_MUTANTS = {"PUB-020": FIRST_FOR_ALL}


def test_every_check_has_a_mutant() -> None:
    ids = {requirement.id for requirement in requirements_of("PublicationConformance")}
    assert ids == MUTANTS.keys() | LOCAL_MUTANTS.keys()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(not_met_by_reference: Any, id: str) -> None:
    assert not_met_by_reference(MUTANTS[id]).keys() == {id} | IMPLIED.get(id, set())


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ids", [set(), *({id} for id in LOCAL_MUTANTS)], ids=["sound", *LOCAL_MUTANTS])
def test_exactly_the_check_notices_a_spoiled_local_backend(
    not_met: Any, monkeypatch: pytest.MonkeyPatch, own_tiny_model: Path, tmp_path: Path, ids: set[str]
) -> None:
    from art_backend_local import LocalBackend

    for id in ids:
        (tmp_path / "spoiling-0.1.dist-info").mkdir()
        (tmp_path / "spoiling-0.1.dist-info" / "METADATA").write_text("Name: spoiling\nVersion: 0.1\n")
        (tmp_path / "spoiling-0.1.dist-info" / "entry_points.txt").write_text("[art]\nspoiling = spoiling\n")
        (tmp_path / "spoiling.py").write_text(LOCAL_MUTANTS[id])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    engines = {"inference_engine": "torch", "training_engine": "torch"}
    open_backend = partial(LocalBackend, in_process=True, max_adapters=64, show_progress=False, **engines)
    command = command_of(instantiate(installed_plugins().inference_engine("torch")), own_tiny_model)
    found = not_met(lambda folder: open_backend(path=folder), inference_command=command)
    assert found.keys() == ids


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
def test_requests_in_flight_are_not_taken_for_granted(not_met_by_reference: Any) -> None:
    found = not_met_by_reference(DrainsBeforeItPublishes, only="test_in_flight")
    assert found.keys() == {"PUB-007"}
    assert "it shows nothing" in found["PUB-007"]
