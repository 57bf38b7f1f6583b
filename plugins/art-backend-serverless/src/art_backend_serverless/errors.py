"""What can go wrong between a client and a training service, and how an answer that refuses becomes an error.

Knows statuses and the words of refusals; knows no connection. A key never gets into a message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from art_core.errors import (
    ArtError,
    BackendUnreachable,
    BaseModelNotFound,
    CheckpointInUse,
    CheckpointNotFound,
    InvalidName,
    InvalidTrajectory,
    ModelBusy,
    TrainingFailed,
)

_LONGEST_REASON = 2000
_HIDDEN = "[key]"


class KeyMissing(ArtError, ValueError):
    """There is no API key, or what was given can't be one."""


class ServiceUnreachable(BackendUnreachable):
    """The training service doesn't answer, or not in a way that can be read."""


class ServiceRefused(ArtError):
    """The training service answered with a refusal; `status` is the HTTP status, `code` its word for it, if any."""

    def __init__(self, message: str, *, status: int, code: str | None = None) -> None:
        self.status, self.code = status, code
        super().__init__(message)


class OutcomeUnknown(ServiceUnreachable):
    """A request that makes something was sent and not answered: it may have worked. It isn't sent again unasked."""


class JobStalled(TrainingFailed):
    """A job was silent for too long. It may still finish at the service."""


_KNOWN: Final[Mapping[str, type[ArtError]]] = {
    "base_model_not_served": BaseModelNotFound,
    "invalid_trajectories": InvalidTrajectory,
    "invalid_name": InvalidName,
    "model_busy": ModelBusy,
    "checkpoint_in_use": CheckpointInUse,
    "checkpoint_not_found": CheckpointNotFound,
}


def refusal(status: int, body: bytes, *, doing: str, base_url: str, key: str) -> ArtError:
    """The error for an answer that isn't 2xx: of the kernel's own type where the service's word for it is one of those
    that `wire.ErrorDetail` lists.
    """
    reason, code = _reason(body)
    reason = without_key(reason, key)
    said = f"{doing}: {base_url} answered HTTP {status}"
    if 300 <= status < 400:
        return ServiceRefused(
            f"{said}, a redirection. Give the address that it leads to as base_url; a key is not sent on to another.",
            status=status,
        )
    message = f"{said}: {reason}" if reason else f"{said} without a reason."
    if status in (401, 403):
        message += " Check the API key: ServerlessBackend(api_key=...), or WANDB_API_KEY in the environment."
    known = _KNOWN.get(code or "")
    return known(message) if known is not None else ServiceRefused(message, status=status, code=code)


def without_key(text: str, key: str) -> str:
    """A text in which the key, should it stand there, does not stand any more."""
    return text.replace(key, _HIDDEN) if key else text


def _reason(body: bytes) -> tuple[str, str | None]:
    """What a service says is wrong, in the forms that are in use, and its word for it."""
    try:
        answer: Any = json.loads(body)
    except ValueError:
        return _short(body.decode(errors="replace")), None
    if isinstance(answer, dict):
        found = answer.get("error", answer.get("detail", answer.get("message")))
        if isinstance(found, dict):
            code = found.get("code")
            return _short(str(found.get("message", found))), code if isinstance(code, str) else None
        if found is not None:
            return _short(found if isinstance(found, str) else json.dumps(found)), None
    return _short(body.decode(errors="replace")), None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
