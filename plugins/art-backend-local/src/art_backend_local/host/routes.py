"""Where the gateway sends a request: the routed step or a step by its number, counted as in flight until it ends.

Knows hosted models and the gateway's protocol. Steps that are on disk but not in the engine are loaded when asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from art_core import ArtError, ModelKey
from art_core.errors import CheckpointError, CheckpointNotFound, ProcessFailed
from art_core.names import parse_inference_name
from art_gateway import Route, RouteUnavailable, ServedModel

from .hosted_model import HostedModel

# Longer than an engine's restart and shorter than a client's patience (1200 s).
ENGINE_LIMIT_S = 280.0
GATE_LIMIT_S = 1100.0
_ATTEMPTS = 5


class HostRoutes:
    """The gateway's Routes over a host's models. `used` is called for every request."""

    def __init__(self, models: Mapping[ModelKey, HostedModel], *, used: Callable[[], None]) -> None:
        self._models = models
        self._used = used

    async def acquire(self, project: str, requested_name: str) -> Route:
        """See `art_gateway.Routes`."""
        self._used()
        name, step = parse_inference_name(requested_name)
        model = self._models.get(ModelKey(project, name))
        if model is None:
            there = ", ".join(sorted(key.name for key in self._models if key.project == project)) or "none"
            raise CheckpointNotFound(f"no model {name!r} is served in project {project!r}; served: {there}.")
        for _ in range(_ATTEMPTS):
            await self._until_ready(model)
            wanted = model.steps.routed if step is None else step
            if wanted is None:
                raise RouteUnavailable(f"{model.key} is being registered; its first step is not served yet.")
            if wanted not in model.steps.loaded:
                await _load(model, wanted)
            if model.server.up and wanted in model.steps.loaded:
                return self._pin(model, wanted)
        raise RouteUnavailable(f"{requested_name} was unloaded again and again while it was asked for; try again.")

    def projects_of(self, name: str) -> Collection[str]:
        """See `art_gateway.Routes`."""
        return [key.project for key in self._models if key.name == name]

    def served(self, project: str | None) -> Sequence[ServedModel]:
        """See `art_gateway.Routes`."""
        return [
            ServedModel(
                project=key.project,
                name=key.name,
                step=model.steps.routed,
                steps=tuple(sorted(model.steps.loaded.union(model.published))),
            )
            for key, model in self._models.items()
            if model.steps.routed is not None and project in (None, key.project)
        ]

    async def _until_ready(self, model: HostedModel) -> None:
        server = model.server
        if server.up and server.gate.is_set():
            return
        try:
            await asyncio.wait_for(server.gate.wait(), GATE_LIMIT_S)
            await server.ready(ENGINE_LIMIT_S)
        except TimeoutError:
            raise RouteUnavailable(
                f"a training step has held the device for more than {GATE_LIMIT_S:g} s; {model.key} answers when it has"
                " ended.",
                retry_after_s=60,
            ) from None
        except ProcessFailed as error:
            raise RouteUnavailable(str(error), retry_after_s=30) from error

    def _pin(self, model: HostedModel, step: int) -> Route:
        pinned = model.steps.acquire(step)
        model.last_asked = time.monotonic()
        checkpoint = model.ref(pinned)
        member, connection = model.server.begin_request()

        def release() -> None:
            self._used()
            model.server.end_request(member)
            model.steps.release(pinned)
            model.last_asked = time.monotonic()
            model.ended.set()

        return Route(
            upstream_url=connection.url,
            upstream_key=connection.api_key,
            engine=model.server.engine,
            template_arguments=model.deployment.settings.adapter.chat_template_kwargs,
            adapter=checkpoint.adapter_name,
            name=checkpoint.inference_name,
            step=pinned,
            release=release,
            unreachable=lambda: model.server.suspect(member),
        )


async def _load(model: HostedModel, step: int) -> None:
    try:
        await model.ensure_loaded(step)
    except CheckpointError as error:
        raise CheckpointNotFound(str(error)) from error
    except ArtError as error:
        raise RouteUnavailable(f"{model.key}@{step} is on disk but could not be served: {error}") from error
