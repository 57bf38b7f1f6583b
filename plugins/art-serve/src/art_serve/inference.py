"""OpenAI's addresses in front of the backend's own: artifact names become the backend's, and are put back in answers.

Streaming, cancellation, limits and errors are the gateway's. Only models of the key's own entity can be asked; any
other name is answered as one that nobody has.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from art_core import ArtError
from art_core.engines import JSON, Endpoint
from art_gateway import GatewayLimits, Route, RouteUnavailable, ServedModel
from art_gateway.catalogue import the_first
from art_gateway.completions import Completions, Upstream
from art_gateway.errors import ApiError

from .artifact_names import ArtifactName, parse_artifact_name
from .catalogue import Catalogue
from .hosted_backend import HostedBackend
from .in_threads import Transactions
from .model_records import ModelRecord, checkpoint_metrics

_OPENAI = "/v1"


class BackendDialect:
    """A backend's own endpoint: it has the one form already, and needs another name for the model."""

    name = "backend"

    def prepare_request(self, endpoint: Endpoint, body: JSON, adapter: str | None) -> JSON:  # noqa: ARG002
        """The request under the backend's name."""
        return {**body, "model": adapter}

    def read_response(self, endpoint: Endpoint, body: JSON) -> JSON:  # noqa: ARG002
        """As it came."""
        return body

    def read_chunk(self, endpoint: Endpoint, chunk: JSON) -> JSON:  # noqa: ARG002
        """As it came."""
        return chunk


class ArtifactRoutes:
    """The gateway's Routes; what it calls a project is an entity here."""

    def __init__(self, backend: HostedBackend, catalogue: Catalogue, transactions: Transactions) -> None:
        self._backend = backend
        self._catalogue = catalogue
        self._transactions = transactions
        self._dialect = BackendDialect()

    async def acquire(self, project: str, requested_name: str) -> Route:
        """See `art_gateway.Routes`. The step is held by the backend as long as it answers."""
        asked = parse_artifact_name(requested_name)
        record = None if asked is None else self._catalogue.by_name(project, asked.project, asked.name)
        if asked is None or asked.entity != project or record is None:
            raise not_served(requested_name, self._catalogue, project)
        try:
            registration = await self._backend.registered(record)
        except (ArtError, OSError, ValueError) as error:
            raise RouteUnavailable(f"{requested_name} can't be served now: {error}", retry_after_s=10) from error
        step = self._catalogue.latest(record) if asked.step is None else asked.step
        if asked.step is not None and await self._transactions(checkpoint_metrics, record.id, step) is None:
            raise not_served(requested_name, self._catalogue, project)
        base_url = registration.inference_base_url.rstrip("/")
        if not base_url.endswith(_OPENAI):
            raise RouteUnavailable(f"the backend's address {base_url} doesn't end in {_OPENAI}", retry_after_s=600)
        return Route(
            upstream_url=base_url.removesuffix(_OPENAI),
            upstream_key=registration.inference_api_key,
            engine=self._dialect,
            adapter=self._backend.backend.inference_name(self._backend.policy(record), step),
            name=str(ArtifactName(record.entity, record.project, record.name, step)),
            step=step,
            release=lambda: None,
            unreachable=lambda: self._backend.register_again(record),
        )

    def projects_of(self, name: str) -> Collection[str]:  # noqa: ARG002
        """None: every request comes with its entity."""
        return ()

    def served(self, project: str | None) -> Sequence[ServedModel]:  # noqa: ARG002
        """None: `Inference.cards` lists them."""
        return ()


class Inference:
    """The endpoints, and the connections to the backend, which `close` ends."""

    def __init__(self, routes: ArtifactRoutes, catalogue: Catalogue) -> None:
        limits = GatewayLimits()
        self._catalogue = catalogue
        self._upstream = Upstream(limits)
        self.chat = _OfEntity(Completions("chat/completions", routes, self._upstream, limits))
        self.text = _OfEntity(Completions("completions", routes, self._upstream, limits))

    def cards(self, entity: str) -> list[dict[str, Any]]:
        """The models of an entity, in the form of OpenAI's list."""
        return [self.card(record) for record in self._catalogue.of(entity)]

    def card(self, record: ModelRecord) -> dict[str, Any]:
        """One model."""
        step = self._catalogue.latest(record)
        name = ArtifactName(record.entity, record.project, record.name)
        root = ArtifactName(record.entity, record.project, record.name, step)
        return {
            "id": str(name),
            "object": "model",
            "created": 0,
            "owned_by": record.entity,
            "root": str(root),
            "policy_version": step,
        }

    async def close(self) -> None:
        """Close the connections to the backend."""
        await self._upstream.close()


def not_served(requested: str, catalogue: Catalogue, entity: str) -> ApiError:
    """404, the same for a name that nobody has and for another's, with those that the entity has."""
    message = (
        f"The model {requested[:300]!r} is not served. Ask for wandb-artifact:///{entity}/PROJECT/NAME, or with :stepN"
        f" behind it. Served to you: {the_first(catalogue.names_of(entity))}. GET /v1/models lists them with their"
        " steps."
    )
    return ApiError(404, message, code="model_not_found", param="model")


class _OfEntity:
    """Has the gateway look for the model among those of the key's entity."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["path_params"] = {**scope.get("path_params", {}), "project": scope["state"]["entity"]}
        await self._completions(scope, receive, send)
