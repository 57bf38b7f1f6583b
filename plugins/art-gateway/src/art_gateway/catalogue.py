"""What is served, as a list for users and as the answer to a name that isn't. Only asked on these two occasions."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from art_core import inference_name
from art_core.errors import did_you_mean

from .errors import ApiError
from .routes import Routes, ServedModel

_MOST_NAMED = 50
_started = int(time.time())


def model_cards(routes: Routes, project: str | None) -> list[dict[str, Any]]:
    """Every name that can be asked for, in the form of OpenAI's list of models: each model, then each of its steps."""
    return [
        _card(model, name, step)
        for model in routes.served(project)
        for name, step in ((model.name, model.step), *((inference_name(model.name, s), s) for s in model.steps))
    ]


def not_served(routes: Routes, project: str | None, requested: str) -> ApiError:
    """404 for a name that isn't served, with the nearest one and those that are."""
    served = routes.served(project)
    where = "" if project is None else f" in project {project!r}"
    names = [_described(model, with_project=project is None) for model in served]
    plain = requested.partition("@")[0]
    hint = "" if any(model.name == plain for model in served) else did_you_mean(plain, {model.name for model in served})
    message = f"The model {requested!r} is not served{where}.{hint} Served{where}: {the_first(names)}."
    return ApiError(404, message, code="model_not_found", param="model")


def the_first(names: Sequence[str]) -> str:
    """What there is, in a sentence that an error can hold."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ("; ".join(names[:_MOST_NAMED]) + more) or "nothing"


def several_projects(requested: str, projects: Collection[str]) -> ApiError:
    """409 for a name that several projects have, asked for without one."""
    addresses = ", ".join(f"/{project}/v1" for project in sorted(projects)[:_MOST_NAMED])
    message = f"The model {requested!r} is in several projects; ask under the address of one: {addresses}."
    # OpenAI's clients ask a 409 again on their own; this one would be the same.
    no_retry = ((b"x-should-retry", b"false"),)
    return ApiError(409, message, code="model_ambiguous", param="model", headers=no_retry)


def _card(model: ServedModel, name: str, step: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _started,
        "owned_by": model.project,
        "root": inference_name(model.name, step),
        "policy_version": step,
    }


def _described(model: ServedModel, *, with_project: bool) -> str:
    steps = ", ".join(inference_name(model.name, step) for step in model.steps[-_MOST_NAMED:])
    prefix = f"{model.project}: " if with_project else ""
    return f"{prefix}{model.name} (step {model.step}; {steps})"
