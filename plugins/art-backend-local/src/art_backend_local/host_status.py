"""What a host is doing, as plain values for `art ps`."""

from __future__ import annotations

from typing import Any

import psutil

from .host_state import HostState

JSON = dict[str, Any]


def host_status(state: HostState) -> JSON:
    """Processes with their memory in bytes, and every model with its steps."""
    return {
        "path": str(state.path),
        "clients": len(state.sessions),
        "idle_s": round(state.sessions.idle_s, 1),
        "engines": [
            {
                "engine": server.engine.name,
                "base_model": str(server.config.base_model),
                "up": server.up,
                "pid": server.pid,
                "restarts": server.restarts,
                "memory": memory_of(server.pid),
            }
            for server in state.servers.values()
        ],
        "workers": [
            {"engine": worker.engine.name, "pid": worker.pid, "memory": memory_of(worker.pid)}
            for worker in state.workers.values()
        ],
        "models": [
            {
                "project": key.project,
                "name": key.name,
                "routed": model.steps.routed,
                "loaded": sorted(model.steps.loaded),
                "in_flight": sum(model.steps.in_flight(step) for step in model.steps.loaded),
                "training": model.trained_by is not None,
            }
            for key, model in state.models.items()
        ],
    }


def memory_of(pid: int | None) -> int:
    """Resident memory of a process and its descendants, in bytes."""
    if pid is None:
        return 0
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:
        return total
    return total
