"""What a host is doing, as plain values for `art ps`."""

from __future__ import annotations

from typing import Any

from art_runtime.process_memory import memory_of

from .host import Host

JSON = dict[str, Any]


def host_status(host: Host) -> JSON:
    """Processes with their memory in bytes, and every model with its steps."""
    return {
        "path": str(host.path),
        "clients": len(host.sessions),
        "idle_s": round(host.sessions.idle_s, 1),
        "engines": [
            {
                "engine": server.engine.name,
                "server": member.server.title,
                "base_model": str(server.base_model),
                "up": member.connection is not None,
                "pid": member.server.pid,
                "in_flight": member.in_flight,
                "restarts": member.restarts,
                "memory": memory_of(member.server.pid),
            }
            for server in host.processes.replicas
            for member in server.members
        ],
        "workers": [
            {
                "engine": worker.engine.name,
                "state": worker.state,
                "pid": worker.pid,
                "memory": memory_of(worker.pid),
            }
            for worker in host.processes.workers
        ],
        "models": [
            {
                "project": key.project,
                "name": key.name,
                "routed": model.steps.routed,
                "loaded": sorted(model.steps.loaded),
                "in_flight": sum(model.steps.in_flight(step) for step in model.steps.loaded),
                "training": model.turn.taken,
            }
            for key, model in host.models.items()
        ],
    }
