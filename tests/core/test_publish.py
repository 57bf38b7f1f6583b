"""`publish` with publishers that fail, hang or are cancelled at each stage: users never notice but by the error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest

from art_core import CheckpointRef, ModelKey, PublicationReceipt
from art_core.errors import AdapterMismatch, EngineRefused, PublicationFailed
from art_core.publication import Publication, PublicationLimits, PublicationStage, publish
from art_engine_kit.served_steps import ServedSteps

KEY = ModelKey("project", "agent")
STAGES = ("check", "load", "verify", "route")
MAY_BE_LOADED = {"check": False, "load": True, "verify": True, "route": True}
Act = Callable[[], Awaitable[None]]


class RecordingPublisher:
    """Keeps what was called, and does `act` in place of the stage called `at`."""

    def __init__(self, at: str = "", act: Act | None = None, unload: Act | None = None) -> None:
        self.calls: list[str] = []
        self.at, self.act, self.act_unload = at, act, unload
        self.entered = asyncio.Event()
        self.served = ServedSteps(KEY)
        self.served.add(1)
        self.served.route(1)

    async def _stage(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at and self.act is not None:
            self.entered.set()
            await self.act()

    async def check(self, checkpoint: CheckpointRef) -> None:
        await self._stage("check")

    async def load(self, checkpoint: CheckpointRef) -> None:
        await self._stage("load")

    async def verify(self, checkpoint: CheckpointRef) -> None:
        await self._stage("verify")
        self.served.add(checkpoint.step)

    async def route(self, checkpoint: CheckpointRef) -> None:
        await self._stage("route")
        self.served.route(checkpoint.step)

    async def unload(self, checkpoint: CheckpointRef) -> None:
        self.calls.append("unload")
        if self.act_unload is not None:
            await self.act_unload()
        if checkpoint.step in self.served.loaded:
            self.served.remove(checkpoint.step)


@pytest.fixture
def checkpoint(tmp_path: Path) -> CheckpointRef:
    return CheckpointRef(KEY, 2, tmp_path / "0002")


def raising(error: BaseException) -> Act:
    async def act() -> None:
        raise error

    return act


async def hang() -> None:
    await asyncio.Event().wait()


def calls_until(stage: str) -> list[str]:
    reached = list(STAGES[: STAGES.index(stage) + 1])
    return reached + (["unload"] if MAY_BE_LOADED[stage] else [])


async def test_every_stage_runs_once_in_order_and_the_receipt_says_so(checkpoint: CheckpointRef) -> None:
    publisher = RecordingPublisher()
    receipt = await publish(checkpoint, publisher)
    assert publisher.calls == list(STAGES)
    assert publisher.served.routed == 2
    assert (receipt.model, receipt.step, receipt.inference_name) == (KEY, 2, "agent@2")
    assert list(receipt.seconds) == ["checked", "loaded", "verified", "routed"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "error",
    [
        AdapterMismatch("lora_A is 7 wide, the base model 576."),
        EngineRefused("torch", "load", "no memory"),
        OSError("disk gone"),
        ValueError("a bug in a plugin"),
        KeyError("adapters"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_stage_that_fails_leaves_the_old_step_served(
    checkpoint: CheckpointRef, stage: str, error: Exception
) -> None:
    publisher = RecordingPublisher(stage, raising(error))
    with pytest.raises(PublicationFailed) as caught:
        await publish(checkpoint, publisher)
    assert publisher.calls == calls_until(stage)
    assert publisher.served.routed == 1
    assert publisher.served.loaded == {1}
    assert caught.value.stage == stage
    assert caught.value.__cause__ is error
    message = str(caught.value)
    assert message.startswith(f"agent@2 was not published: to {stage} it failed, because ")
    assert str(error) in message
    assert "What was served before still is." in message
    assert ".. " not in message


@pytest.mark.parametrize("stage", STAGES)
async def test_a_stage_that_hangs_is_ended_by_its_own_limit(checkpoint: CheckpointRef, stage: str) -> None:
    publisher = RecordingPublisher(stage, hang)
    limits = PublicationLimits(**{f"{stage}_s": 0.02})
    with pytest.raises(PublicationFailed, match=r"because it took longer than 0\.02 s\. What was served") as caught:
        await publish(checkpoint, publisher, limits)
    assert caught.value.stage == stage
    assert publisher.calls == calls_until(stage)
    assert publisher.served.routed == 1


async def test_a_timeout_of_the_publisher_s_own_is_not_reported_as_the_stage_s(checkpoint: CheckpointRef) -> None:
    publisher = RecordingPublisher("load", raising(TimeoutError("the engine did not answer within 2 s")))
    with pytest.raises(PublicationFailed, match="because the engine did not answer within 2 s") as caught:
        await publish(checkpoint, publisher)
    assert "took longer" not in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelling_unloads_and_stays_a_cancellation(checkpoint: CheckpointRef, stage: str) -> None:
    publisher = RecordingPublisher(stage, hang)
    before = asyncio.all_tasks()
    task = asyncio.create_task(publish(checkpoint, publisher))
    await publisher.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert publisher.calls == calls_until(stage)
    assert publisher.served.routed == 1
    assert asyncio.all_tasks() == before


async def test_cancelling_again_while_it_unloads_still_unloads_and_leaves_no_task(checkpoint: CheckpointRef) -> None:
    unloading, go_on, unloaded = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow_unload() -> None:
        unloading.set()
        await go_on.wait()
        unloaded.set()

    publisher = RecordingPublisher("verify", hang, slow_unload)
    before = asyncio.all_tasks()
    task = asyncio.create_task(publish(checkpoint, publisher))
    await publisher.entered.wait()
    task.cancel()
    await unloading.wait()
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unloaded.is_set()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize(
    ("unload", "said"),
    [
        (
            raising(EngineRefused("torch", "unload", "busy")),
            r"Unloading it failed too \(torch refused to unload: busy\)",
        ),
        (raising(RuntimeError("a bug")), r"Unloading it failed too \(RuntimeError: a bug\)"),
        (hang, r"Unloading it failed too \(it took longer than 0\.02 s\)"),
    ],
)
async def test_an_unload_that_fails_is_said_and_hides_nothing(
    checkpoint: CheckpointRef, unload: Act, said: str
) -> None:
    publisher = RecordingPublisher("verify", raising(AdapterMismatch("it answers as step 1.")), unload)
    with pytest.raises(PublicationFailed, match=said) as caught:
        await publish(checkpoint, publisher, PublicationLimits(unload_s=0.02))
    assert "it answers as step 1." in str(caught.value)
    assert caught.value.stage == "verify"


async def test_a_receipt_has_the_seconds_of_each_stage_and_a_publication_none_that_nobody_took(
    checkpoint: CheckpointRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([2.0, 9.0, 20.0, 23.0, 30.0, 31.25, 40.0, 40.125])
    monkeypatch.setattr("art_core.publication.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    receipt = await publish(checkpoint, RecordingPublisher())
    assert receipt.seconds == {"checked": 7.0, "loaded": 3.0, "verified": 1.25, "routed": 0.125}
    by_hand = Publication(checkpoint)
    by_hand.advance(PublicationStage.CHECKED)
    assert by_hand.seconds == {"checked": 0.0}


def test_limits_and_receipts_are_frozen_and_named() -> None:
    assert PublicationLimits() == PublicationLimits(check_s=60, load_s=120, verify_s=60, route_s=5, unload_s=60)
    for made in (PublicationLimits(), PublicationReceipt(model=KEY, step=1, inference_name="agent@1")):
        with pytest.raises(FrozenInstanceError):
            made.step = 2  # type: ignore[union-attr, misc]
        with pytest.raises(TypeError):
            type(made)(1.0, 2.0, 3.0)  # type: ignore[misc, arg-type]


async def test_an_older_step_cannot_be_routed(tmp_path: Path) -> None:
    publisher = RecordingPublisher()
    with pytest.raises(PublicationFailed, match="only forward") as caught:
        await publish(CheckpointRef(KEY, 0, tmp_path), publisher)
    assert caught.value.stage == "route"
    assert publisher.served.routed == 1
    assert publisher.calls[-1] == "unload"


def test_stages_follow_each_other_without_a_gap(checkpoint: CheckpointRef) -> None:
    order = [PublicationStage(name) for name in ("saved", "checked", "loaded", "verified", "routed")]
    for position, stage in enumerate(order):
        for target in PublicationStage:
            publication = Publication(checkpoint)
            for reached in order[1 : position + 1]:
                publication.advance(reached)
            assert publication.stage is stage
            if target in order and order.index(target) == position + 1:
                publication.advance(target, 0.5)
                assert publication.seconds[target.value] == 0.5
            else:
                with pytest.raises(ValueError, match="cannot go from"):
                    publication.advance(target)
                assert publication.stage is stage


def test_a_publication_that_is_over_cannot_fail(checkpoint: CheckpointRef) -> None:
    publication = Publication(checkpoint)
    publication.fail()
    with pytest.raises(ValueError, match="that is failed cannot fail"):
        publication.fail()
    with pytest.raises(ValueError, match="cannot go from failed"):
        publication.advance(PublicationStage.CHECKED)
