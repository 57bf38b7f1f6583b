"""For each check of a backend one that breaks it, and of all checks of both suites no other.

They are the reference backend, spoiled in one place.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from art_conformance.catalogue import requirements_of
from art_conformance.reference_backend import ReferenceBackend, ReferenceStep, ServedModel
from art_conformance.tiny_model import write_adapter
from art_core import ArtError, BackendCapability, LocalTrainResult, ModelKey, Registration, SavedStep, announce
from art_engine_kit.checkpoint_folder import whole_steps
from art_engine_kit.sft_options import SftOptions


class NamedBadly(ReferenceBackend):
    name = "The Reference"


@dataclass(frozen=True, kw_only=True)
class KeptResult(LocalTrainResult):
    """A result with an artifact's name."""

    artifact_name: str


class KeepsArtifacts(ReferenceBackend):
    """A sound one that names an artifact for every step, so that what needs one is checked too."""

    capabilities = ReferenceBackend.capabilities | {BackendCapability.CHECKPOINTS_AS_ARTIFACTS}

    def artifact(self, served: ServedModel, step: int) -> str:
        return f"{served.key.name}:v{step}"

    def step(self, served: ServedModel, step: int, *given: Any) -> ReferenceStep:
        backend = self

        class Named(ReferenceStep):
            async def train_and_save(self) -> SavedStep[LocalTrainResult]:
                saved = await super().train_and_save()
                named = KeptResult(**vars(saved.result), artifact_name=backend.artifact(served, step))
                return replace(saved, result=named)

        return Named(**vars(super().step(served, step, *given)))


class OneArtifact(KeepsArtifacts):
    """Gives every step the model's own name."""

    def artifact(self, served: ServedModel, step: int) -> str:
        return served.key.name


class Changing(KeepsArtifacts):
    """Declares artifacts while it has an even number of models."""

    @property
    def capabilities(self) -> Any:  # type: ignore[override]
        even = len(self.models) % 2 == 0
        return KeepsArtifacts.capabilities if even else ReferenceBackend.capabilities


