"""The training worker with one fault of its process: `python misbehaving_worker.py ID WORDS`, WORDS being the worker's.

Each fault breaks the requirement whose id it goes by and leaves everything else as it is. Knows the worker's HTTP
application and its process; knows no check.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


def ready_only_once() -> None:
    """It says that it is ready to whoever asks first, and to nobody after."""

    def spoiled(app: ASGIApp) -> ASGIApp:
        said: list[int] = []

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def once(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] == 200:
                    message["status"] = 503 if said else 200
                    said.append(200)
                await send(message)

            await app(scope, receive, once if scope.get("path") == "/health" else send)

        return answer

    _wrap_application(spoiled)


def asks_for_no_token() -> None:
    """It forgets the token that it was given, and takes jobs from everybody."""
    from art_engine_kit.training_wire import WORKER_TOKEN

    del os.environ[WORKER_TOKEN]


def takes_unknown_fields() -> None:
    """Of what is sent as a job it overlooks the fields that no job has."""
    from pydantic import ConfigDict

    from art_engine_kit.training_wire import TrainJob
    from art_training_kit import worker_app

    class AnyJob(TrainJob):
        model_config = ConfigDict(extra="ignore")

    worker_app.TrainJob = AnyJob  # type: ignore[attr-defined]


def goes_on_without_client() -> None:
    """It never hears that the client of a job has gone."""

    def spoiled(app: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def deaf() -> Message:
                message = await receive()
                if message["type"] == "http.disconnect":
                    await asyncio.Event().wait()
                return message

            await app(scope, deaf if scope.get("path") == "/jobs" else receive, send)

        return answer

    _wrap_application(spoiled)


def logs_its_token() -> None:
    """It writes the environment that it was started with into its log."""
    print(dict(os.environ), flush=True)


def ignores_sigterm() -> None:
    """It goes on whatever signal asks it to leave."""
    import uvicorn

    def stay(_: uvicorn.Server, number: int, __: Any) -> None:
        print(f"signal {number} is ignored", flush=True)

    server: Any = uvicorn.Server
    server.handle_exit = stay


def _wrap_application(spoiled: Callable[[ASGIApp], ASGIApp]) -> None:
    from art_training_kit.worker_app import Worker

    worker: Any = Worker
    sound = worker.app
    worker.app = lambda self: spoiled(sound(self))


FAULTS: dict[str, Callable[[], None]] = {
    "TRN-101": ready_only_once,
    "TRN-102": asks_for_no_token,
    "TRN-119": takes_unknown_fields,
    "TRN-122": goes_on_without_client,
    "TRN-140": logs_its_token,
    "TRN-141": ignores_sigterm,
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    from art_training_kit.worker import main

    raise SystemExit(main(sys.argv[2:]))
