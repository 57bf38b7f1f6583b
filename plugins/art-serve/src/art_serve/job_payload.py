"""What a job holds besides its place in the queue, and how it becomes a call to the backend. Knows the wire's messages
and the Backend protocol; runs nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from art_backend_serverless import wire
from art_core import Backend, Trajectory, TrajectoryGroup, check_groups
from art_core.errors import InvalidTrajectory
from art_gateway.errors import ApiError

_LONGEST_LINE = 16 * 2**20


class JobPayload(BaseModel):
    """The text that the queue keeps. `file` names the body in KeptFiles; a supervised job has the `url` of its
    conversations and the backend's `options`. `num_sequences` is how many it trains on.
    """

    model_config = ConfigDict(frozen=True)

    num_sequences: int
    file: str | None = None
    url: str | None = None
    options: dict[str, Any] = {}


def read_groups(groups: wire.Groups) -> list[TrajectoryGroup]:
    """The groups of a request, fit to be trained on. Raises ApiError, 422, naming the value at fault."""
    read = []
    for number, group in enumerate(groups):
        try:
            read.extend(wire.groups_from_json([group]))
        except ValidationError as error:
            raise invalid(error, f"trajectory_groups.{number}") from error
    try:
        check_groups(read)
    except InvalidTrajectory as error:
        raise ApiError(422, str(error), code="invalid_trajectories", param="trajectory_groups") from error
    # Without a trajectory it is a step too, that carries the checkpoint on.
    return read


def own_train_options(backend: Backend) -> list[str]:
    """What the backend's `train` takes of the options beyond the published ones."""
    taken = inspect.signature(backend.train).parameters
    return [name for name in wire.OWN_TRAIN_OPTIONS if name in taken]


def train_options(config: wire.ExperimentalConfig | None) -> dict[str, Any]:
    """The backend's keyword arguments for what a client asked for; what it left open is left to the backend."""
    given = {} if config is None else config.model_dump(exclude_none=True)
    if "ppo" in given:
        given["loss_fn"] = "ppo" if given.pop("ppo") else "cispo"
    return given


def sft_options(config: wire.SftConfig | None) -> dict[str, Any]:
    """As `train_options`, for a supervised job."""
    return {} if config is None else config.model_dump(exclude_none=True)


def read_conversations(file: Path) -> list[Trajectory]:
    """The conversations of a file of JSON lines, each `{messages, tools}`. Raises ApiError, 422, naming the line."""
    found = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if len(line) > _LONGEST_LINE:
                raise _bad_line(number, f"it is longer than {_LONGEST_LINE // 2**20} MiB")
            if line.strip():
                found.append(_conversation(number, line))
    if not found:
        raise ApiError(422, "The file holds no conversation.", code="no_trajectories", param="training_data_url")
    return found


def _conversation(number: int, line: bytes) -> Trajectory:
    try:
        value = json.loads(line)
        if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
            raise _bad_line(number, "it is no object with 'messages'")
        trajectory = Trajectory(messages_and_choices=value["messages"], tools=value.get("tools"))
        check_groups([TrajectoryGroup([trajectory])])
    except (ValueError, RecursionError) as error:
        raise _bad_line(number, f"{type(error).__name__}: {error}") from error
    return trajectory


def invalid(error: ValidationError, where: str = "", *, source: Sequence[str | int] = ()) -> ApiError:
    """422 with the first fields at fault; what they were given isn't repeated."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    named = [(".".join(map(str, (*source, *([where] if where else []), *p["loc"]))), p["msg"]) for p in problems[:5]]
    message = "; ".join(f"{field or 'the body'}: {said}" for field, said in named)
    return ApiError(422, message, code="invalid_request", param=named[0][0] or None)


def _bad_line(number: int, why: str) -> ApiError:
    return ApiError(422, f"Line {number} of the file: {why}.", code="invalid_data", param="training_data_url")