class AnotherWhenRegisteredAgain(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        known = ModelKey(model.project, model.name) in self.models
        await asyncio.sleep(0)
        registration = await super().register(model)
        return replace(registration, served_steps=len(self.models)) if known else registration


class AnotherWhenRegisteredAtOnce(ReferenceBackend):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.under_way: Counter[str] = Counter()

    async def register(self, model: Any) -> Registration:
        self.under_way[model.name] += 1
        try:
            await asyncio.sleep(0)
            return replace(await super().register(model), served_steps=self.under_way[model.name])
        finally:
            self.under_way[model.name] -= 1


class NoKey(ReferenceBackend):
    async def handle(self, request: httpx.Request) -> httpx.Response:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return await super().handle(request)


def with_result(change: Any) -> type[ReferenceBackend]:
    """Every step's result is changed before anybody sees it; `change(served, result)` gives the one in its place."""

    class Step(ReferenceStep):
        async def train_and_save(self) -> SavedStep[LocalTrainResult]:
            saved = await super().train_and_save()
            return replace(saved, result=change(self.served, saved.result))

    class Mutant(ReferenceBackend):
        def step(self, served: ServedModel, step: int, *given: Any) -> ReferenceStep:
            return Step(**vars(super().step(served, step, *given)))

    return Mutant


def _without_the_norm(_: ServedModel, result: LocalTrainResult) -> LocalTrainResult:
    kept = {name: value for name, value in result.metrics.items() if name != "loss/grad_norm"}
    return replace(result, metrics=kept)


def _with_noise(_: ServedModel, result: LocalTrainResult) -> LocalTrainResult:
    return replace(result, metrics={**result.metrics, "loss/train": float(np.random.default_rng().normal())})


def _path_of_step_0(served: ServedModel, result: LocalTrainResult) -> LocalTrainResult:
    return replace(result, checkpoint_path=str(served.ref(0).path))


class LogsToo(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        told = {"model": model, "step": result.step, "split": "train"}
        await announce(self.registry, "art_log_metrics", **told, metrics=result.metrics)
        return result


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


class TakesAStepForAName(ReferenceBackend):
    """Leaves out what follows an @, and serves the model under what is left."""

    async def register(self, model: Any) -> Registration:
        return await super().register(replace(model, name=model.name.partition("@")[0]))


class InventsBase(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        if not Path(model.base_model).exists():
            return Registration(inference_base_url="http://x", inference_api_key=self.key)
        return await super().register(model)


class ForgetsProject(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        ModelKey(model.project, model.name)
        return await super().register(replace(model, project="conformance"))

    def _served(self, model: Any) -> ServedModel:
        return super()._served(replace(model, project="conformance"))


class CountsTwoAsOne(ReferenceBackend):
    """A training that waited for another one gives the other's step."""

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        served = self.models.get(ModelKey(model.project, model.name))
        waits = served is not None and served.training.locked()
        result = await super().train(model, trajectory_groups, **options)
        return replace(result, step=result.step - waits)


class DeclaresLess(ReferenceBackend):
    """Doesn't declare what it does all the same."""

    capabilities = ReferenceBackend.capabilities - {BackendCapability.PULL}


class ReusesOldSlots(ReferenceBackend):
    """A step that is three behind, leased or not, answers with the newest weights: its place was taken."""

    async def sample(self, served: ServedModel, step: int, body: dict[str, Any]) -> list[dict[str, Any]]:
        newest = served.steps.routed or 0
        choices = await super().sample(served, newest if newest - step >= 3 else step, body)
        return [{**choice, "policy_version": step} for choice in choices]


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
        SftOptions.of(options, where="train_sft")
        return await super().train_sft(model, trajectories, **{**options, "learning_rate": 0.0})


class TakesAnyBatchSize(ReferenceBackend):
    async def train_sft(self, model: Any, trajectories: Any, **options: Any) -> LocalTrainResult:
        return await super().train_sft(model, trajectories, **{**options, "batch_size": 2})


class LeavesOutTheServed(ReferenceBackend):
    """The served step isn't deleted, and whoever asked for it isn't told."""

    async def delete_checkpoints(self, model: Any, steps: Any) -> list[int]:
        served = await self.get_step(model)
        return await super().delete_checkpoints(model, [step for step in steps if step != served])


class ForksTheLatest(ReferenceBackend):
    async def fork_checkpoint(self, model: Any, from_model: str, **settings: Any) -> int:
        return await super().fork_checkpoint(model, from_model, **{**settings, "not_after_step": None})


class PullsOldest(ReferenceBackend):
    async def pull_checkpoint(self, model: Any, *, step: Any = None, local_path: Any = None) -> Path:
        return await super().pull_checkpoint(model, step=0, local_path=local_path)


class ColdStart(ReferenceBackend):
    async def register(self, model: Any) -> Registration:
        registration = await super().register(model)
        served = self._served(model)
        if Path(model.base_model) != served.base:
            served.adapters[0] = write_adapter(self.path / uuid.uuid4().hex, served.base, seed=3, strength=0.0)
        return registration


class WaitsForTraining(ReferenceBackend):
    """Requests that come while a step trains wait until it is saved."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.idle = asyncio.Event()
        self.idle.set()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await self.idle.wait()
        return await super().handle(request)

    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        self.idle.clear()
        try:
            return await super().train(model, trajectory_groups, **options)
        finally:
            self.idle.set()

    def step(self, served: ServedModel, step: int, *given: Any) -> ReferenceStep:
        idle = self.idle

        class Step(ReferenceStep):
            async def train_and_save(self) -> SavedStep[LocalTrainResult]:
                saved = await super().train_and_save()
                idle.set()
                return saved

        return Step(**vars(super().step(served, step, *given)))


class ForgetsAtClose(ReferenceBackend):
    async def close(self) -> None:
        await super().close()
        shutil.rmtree(self.path, ignore_errors=True)


class NotUnsaved(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        if not options.get("save_checkpoint", True):
            return LocalTrainResult(step=1)
        return await super().train(model, trajectory_groups, **options)


class AnnouncesTwice(ReferenceBackend):
    async def train(self, model: Any, trajectory_groups: Any, **options: Any) -> LocalTrainResult:
        result = await super().train(model, trajectory_groups, **options)
        await announce(self.registry, "art_after_train", backend=self, model=model, result=result)
        return result


class DeletedComesBack(ReferenceBackend):
    """Deletes by putting aside, and takes what it finds there for the model's own when it is opened again."""

    async def delete_checkpoints(self, model: Any, steps: Any) -> list[int]:
        kept, aside = whole_steps(self._served(model).checkpoints), self._aside(model)
        for step in kept.keys() & set(steps):
            shutil.copytree(kept[step], aside / kept[step].name, dirs_exist_ok=True)
        return await super().delete_checkpoints(model, steps)

    async def register(self, model: Any) -> Registration:
        key = ModelKey(model.project, model.name)
        if key not in self.models and self._aside(model).exists():
            shutil.copytree(self._aside(model), self._folder(key), dirs_exist_ok=True)
        return await super().register(model)

    def _aside(self, model: Any) -> Path:
        return self.path / "deleted" / model.project / model.name


class DeletesWhatIsGone(ReferenceBackend):
    """Says of each step that it was asked for that it was deleted."""

    async def delete_checkpoints(self, model: Any, steps: Any) -> list[int]:
        await super().delete_checkpoints(model, steps)
        return sorted(set(steps))


class KeepsWhatWasCancelled(ReferenceBackend):
    """A training that is cancelled leaves its step behind, though nobody will serve it."""

    def step(self, served: ServedModel, step: int, *given: Any) -> ReferenceStep:
        class Step(ReferenceStep):
            async def train_and_save(self) -> SavedStep[LocalTrainResult]:
                try:
                    return await super().train_and_save()
                except asyncio.CancelledError:
                    self.backend.copy(served, step, served.ref(step - 1).path)
                    raise

        return Step(**vars(super().step(served, step, *given)))


class ShortensNames(ReferenceBackend):
    """A name has room for a hundred characters; whatever follows is left out."""

    async def register(self, model: Any) -> Registration:
        ModelKey(model.project, model.name)
        return await super().register(replace(model, name=model.name[:100]))

    def _served(self, model: Any) -> ServedModel:
        return super()._served(replace(model, name=model.name[:100]))


# The check that must notice → the reference backend, broken.
MUTANTS: dict[str, type[ReferenceBackend]] = {
    "BCK-001": NamedBadly,
    "BCK-002": Changing,
    "BCK-003": AnotherWhenRegisteredAgain,
    "BCK-004": AnotherWhenRegisteredAtOnce,
    "BCK-005": NoKey,
    "BCK-006": with_result(_without_the_norm),
    "BCK-007": LogsToo,
    "BCK-008": IgnoresUnknown,
    "BCK-009": TakesAnyReward,
    "BCK-010": NeedsSomethingToTrain,
    "BCK-011": TrainsStrangers,
    "BCK-013": ListsNewestFirst,
    "BCK-014": TakesAStepForAName,
    "BCK-015": InventsBase,
    "BCK-016": ForgetsProject,
    "BCK-017": CountsTwoAsOne,
    "BCK-018": with_result(_with_noise),
    "BCK-019": DeclaresLess,
    "BCK-020": ReusesOldSlots,
    "BCK-021": LeavesOutTheServed,
    "BCK-022": ForksTheLatest,
    "BCK-023": PullsOldest,
    "BCK-024": ColdStart,
    "BCK-025": with_result(_path_of_step_0),
    "BCK-026": WaitsForTraining,
    "BCK-030": ForgetsAtClose,
    "BCK-031": NotUnsaved,
    "BCK-032": NamesAnotherStep,
    "BCK-033": LeasesOnce,
    "BCK-034": LearnsNothingFromReplies,
    "BCK-035": TakesAnyBatchSize,
    "BCK-036": AnnouncesTwice,
    "BCK-037": OneArtifact,
    "BCK-038": DeletedComesBack,
    "BCK-039": DeletesWhatIsGone,
    "BCK-040": KeepsWhatWasCancelled,
    "BCK-041": ShortensNames,
}
# The check whose mutant cannot but fail others too → which, since:
# PublicationConformance asks the same of a step's hooks, and opens a backend again, as any order does.
IMPLIED = {"BCK-030": {"BCK-038", "PUB-021"}, "BCK-036": {"PUB-014"}}


def test_every_check_has_a_mutant() -> None:
    assert {requirement.id for requirement in requirements_of("BackendConformance")} == MUTANTS.keys()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_the_sound_backend_meets_every_check(not_met_by_reference: Any) -> None:
    assert not_met_by_reference(KeepsArtifacts).keys() == set()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(not_met_by_reference: Any, id: str) -> None:
    assert not_met_by_reference(MUTANTS[id]).keys() == {id} | IMPLIED.get(id, set())
