"""Builds a registration in the client: finds the base model's weights, or an adapter's base, and reads the settings.

Downloads happen here, where the user sees their progress, and never in the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from art_core import ModelKey, PluginRegistry, PolicyModel, resolve_base_model
from art_core.errors import BaseModelNotFound
from art_engine_kit.adapter_config import base_model_of_adapter
from art_engine_kit.lora_shape import check_asked
from art_runtime.environments import python_for

from ..wire.deployment import Deployment
from ..wire.messages import RegisterRequest
from ..wire.settings import ModelSettings, read_settings
from .engine_choice import EngineChoice
from .server_choice import ServerChoice


@dataclass(frozen=True, kw_only=True)
class EnginePythons:
    """The user's own interpreters for the engines, None to find them; `auto_install` makes missing environments."""

    inference: str | None = None
    training: str | None = None
    auto_install: bool = False


async def registration_request(
    registry: PluginRegistry,
    model: PolicyModel,
    engines: EngineChoice,
    pythons: EnginePythons,
    servers: ServerChoice,
    *,
    max_adapters: int,
    session: Callable[[], Awaitable[str]],
) -> RegisterRequest:
    """Everything the host needs to serve and train the model.

    Raises BaseModelNotFound; AdapterMismatch, naming module and shapes, when base_model is an adapter folder that does
    not fit its base or what `peft_args` asks; ValueError and UnsupportedCapability for what of `_internal_config` this
    backend can't do; EnvironmentMissing with the command that makes an engine's environment. Nothing is started before
    these are known.
    """
    ModelKey(model.project, model.name)
    settings = read_settings(model.internal_config)
    folder = await resolve_base_model(registry, model.base_model)
    adapter: Path | None = None
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        adapter, base_name = folder, await asyncio.to_thread(base_model_of_adapter, folder)
        try:
            folder = await resolve_base_model(registry, base_name)
        except BaseModelNotFound as error:
            raise BaseModelNotFound(
                f"the adapter {adapter} is for the base model {base_name!r} (base_model_name_or_path in its config),"
                f" and: {error}"
            ) from error
        settings = await asyncio.to_thread(_fitting, settings, adapter, folder)
    if not (folder / "config.json").is_file():
        raise BaseModelNotFound(f"{folder} is an adapter, not a base model; an adapter's base must be whole weights.")
    inference_python, training_python = await asyncio.to_thread(_pythons, registry, engines, pythons, servers)
    return RegisterRequest(
        session=await session(),
        project=model.project,
        name=model.name,
        entity=model.entity,
        adapter_folder=adapter,
        deployment=Deployment(
            base_model=model.base_model,
            base_folder=folder,
            inference_engine=engines.inference,
            inference_python=inference_python,
            replicas=servers.replicas,
            inference_urls=servers.urls,
            inference_api_key=servers.api_key,
            training_engine=engines.training,
            training_python=training_python,
            max_adapters=max_adapters,
            settings=settings,
        ),
    )


def _pythons(
    registry: PluginRegistry, engines: EngineChoice, given: EnginePythons, servers: ServerChoice
) -> tuple[str, str]:
    card = registry.inference_engine(engines.inference)
    # A server of the user's needs no environment here.
    inference = "" if servers.urls else python_for(card, python=given.inference, auto_install=given.auto_install)
    if engines.training is None:
        return inference, ""
    training = registry.training_engine(engines.training)
    return inference, python_for(training, python=given.training, auto_install=given.auto_install)


def _fitting(settings: ModelSettings, adapter: Path, base: Path) -> ModelSettings:
    """The settings with room for the adapter's rank, once it is known to fit its base and what `peft_args` asks."""
    # Only a start from an adapter needs numpy in the client.
    from art_engine_kit.adapter_files import check_adapter
    from art_engine_kit.base_shapes import linear_shapes

    shapes = linear_shapes(base)
    fitting = check_adapter(adapter, shapes)
    check_asked(settings.adapter.peft_args, fitting.config, where=adapter, modules=shapes)
    return settings.model_copy(update={"max_lora_rank": max(settings.max_lora_rank, fitting.rank)})
