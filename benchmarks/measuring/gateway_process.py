"""Runs the gateway in a process of its own, in front of one engine, as a host does.

Knows the gateway's application and its protocol for routes; measures nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence

import psutil
import uvicorn

from art_core import InferenceEngine, inference_name, installed_plugins
from art_gateway import SERVER_OPTIONS, Route, ServedModel, create_app, raise_file_limit
from art_runtime import Child, free_port, spawn_tethered
from art_runtime.environments import engine_for

#: Guards nothing but the benchmark's own loopback servers.
KEY = "benchmark"
PROJECT, NAME, STEP = "p", "agent", 3
ADAPTER = f"{PROJECT}/{NAME}@{STEP}"
CHAT_PATH = f"/{PROJECT}/v1/chat/completions"


class OneRoute:
    """Routes with one model; acquiring is a few attribute reads, as it is in a backend once a step is loaded."""

    def __init__(self, upstream_url: str, engine: InferenceEngine) -> None:
        self._route = Route(
            upstream_url=upstream_url, upstream_key=KEY, engine=engine, adapter=ADAPTER,
            name=inference_name(NAME, STEP), step=STEP, release=lambda: None,
        )  # fmt: skip

    async def acquire(self, _project: str, _requested_name: str) -> Route:
        """The route."""
        return self._route

    def projects_of(self, _name: str) -> Collection[str]:
        """The project."""
        return (PROJECT,)

    def served(self, _project: str | None) -> Sequence[ServedModel]:
        """The model."""
        return (ServedModel(project=PROJECT, name=NAME, step=STEP, steps=(STEP,)),)


def serve_gateway(port: int, upstream_port: int, engine_name: str) -> None:
    """Run the gateway until it is ended."""
    engine: InferenceEngine = engine_for(installed_plugins().inference_engine(engine_name))
    app = create_app(OneRoute(f"http://127.0.0.1:{upstream_port}", engine), api_key=KEY)
    uvicorn.run(app, host="127.0.0.1", port=port, **SERVER_OPTIONS)


def start_role(script: str, role: str, *arguments: object) -> tuple[Child, int]:
    """Start `script --role ROLE PORT ARGUMENTS...`, and wait until it listens. Raises SystemExit when it doesn't."""
    port = free_port()
    child = spawn_tethered([sys.executable, script, "--role", role, str(port), *map(str, arguments)])
    for _ in range(1200):
        listening = (c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
        if any(address and address.port == port for address in listening):
            return child, port
        if child.poll() is not None:
            break
        time.sleep(0.05)
    child.kill()
    raise SystemExit(f"the {role} did not start; run it alone to see why: --role {role} {port} ...")


def cpu_seconds(child: Child) -> float:
    """CPU time of the program under a tether: what a request costs, however busy the machine is with other things."""
    times = [process.cpu_times() for process in psutil.Process(child.pid).children(recursive=True)]
    return sum(time.user + time.system for time in times)


def main() -> None:
    """`python gateway_process.py --role gateway PORT UPSTREAM_PORT ENGINE`."""
    _, role, port, upstream_port, engine = sys.argv[1:]
    if role != "gateway":
        raise SystemExit(f"no such role: {role}")
    raise_file_limit()
    serve_gateway(int(port), int(upstream_port), engine)


if __name__ == "__main__":
    main()
