"""The card of the serverless backend, and the hook that sends a model's logged trajectories to its service. Imports
nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from art_core import BackendCapability, BackendSpec, TrajectoryGroup, hookimpl

art_api = 1


@hookimpl
def art_register_backends() -> Iterable[BackendSpec]:
    """The backend that trains on a machine elsewhere."""
    return [
        BackendSpec(
            name="serverless",
            factory="art_backend_serverless.backend:ServerlessBackend",
            summary="Trains and serves models on a machine elsewhere: W&B's cloud, or a server of your own.",
            capabilities=frozenset(BackendCapability)
            - {
                BackendCapability.CHECKPOINTS_ON_DISK,
                BackendCapability.PUBLICATION_HOOKS,
                BackendCapability.WARM_START,
            },
        )
    ]


@hookimpl
async def art_log_trajectories(model: Any, trajectory_groups: Sequence[TrajectoryGroup], split: str) -> None:
    """Send the trajectories of a model that is registered with a ServerlessBackend to its service, but those that a
    pipeline threw away.
    """
    if split == "discarded":
        return
    from .logs import sender_of

    send = sender_of(model)
    if send is not None:
        await send(model, trajectory_groups, split)
