"""Prompts as token ids, written by a process of their own so that no template and no long text holds up the server.

Knows that process and what it answers. A template that came with a request is rendered by a second such process: it
can only keep others of its kind waiting.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import orjson

from art_core.errors import InvalidRequest
from art_engine_kit.chat_messages import plain_messages, plain_tools

from .api_errors import ApiError, bad_request, context_exceeded
from .api_requests import ChatRequest
from .prefix_cache import Tokens
from .prompt_process import CPU_LIMIT_S, LENGTH, framed

logger = logging.getLogger(__name__)
START_LIMIT_S: Final = 300.0
# For a result, on a machine that does everything else first.
WAIT_LIMIT_S: Final = 120.0
# What a job holds beside its text.
_AROUND: Final = 65536
JSON = dict[str, Any]


class PromptProcessEnded(RuntimeError):
    """The process itself is gone, not only the child that does the work."""


class _Lane:
    """One process and the jobs that wait for it. A process that ends is started anew for the next job."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Raises PromptProcessEnded when it doesn't come to be ready; it has said why in the log."""
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._read()
        except TimeoutError as error:
            raise PromptProcessEnded(f"the process for prompts was not ready within {START_LIMIT_S:g} s") from error

    async def do(self, job: bytes) -> JSON:
        """The result of a job. One that nobody waits for any more is still read, so that the next one gets its own."""
        exchange = asyncio.ensure_future(self._do(job))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            exchange.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    async def _do(self, job: bytes) -> JSON:
        async with self._turn:
            try:
                return await self._exchange(job)
            except (OSError, PromptProcessEnded) as error:
                # Whoever ended it, it wasn't the job: that is done by a child of its own.
                logger.error("The process for prompts has ended and is started anew: %r", error)
            try:
                return await self._exchange(job)
            except (OSError, PromptProcessEnded) as error:
                raise ApiError(503, f"The prompt was not written ({error}); ask again.", code="prompt_failed") from None

    async def _exchange(self, job: bytes) -> JSON:
        try:
            if self._process is None:
                await self.start()
            assert self._process is not None
            assert self._process.stdin is not None
            async with asyncio.timeout(WAIT_LIMIT_S):
                self._process.stdin.write(framed(job))
                await self._process.stdin.drain()
                return await self._read()
        except BaseException:
            await self.close()
            raise

    async def _read(self) -> JSON:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            [size] = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
            result: JSON = orjson.loads(await self._process.stdout.readexactly(size))
        except asyncio.IncompleteReadError as error:
            raise PromptProcessEnded("the process for prompts has ended") from error
        return result

    async def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


class Prompts:
    """Writes the prompts of one model.

    An asynchronous context manager: entering it starts the process, and `ready` turns true once the tokenizer is
    loaded. `trust_templates` lets a request bring a chat template of its own. `on_failure` is told when there can be no
    prompts.
    """

    def __init__(
        self,
        model: Path,
        *,
        chat_template: Path | None,
        trust_templates: bool,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        command = [sys.executable, "-P", "-m", "art_engine_torch.server.prompt_process", "--model", str(model)]
        if chat_template is not None:
            command += ["--chat-template", str(chat_template)]
        self._own, self._brought = _Lane(command), _Lane(command)
        self._trust_templates = trust_templates
        self._on_failure = on_failure
        self.ready = False

    async def __aenter__(self) -> Self:
        self._starting = asyncio.create_task(self._start())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        await self._own.close()
        await self._brought.close()

    async def _start(self) -> None:
        try:
            await self._own.start()
            self.ready = True
        except (OSError, PromptProcessEnded) as error:
            self._on_failure(error)

    async def of_messages(self, asked: ChatRequest, *, context: int, most: int) -> Tokens:
        """The prompt of a chat request, `most` being the characters that `context` tokens can hold.

        Raises ApiError 400, naming the field, when the template cannot take it.
        """
        lane = self._own
        if asked.chat_template is not None:
            if not self._trust_templates:
                raise bad_request(
                    "chat_template: a request may not bring a template, which is a program, unless the server was"
                    " started to run it (--trust-request-chat-template;"
                    " engine_args={'trust_request_chat_template': True}). A model's own is set when it is registered.",
                    "chat_template",
                )
            lane = self._brought
        arguments = dict(asked.chat_template_kwargs or {})
        if asked.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", asked.reasoning_effort)
        job = {
            "messages": asked.messages,
            "tools": asked.tools,
            "template": asked.chat_template,
            "arguments": arguments,
            "generate": asked.add_generation_prompt,
            "continue_final": asked.continue_final_message,
            "special": asked.add_special_tokens,
            "most": most,
        }
        try:
            written = orjson.dumps(job)
            if len(written) > most + _AROUND:
                plain_messages(asked.messages, more_roles=("developer",))
                plain_tools(asked.tools)
                raise context_exceeded(context, f"the messages are {len(written)} bytes long", "messages")
        except InvalidRequest as error:
            raise bad_request(str(error), error.param) from None
        except TypeError:  # orjson's own limit
            raise bad_request("messages: they are nested too deeply.", "messages") from None
        [tokens] = _tokens(await lane.do(written), context, "messages")
        return tokens

    async def of_texts(self, texts: list[str], *, special: bool, context: int, most: int) -> list[Tokens]:
        """The prompts of a completion request that gives them as text. Raises ApiError 400."""
        if not texts:
            return []
        longest = max(map(len, texts))
        if longest > most:
            raise context_exceeded(context, f"a prompt is {longest} characters long", "prompt")
        written = orjson.dumps({"texts": texts, "special": special, "most": most})
        return _tokens(await self._own.do(written), context, "prompt")


def _tokens(result: JSON, context: int, param: str) -> list[Tokens]:
    if "ended" in result:
        why = (
            f"took more than {CPU_LIMIT_S:g} s of computing"
            if result["ended"] == "SIGPROF"
            else f"ended the process that wrote it ({result['ended']})"
        )
        raise bad_request(f"{param}: writing this prompt {why}.", param)
    if "too_long" in result:
        raise context_exceeded(context, f"the prompt is {result['too_long']} characters long", param)
    if "error" in result:
        raise bad_request(result["error"], result["param"])
    return [np.array(ids, dtype=np.int32) for ids in result["tokens"]]
