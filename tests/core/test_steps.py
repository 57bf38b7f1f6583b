"""`run_step` with a backend of thirty lines: every announcement once and in order, whatever is refused, fails or is
cancelled, at every await.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from art_core import (
    CheckpointRef,
    ModelKey,
    PluginRegistry,
    PublicationReceipt,
    SavedStep,
    TrainResult,
    TrajectoryGroup,
    hookimpl,
    publish_saved,
    run_step,
)
from art_core.errors import PublicationFailed, TrainingFailed

KEY = ModelKey("project", "agent")
MODEL: Any = SimpleNamespace(name="agent", project="project")
CHECKPOINT = CheckpointRef(KEY, 1, Path("checkpoints/0001"))
RECEIPT = PublicationReceipt(model=KEY, step=1, inference_name="agent@1")
GROUPS = [TrajectoryGroup([])]
WHOLE = [
    "art_before_train", "train", "art_checkpoint_saved", "art_before_publish_checkpoint", "publish",
    "art_checkpoint_published", "let_go", "art_after_train",
]  # fmt: skip
ENDS = {"art_after_train", "art_train_failed"}
PUBLISH_ENDS = {"art_checkpoint_published", "art_checkpoint_publish_failed"}


class SmallBackend:
    """A backend with one model, which trains nothing: the verbs, and what they leave behind.

    Each verb and each hook waits at a point of its own; `at` says what happens there. `served` and `kept` are what a
    user would find afterwards.
    """

    def __init__(self, log: list[str], at: Callable[[str], Any]) -> None:
        self.log, self.at = log, at
        self.held, self.kept, self.served, self.aside = True, False, False, False

    async def train_and_save(self) -> SavedStep[TrainResult]:
        self.log.append("train")
        await self.at("train")
        self.kept = True
        return SavedStep(CHECKPOINT, TrainResult(step=1, metrics={"loss/train": 0.5}))

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        self.log.append("publish")
        await self.at("publish")
        self.served = True
        await self.at("routed")
        return RECEIPT

    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        self.log.append("put_aside")
        await self.at("put_aside")
        if self.served:
            return RECEIPT
        self.kept, self.aside = False, True
        return replace(checkpoint, path=Path("checkpoints/0001.refused"))

    async def let_go(self) -> None:
        self.log.append("let_go")
        await self.at("let_go")
        self.held = False


class Recorder:
    """A plugin that writes down every hook of a step, with what it was given."""

    def __init__(self, log: list[str], at: Callable[[str], Any]) -> None:
        self.log, self.at, self.told = log, at, {}

    async def heard(self, hook: str, **given: Any) -> None:
        self.log.append(hook)
        self.told[hook] = given
        await self.at(hook)


def plugin(recorder: Recorder) -> Any:
    names = {
        "art_before_train": ("step", "trajectory_groups"), "art_checkpoint_saved": ("checkpoint",),
        "art_before_publish_checkpoint": ("checkpoint",), "art_checkpoint_published": ("checkpoint", "receipt"),
        "art_checkpoint_publish_failed": ("checkpoint", "error"), "art_after_train": ("result",),
        "art_train_failed": ("step", "error"),
    }  # fmt: skip
    space: dict[str, Any] = {"heard": recorder.heard}
    for name, arguments in names.items():
        given = ", ".join(f"{a}={a}" for a in arguments)
        exec(f"async def {name}({', '.join(arguments)}):\n    await heard({name!r}, {given})", space)
    return SimpleNamespace(art_api=1, **{name: hookimpl(space[name]) for name in names})


def setting(at: Callable[[str], Any], *, second: bool = False) -> tuple[SmallBackend, PluginRegistry, Recorder]:
    log: list[str] = []
    backend, recorder, registry = SmallBackend(log, at), Recorder(log, at), PluginRegistry()
    registry.register(plugin(recorder), "recorder")
    if second:

        async def nothing(_: str) -> None:
            return None

        registry.register(plugin(Recorder([], nothing)), "second")
    return backend, registry, recorder


async def step(backend: SmallBackend, registry: PluginRegistry) -> TrainResult:
    return await run_step(registry, backend, MODEL, GROUPS, backend, step=1)  # type: ignore[arg-type]


async def nothing(_: str) -> None:
    await asyncio.sleep(0)


def fails(where: str, error: BaseException) -> Callable[[str], Any]:
    async def at(point: str) -> None:
        await asyncio.sleep(0)
        if point == where:
            raise error

    return at


async def test_a_step_that_works_is_told_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([2.0, 9.0])
    monkeypatch.setattr("art_core.steps.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    backend, registry, recorder = setting(nothing)
    result = await step(backend, registry)
    assert backend.log == WHOLE
    assert result.step == 1
    assert result.metrics["loss/train"] == 0.5
    assert result.metrics["time/step_publish_s"] == 7.0
    assert recorder.told["art_after_train"]["result"] == result
    assert recorder.told["art_before_train"] == {"step": 1, "trajectory_groups": GROUPS}
    assert recorder.told["art_checkpoint_published"] == {"checkpoint": CHECKPOINT, "receipt": RECEIPT}
    assert not backend.held


def test_what_was_saved_stays_as_it_was_said() -> None:
    saved = SavedStep(CHECKPOINT, TrainResult(step=1))
    with pytest.raises(FrozenInstanceError):
        saved.checkpoint = replace(CHECKPOINT, step=2)  # type: ignore[misc]


async def test_a_refused_step_is_not_begun() -> None:
    backend, registry, recorder = setting(fails("art_before_train", ValueError("not today")))
    with pytest.raises(ValueError, match="not today"):
        await step(backend, registry)
    assert backend.log == ["art_before_train", "let_go", "art_train_failed"]
    assert str(recorder.told["art_train_failed"]["error"]) == "not today"


async def test_a_step_that_fails_has_no_checkpoint_to_tell_of() -> None:
    backend, registry, _ = setting(fails("train", TrainingFailed("out of memory")))
    with pytest.raises(TrainingFailed, match="out of memory"):
        await step(backend, registry)
    assert backend.log == ["art_before_train", "train", "let_go", "art_train_failed"]


async def test_a_vetoed_checkpoint_is_put_aside_and_the_hooks_say_where() -> None:
    backend, registry, recorder = setting(fails("art_before_publish_checkpoint", ValueError("too short")))
    with pytest.raises(ValueError, match="too short"):
        await step(backend, registry)
    assert backend.log == [
        *WHOLE[:4], "put_aside", "art_checkpoint_publish_failed", "let_go", "art_train_failed",
    ]  # fmt: skip
    assert recorder.told["art_checkpoint_publish_failed"]["checkpoint"].path == Path("checkpoints/0001.refused")
    assert backend.aside


@pytest.mark.parametrize("aside", [Path("checkpoints/0001.rejected"), None])
async def test_where_a_checkpoint_at_fault_is_kept_is_the_publishers_word(aside: Path | None) -> None:
    error = PublicationFailed("it has NaN in it", stage="check", put_aside=aside)
    backend, registry, recorder = setting(fails("publish", error))
    with pytest.raises(PublicationFailed, match="NaN"):
        await step(backend, registry)
    assert backend.log == [*WHOLE[:5], "art_checkpoint_publish_failed", "let_go", "art_train_failed"]
    told = recorder.told["art_checkpoint_publish_failed"]
    assert told["checkpoint"].path == (aside or CHECKPOINT.path)
    assert told["error"] is error


async def test_what_cannot_be_put_aside_is_told_with_the_reason_and_hides_nothing() -> None:
    async def at(point: str) -> None:
        if point == "art_before_publish_checkpoint":
            raise ValueError("too short")
        if point == "put_aside":
            raise OSError("the disk is gone")

    backend, registry, recorder = setting(at)
    with pytest.raises(ValueError, match="too short") as refusal:
        await step(backend, registry)
    assert "the disk is gone" in refusal.value.__notes__[0]
    assert backend.log[-3:] == ["art_checkpoint_publish_failed", "let_go", "art_train_failed"]
    assert recorder.told["art_checkpoint_publish_failed"]["checkpoint"] == CHECKPOINT


async def test_a_step_is_told_to_have_worked_although_letting_go_failed() -> None:
    backend, registry, _ = setting(fails("let_go", OSError("the host is gone")))
    with pytest.raises(OSError, match="the host is gone"):
        await step(backend, registry)
    assert backend.log == WHOLE


async def test_a_saved_checkpoint_is_published_by_itself() -> None:
    backend, registry, _ = setting(nothing)
    assert await publish_saved(registry, MODEL, CHECKPOINT, backend) == RECEIPT
    assert backend.log == ["art_before_publish_checkpoint", "publish", "art_checkpoint_published", "let_go"]
    backend, registry, _ = setting(fails("publish", PublicationFailed("no", stage="load")))
    with pytest.raises(PublicationFailed):
        await publish_saved(registry, MODEL, CHECKPOINT, backend)
    assert backend.log == ["art_before_publish_checkpoint", "publish", "art_checkpoint_publish_failed", "let_go"]


class CancellingClock:
    """Counts awaits, two a point, and cancels the step at some of them."""

    def __init__(self, turns: set[int]) -> None:
        self.turns, self.now = turns, 0
        self._task: asyncio.Task[TrainResult] | None = None

    async def at(self, _: str) -> None:
        for _i in range(2):
            if self.now in self.turns and self._task is not None:
                self._task.cancel()
            self.now += 1
            await asyncio.sleep(0)

    async def run(self, work: Any) -> TrainResult | BaseException:
        self._task = asyncio.ensure_future(work)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return (await asyncio.gather(self._task, return_exceptions=True))[0]


def assert_told_once(log: list[str]) -> None:
    """What holds whatever happened."""
    for name in set(log):
        assert log.count(name) == 1, f"{name} {log.count(name)} times: {log}"
    assert len(ENDS & set(log)) == 1, log
    if "art_checkpoint_saved" in log:
        assert len(PUBLISH_ENDS & set(log)) == 1, log
    else:
        assert not PUBLISH_ENDS & set(log), log
    assert log[-1] in ENDS, log
    assert log.index("let_go") == len(log) - 2, log
    order = [*WHOLE[:5], "put_aside", *PUBLISH_ENDS, "let_go", *ENDS]
    assert sorted(log, key=order.index) == log, log


@pytest.mark.parametrize("second", [False, True], ids=["one plugin", "two plugins"])
async def test_cancelled_at_every_await_each_is_told_once_and_nothing_is_held(second: bool) -> None:
    """Cancels at the first await, then at the second, and so on until the step ends before its turn comes."""
    cancelled_at: list[list[str]] = []
    for turn in range(1000):
        clock = CancellingClock({turn})
        backend, registry, recorder = setting(clock.at, second=second)
        outcome = await clock.run(step(backend, registry))
        if clock.now <= turn:
            assert isinstance(outcome, TrainResult)
            break
        assert isinstance(outcome, asyncio.CancelledError), (turn, outcome)
        assert_told_once(backend.log)
        assert not backend.held
        worked = "art_after_train" in backend.log
        assert worked == ("art_checkpoint_published" in backend.log) == backend.served, backend.log
        # A cancelled step that isn't served leaves nothing that a later one would publish.
        assert backend.served or not backend.kept, backend.log
        if not worked:
            assert isinstance(recorder.told["art_train_failed"]["error"], asyncio.CancelledError)
        cancelled_at.append(backend.log)
    else:
        pytest.fail("the step never ended")
    assert len(cancelled_at) > 15, "hardly anything was cancelled"
    assert {log[-1] for log in cancelled_at} == ENDS


async def test_cancelled_again_while_it_is_being_cancelled_it_still_ends_well() -> None:
    for first in range(40):
        for gap in range(1, 6):
            clock = CancellingClock({first, first + gap})
            backend, registry, _ = setting(clock.at)
            await clock.run(step(backend, registry))
            assert_told_once(backend.log)
            assert not backend.held
            assert backend.served or not backend.kept


@pytest.mark.parametrize("hook", ["art_checkpoint_saved", "art_checkpoint_published", "art_after_train"])
async def test_a_plugin_that_fails_or_cancels_itself_in_an_announcement_changes_nothing(hook: str) -> None:
    for error in (ValueError("a bug"), asyncio.CancelledError()):
        backend, registry, _ = setting(fails(hook, error))
        with pytest.warns(RuntimeWarning, match=f"plugin 'recorder' failed in {hook}"):
            result = await step(backend, registry)
        assert result.step == 1
        assert backend.log == WHOLE
