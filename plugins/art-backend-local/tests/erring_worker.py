"""The training worker whose answers err as a file says just then: `python erring_worker.py FILE WORDS`, WORDS being the
worker's. Knows the worker's HTTP application and the lines that it sends; knows no job.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Cut(Exception):
    """The connection ends in the middle of an answer."""


def erring(app: ASGIApp, file: Path) -> ASGIApp:
    """The application, which is well where the file says nothing."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        fault = file.read_text(encoding="utf-8") if scope.get("path") == "/jobs" else ""
        if fault.isdigit():
            await send({"type": "http.response.start", "status": int(fault), "headers": []})
            await send({"type": "http.response.body", "body": b"not now"})
            return
        place, _, told = fault.partition(" at ")

        async def spoiled(message: Message) -> None:
            body: bytes = message.get("body", b"")
            if told and told.encode() in body:
                if place == "late":
                    await asyncio.sleep(0.5)
                elif place == "cut":
                    raise Cut
                else:
                    message = {**message, "body": body[: len(body) // 2] + b"\n"}
            await send(message)

        await app(scope, receive, spoiled)

    return answer


if __name__ == "__main__":
    from art_training_kit.worker import main
    from art_training_kit.worker_app import Worker

    worker: Any = Worker
    sound = worker.app
    worker.app = lambda self: erring(sound(self), Path(sys.argv[1]))
    raise SystemExit(main(sys.argv[2:]))
