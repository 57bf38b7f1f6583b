"""The addresses by which a backend drives the server: adapters, pausing, sleeping. Knows no generation."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from .api_bodies import json_response, read_body
from .api_errors import ApiError, bad_request
from .engine import InferenceEngineThread, UnknownAdapter
from .lora_files import AdapterMissing, AdapterRefused

CONTROL_TIMEOUT_S = 120.0


class ControlHandlers:
    """What is asked of the engine beside answers."""

    def __init__(self, engine: InferenceEngineThread) -> None:
        self._engine = engine

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        body = await read_body(request)
        name, path = _text_field(body, "lora_name"), _text_field(body, "lora_path")
        if body.get("load_inplace"):
            raise bad_request("load_inplace would change requests under way; load under a new name.", "load_inplace")
        try:
            await asyncio.to_thread(self._engine.load_adapter, name, Path(path))
        except AdapterMissing as error:
            raise ApiError(404, str(error), param="lora_path", code="adapter_missing") from None
        except AdapterRefused as error:
            raise bad_request(str(error), "lora_path", "adapter_refused") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added.")

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        name = _text_field(await read_body(request), "lora_name")
        try:
            self._engine.unload_adapter(name)
        except UnknownAdapter:
            there = ", ".join(self._engine.adapter_names()) or "none"
            raise ApiError(404, f"No adapter {name!r} is loaded. Loaded: {there}.", param="lora_name") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed.")

    async def pause(self, request: Request) -> Response:
        """POST /pause."""
        body = await read_body(request, optional=True)
        mode = request.query_params.get("mode") or body.get("mode") or "keep"
        if mode not in ("keep", "abort"):
            raise bad_request(f"mode={mode!r} is not supported; use 'keep' or 'abort'.", "mode")
        await _done(self._engine.pause(abort=mode == "abort"))
        return json_response({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        """POST /resume."""
        await _done(self._engine.resume())
        return json_response({"status": "paused" if self._engine.paused else "resumed"})

    async def is_paused(self, _: Request) -> Response:
        """GET /is_paused."""
        return json_response({"is_paused": self._engine.paused})

    async def sleep(self, _: Request) -> Response:
        """POST /sleep."""
        await _done(self._engine.sleep())
        return json_response({"status": "asleep"})

    async def wake(self, _: Request) -> Response:
        """POST /wake_up."""
        await _done(self._engine.wake())
        return json_response({"status": "awake"})


def _text_field(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise bad_request(f"{name} must be a non-empty string.", name)
    return value


async def _done(future: Future[Any]) -> None:
    try:
        await asyncio.wait_for(asyncio.wrap_future(future), CONTROL_TIMEOUT_S)
    except TimeoutError:
        raise ApiError(503, f"The engine did not get to this within {CONTROL_TIMEOUT_S:.0f} s.") from None
