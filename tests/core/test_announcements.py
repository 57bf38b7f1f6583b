"""Hooks as they are called: isolated when they announce, decisive when they may refuse, awaited when they can be."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from art_core import (
    PluginRegistry,
    announce,
    announcements,
    ask_permission,
    hookimpl,
    resolve_base_model,
    resolve_checkpoint,
)
from art_core.errors import BaseModelNotFound, PluginError

MODEL: Any = SimpleNamespace(name="agent", project="project")


def registry_of(**plugins: Callable[..., Any]) -> PluginRegistry:
    """One plugin for each named function, which implements the hook of the function's own name."""
    registry = PluginRegistry()
    for name, function in plugins.items():
        registry.register(SimpleNamespace(art_api=1, **{function.__name__: hookimpl(function)}), name)
    return registry


def saver(calls: list[str], name: str, error: BaseException | None = None) -> Callable[..., Any]:
    def art_checkpoint_saved(checkpoint: Any) -> None:
        calls.append(name)
        if error is not None:
            raise error

    return art_checkpoint_saved


async def announce_saved(registry: PluginRegistry) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await announce(registry, "art_checkpoint_saved", model=MODEL, checkpoint="c")
    return [str(warning.message) for warning in caught]


async def test_each_implementation_is_called_whatever_the_others_do() -> None:
    calls: list[str] = []
    registry = registry_of(
        a=saver(calls, "a", ValueError("disk")), b=saver(calls, "b"), c=saver(calls, "c", KeyError("k"))
    )
    told = await announce_saved(registry)
    assert sorted(calls) == ["a", "b", "c"]
    assert sorted(told) == [
        "plugin 'a' failed in art_checkpoint_saved: ValueError: disk",
        "plugin 'c' failed in art_checkpoint_saved: KeyError: 'k'",
    ]


async def test_an_announcement_to_nobody_is_no_error() -> None:
    assert await announce_saved(PluginRegistry()) == []


async def test_coroutines_are_awaited_and_isolated_too() -> None:
    ended = []

    async def art_checkpoint_saved(model: Any, checkpoint: Any) -> None:
        await asyncio.sleep(0)
        ended.append((model.name, checkpoint))
        raise OSError("upload failed")

    told = await announce_saved(registry_of(store=art_checkpoint_saved))
    assert ended == [("agent", "c")]
    assert told == ["plugin 'store' failed in art_checkpoint_saved: OSError: upload failed"]


async def test_one_that_never_ends_is_left_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "ANNOUNCEMENT_LIMIT_S", 0.02)
    calls: list[str] = []

    async def art_checkpoint_saved(model: Any, checkpoint: Any) -> None:
        await asyncio.Event().wait()

    told = await announce_saved(registry_of(quick=saver(calls, "quick"), slow=art_checkpoint_saved))
    assert calls == ["quick"]
    assert told == [
        "plugin 'slow' failed in art_checkpoint_saved: PluginError: plugin 'slow' did not end art_checkpoint_saved"
        " within 0.02 s"
    ]


async def test_cancelling_is_not_mistaken_for_a_failure() -> None:
    entered = asyncio.Event()

    async def art_checkpoint_saved(model: Any, checkpoint: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(announce_saved(registry_of(slow=art_checkpoint_saved)))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_refusal_reaches_the_caller_as_it_is(asynchronous: bool) -> None:
    class OverBudget(Exception):
        pass

    def art_before_train(step: int) -> Any:
        async def refuse() -> None:
            raise OverBudget(f"step {step} would cost too much")

        if asynchronous:
            return refuse()
        raise OverBudget(f"step {step} would cost too much")

    registry = registry_of(budget=art_before_train)
    with pytest.raises(OverBudget, match="step 4 would cost too much"):
        await ask_permission(registry, "art_before_train", backend=None, model=MODEL, step=4, trajectory_groups=[])


async def test_silence_is_consent() -> None:
    asked = []

    def art_before_publish_checkpoint(checkpoint: Any) -> None:
        asked.append(checkpoint)

    registry = registry_of(watcher=art_before_publish_checkpoint)
    await ask_permission(registry, "art_before_publish_checkpoint", model=MODEL, checkpoint="c")
    assert asked == ["c"]


async def test_one_asked_that_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "ANNOUNCEMENT_LIMIT_S", 0.02)

    async def art_before_publish_checkpoint(checkpoint: Any) -> None:
        await asyncio.Event().wait()

    with pytest.raises(PluginError, match=r"plugin 'judge' did not end art_before_publish_checkpoint within 0\.02 s"):
        await ask_permission(
            registry_of(judge=art_before_publish_checkpoint),
            "art_before_publish_checkpoint",
            model=MODEL,
            checkpoint="c",
        )


async def test_the_first_plugin_that_knows_a_base_model_gives_its_folder(tmp_path: Path) -> None:
    def art_resolve_base_model(name: str) -> Path | None:
        return tmp_path if name == "tiny" else None

    registry = registry_of(weights=art_resolve_base_model)
    assert await resolve_base_model(registry, "tiny") == tmp_path
    with pytest.raises(BaseModelNotFound, match="base_model='huge' was not found: no plugin knows this name"):
        await resolve_base_model(registry, "huge")
    with pytest.raises(BaseModelNotFound, match="there is no such folder"):
        await resolve_base_model(registry, "./huge")


async def test_a_folder_of_weights_needs_no_plugin(tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound, match="holds neither weights"):
        await resolve_base_model(PluginRegistry(), str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert await resolve_base_model(PluginRegistry(), str(tmp_path)) == tmp_path.resolve()


async def test_checkpoints_elsewhere_are_found_by_plugins(tmp_path: Path) -> None:
    def art_resolve_checkpoint(model: Any, step: int) -> str | None:
        return str(tmp_path) if step == 3 else None

    registry = registry_of(bucket=art_resolve_checkpoint)
    assert await resolve_checkpoint(registry, MODEL, 3) == tmp_path
    assert await resolve_checkpoint(registry, MODEL, 4) is None
    assert await resolve_checkpoint(PluginRegistry(), MODEL, 3) is None
