"""What the gateway must be told to send a request on: a route, and who gives them.

A backend implements `Routes`. The gateway knows nothing of publication, processes or restarts; it holds a route for
exactly as long as its answer takes, streaming included, and then releases it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from art_core import ArtError
from art_core.engines import JSON, Endpoint


class Dialect(Protocol):
    """How a server's requests and answers are written: that part of `art_core.InferenceEngine` which the gateway
    uses.
    """

    @property
    def name(self) -> str:
        """What errors call it."""

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:
        """See `art_core.InferenceEngine`."""

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:
        """See `art_core.InferenceEngine`."""

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:
        """See `art_core.InferenceEngine`."""


class RouteUnavailable(ArtError):
    """A model is known but cannot be asked now, such as while its engine restarts. The gateway answers 503.

    `retry_after_s` is when to come back, in seconds.
    """

    def __init__(self, reason: str, *, retry_after_s: float = 5.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(reason)


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one request goes, and the hold on the step that answers it.

    `upstream_url` is the engine's server without a path, such as "http://127.0.0.1:8123"; `upstream_key` its bearer
    key. `adapter` is the adapter's name in the engine (None: the base model). `name` is the public name with its step,
    such as "agent-001@3". `template_arguments` are the model's own for its chat template; a chat request's
    `chat_template_kwargs` win over them. The gateway calls `release` exactly once, when the answer has ended in
    whatever way, and before it `unreachable` when the server took no connection or broke it; neither may raise or
    block.
    """

    upstream_url: str
    upstream_key: str = field(repr=False)
    engine: Dialect
    adapter: str | None
    name: str
    step: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    release: Callable[[], None] = field(repr=False)
    unreachable: Callable[[], None] = field(repr=False, default=lambda: None)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model as `GET /v1/models` lists it. `step` is the routed step, `steps` all that can be asked by name@step."""

    project: str
    name: str
    step: int
    steps: tuple[int, ...]


@runtime_checkable
class Routes(Protocol):
    """Who knows which names are served, and where."""

    async def acquire(self, project: str, requested_name: str) -> Route:
        """The route for `name` (the routed step) or `name@step`, counted as in flight until it is released.

        May wait a bounded time, as while an engine restarts. Nothing may be awaited between counting and returning, so
        that a cancelled request never leaves a count behind. Raises CheckpointNotFound for a name or step that isn't
        served, listing those that are; InvalidName for a malformed name; RouteUnavailable when it can't be asked now.
        """

    def projects_of(self, name: str) -> Collection[str]:
        """The projects that have a model of this plain name. Called for every request without a project: O(1)."""

    def served(self, project: str | None) -> Sequence[ServedModel]:
        """What is served in a project, or (None) in all."""
