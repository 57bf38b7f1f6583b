"""The server of engine llamacpp: an OpenAI endpoint in front of llama.cpp's, which takes adapters at its start only.

Loading an adapter starts another llama.cpp server with one adapter more; whatever is asked from then on goes there, and
the one before ends with its last answer. Knows no ART. Runs in the engine's own environment.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from art_llamacpp_gguf import Base, write_adapter, write_base
from art_llamacpp_process import Llama, Refused
from art_llamacpp_requests import JSON, Asked, Ids, choice_of
from pydantic import ValidationError

KEY_VARIABLE = "ART_LLAMACPP_API_KEY"
ANSWER_LIMIT_S = 3600.0


class Front:
    """The newest llama.cpp server, and the adapters by name: its own, and with one more those of the next."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.base = options, Base(options.model)
        self.pieces = self.base.pieces()
        self.adapters: dict[str, Path] = {}
        self.changing, self.written = asyncio.Lock(), 0
        self.watching: set[asyncio.Task[None]] = set()

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Everything that is there while it serves."""
        with tempfile.TemporaryDirectory(prefix="art-llamacpp-") as folder:
            self.folder = Path(folder)
            # llama.cpp may close a kept connection at the moment that it is used again.
            connector = TCPConnector(force_close=True, limit=0)
            timeout = ClientTimeout(total=ANSWER_LIMIT_S)
            async with ClientSession(connector=connector, timeout=timeout) as self.session:
                exact = self.options.dtype == "float32"
                await asyncio.to_thread(write_base, self.base, self.folder / "base.gguf", exact=exact)
                self.newest = await self._start({})
                yield
                self._retire(self.newest)

    async def load(self, request: web.Request) -> web.Response:
        """Give the adapter in a folder a name. The server before is asked until the next is there."""
        body = await _json(request)
        name, folder = str(body.get("lora_name", "")), Path(str(body.get("lora_path", "")))
        async with self.changing:
            if not name or name in self.adapters or name == self.options.served_model_name:
                raise Refused(400, f"the name {name!r} is missing or taken")
            if len(self.adapters) >= self.options.max_adapters:
                raise Refused(400, f"there are {len(self.adapters)} adapters already, as many as were asked for")
            self.written += 1
            file, rank = self.folder / f"adapter-{self.written}.gguf", self.options.max_lora_rank
            try:
                await asyncio.to_thread(write_adapter, self.base, folder, file, max_rank=rank)
                adapters = {**self.adapters, name: file}
                before, self.newest = self.newest, await self._start(adapters)
            except (OSError, ValueError, KeyError) as error:
                file.unlink(missing_ok=True)
                raise Refused(400, f"adapter {name} can't be loaded: {error!r}") from error
            self.adapters = adapters
            self._retire(before)
        return web.json_response({"loaded": name})

    async def unload(self, request: web.Request) -> web.Response:
        """Forget a name. Answers under way keep the adapter, which llama.cpp holds until the next load."""
        name = str((await _json(request)).get("lora_name", ""))
        async with self.changing:
            if name not in self.adapters:
                raise Refused(404, f"there is no adapter {name!r}")
            self.adapters.pop(name).unlink()
        return web.json_response({"unloaded": name})

    async def models(self, _: web.Request) -> web.Response:
        """The base model, and the adapters with it as their parent."""
        base = self.options.served_model_name
        common = {"object": "model", "created": 0, "owned_by": "llamacpp"}
        listed = [{"id": base, **common}, *({"id": name, **common, "parent": base} for name in self.adapters)]
        return web.json_response({"object": "list", "data": listed})

    async def health(self, _: web.Request) -> web.Response:
        """It listens only once it is whole."""
        return web.json_response({"status": "ok"})

    async def chat(self, request: web.Request) -> web.Response:
        """The prompt is what llama.cpp makes of the messages by the model's template."""
        asked = _asked(await _json(request), "messages")
        with self._llama(asked.model) as (llama, lora):
            told = {"messages": asked.messages, "chat_template_kwargs": asked.chat_template_kwargs}
            prompt = await llama.ids((await llama.ask("apply-template", told))["prompt"])
            return await _complete(llama, lora, asked, prompt, chat=True)

    async def text(self, request: web.Request) -> web.Response:
        """The prompt is a text, or token ids as they are."""
        asked = _asked(await _json(request), "prompt")
        with self._llama(asked.model) as (llama, lora):
            prompt = asked.prompt if isinstance(asked.prompt, list) else await llama.ids(asked.prompt)
            if not all(0 <= token < len(self.pieces) for token in prompt):
                raise Refused(400, f"prompt: token ids are at least 0 and below {len(self.pieces)}")
            return await _complete(llama, lora, asked, prompt, chat=False)

    @contextmanager
    def _llama(self, name: str) -> Iterator[tuple[Llama, JSON]]:
        """The server to ask, and what names the adapter there: by its number, with all others at a scale of 0."""
        if name != self.options.served_model_name and name not in self.adapters:
            raise Refused(404, f"there is no model {name!r}")
        llama = self.newest
        scales = [{"id": i, "scale": float(other == name)} for i, other in enumerate(llama.adapters)]
        with llama.answering():
            yield llama, {"lora": scales}

    async def _start(self, adapters: dict[str, Path]) -> Llama:
        options, template = self.options, self.options.chat_template
        told: JSON = {
            "model": str(self.folder / "base.gguf"), "adapters": list(map(str, adapters.values())),
            "slots": options.slots, "threads": options.threads, "exact": options.dtype == "float32",
            "context": options.max_model_len or self.base.context(),
            "template": None if template is None else template.read_text(encoding="utf-8"),
        }  # fmt: skip
        started = await Llama.start(told, list(adapters), self.session, self.pieces)
        task = asyncio.create_task(self._watch(started))
        self.watching.add(task)
        task.add_done_callback(self.watching.discard)
        return started

    async def _watch(self, llama: Llama) -> None:
        code = await llama.process.wait()
        if not llama.last:
            print(f"llama.cpp ended with {code}, and so does this server", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _retire(self, llama: Llama) -> None:
        llama.last = True
        llama.end_if_done()


async def _complete(llama: Llama, lora: JSON, asked: Asked, prompt: Ids, *, chat: bool) -> web.Response:
    each = [{**asked.native(index), **lora, "prompt": prompt} for index in range(asked.n)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(llama.sample(native)) for native in each]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    choices = [choice_of(index, chat, prompt, *task.result()) for index, task in enumerate(tasks)]
    sampled = sum(len(choice["token_ids"]) for choice in choices)
    usage = {"prompt_tokens": len(prompt), "completion_tokens": sampled, "total_tokens": len(prompt) + sampled}
    kind = "chat.completion" if chat else "text_completion"
    head = {"id": secrets.token_hex(8), "object": kind, "created": 0, "model": asked.model}
    return web.json_response({**head, "choices": choices, "usage": usage})


async def _json(request: web.Request) -> JSON:
    try:
        body = await request.json()
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    return body


def _asked(body: JSON, needed: str) -> Asked:
    try:
        asked = Asked.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if needed not in asked.model_fields_set:
        raise Refused(400, f"{needed} is missing")
    return asked


@web.middleware
async def guarded(request: web.Request, handler: Any) -> web.StreamResponse:
    """Nothing but the health check without the key, and every refusal in OpenAI's form."""
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    try:
        if request.path != "/health" and not secrets.compare_digest(given.encode(), os.environ[KEY_VARIABLE].encode()):
            raise Refused(401, "the API key is wrong or missing")
        answer: web.StreamResponse = await handler(request)
        return answer
    except Refused as refused:
        return web.json_response({"error": {"message": str(refused)}}, status=refused.status)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "chat-template"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("served-model-name", "host", "dtype"):
        parser.add_argument(f"--{name}", default="auto")
    for name in ("port", "max-adapters", "max-lora-rank", "max-model-len", "slots", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--probe", action="store_true", help="End with 0 where everything that is needed is there.")
    options = parser.parse_args()
    if options.probe:
        return
    front = Front(options)
    app = web.Application(middlewares=[guarded], client_max_size=2**28)
    app.cleanup_ctx.append(front.run)
    app.add_routes([
        web.get("/health", front.health), web.get("/v1/models", front.models),
        web.post("/v1/load_lora_adapter", front.load), web.post("/v1/unload_lora_adapter", front.unload),
        web.post("/v1/chat/completions", front.chat), web.post("/v1/completions", front.text),
    ])  # fmt: skip
    web.run_app(
        app, host=options.host, port=options.port, handler_cancellation=True, shutdown_timeout=5.0, access_log=None
    )


if __name__ == "__main__":
    main()
