"""Every call of the wire as it was made once: `exchange.json` is what a client and `art serve` said to each other.

A client goes through the calls once more, past a proxy that writes them down; they must be those of the file. Ids,
keys, hashes, measured numbers and sampled words are replaced, since they are others each time.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import art
from art.sft import create_lr_schedule
from art_backend_serverless import ServerlessBackend, wire

FILE = Path(__file__).parents[1] / "exchange.json"
PUBLISHED = {
    ("POST", wire.MODELS),
    ("DELETE", wire.MODEL),
    ("POST", wire.MODEL_LOG),
    ("GET", wire.CHECKPOINTS),
    ("DELETE", wire.CHECKPOINTS),
    ("POST", wire.TRAINING_JOBS),
    ("POST", wire.SFT_TRAINING_JOBS),
    ("GET", wire.TRAINING_JOB_EVENTS),
    ("POST", "/chat/completions"),
}
OWN = {
    ("GET", wire.CAPABILITIES),
    ("POST", wire.UPLOADS),
    ("GET", wire.CHECKPOINT_FILES),
    ("GET", wire.BLOB),
    ("POST", wire.FORK),
}
HEADERS = ("authorization", "content-type", "content-encoding", "idempotency-key")
#: What stands in the file for fields that are others each time.
WORDS: dict[str, Any] = {
    "authorization": "Bearer KEY",
    "idempotency-key": "IDEMPOTENCY-KEY",
    "id": "ID",
    "model_id": "MODEL-ID",
    "after": "ID",
    "sha256": "SHA256",
    "url": "URL",
    "training_data_url": "URL",
    "start_time": "TIME",
    "created": 0,
    "size": 0,
    "token": "TOKEN",
    "bytes": [0],
    "logprob": -1.0,
    "token_ids": [0],
    "prompt_token_ids": [0],
}
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
JSON = dict[str, Any]


class Recorder:
    """A proxy in front of a server; `calls` is what passed, in order."""

    def __init__(self, upstream: str) -> None:
        self.calls: list[JSON] = []
        self._upstream = upstream.removesuffix("/v1")
        routes = [Route("/{path:path}", self._pass, methods=["GET", "POST", "DELETE"])]
        config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> Recorder:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    async def _pass(self, request: Request) -> Response:
        body = await request.body()
        named = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
            url = self._upstream + request.url.path
            answer = await http.request(request.method, url, params=request.query_params, content=body, headers=named)
        self.calls.append(
            {
                "method": request.method,
                "path": request.url.path.removeprefix("/v1"),
                "query": dict(request.query_params),
                "headers": {name: named[name] for name in HEADERS if name in named},
                "body": _read(gzip.decompress(body) if named.get("content-encoding") == "gzip" else body),
                "status": answer.status_code,
                "answer": _read(answer.content),
            }
        )
        kept = {
            name: answer.headers[name] for name in ("content-type", "retry-after", "etag") if name in answer.headers
        }
        return Response(answer.content, answer.status_code, kept)


def _read(content: bytes) -> Any:
    """JSON, lines of JSON, nothing, or only how a file begins."""
    if not content:
        return None
    try:
        lines = [json.loads(line) for line in content.splitlines() if line]
    except ValueError:
        try:
            return json.loads(content)
        except ValueError:
            return "BYTES"
    return lines[0] if len(lines) == 1 else lines


@pytest.fixture
def recorder(own_server: tuple[str, str]) -> Iterator[Recorder]:
    """In front of the server of the tests."""
    with Recorder(own_server[0]) as recorder:
        yield recorder


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_calls_are_those_of_the_file(own_server: tuple[str, str], recorder: Recorder, tmp_path: Path) -> None:
    """When they aren't, what was said lies in `exchange.json` of the test's folder: look at it, and copy it over."""
    async with ServerlessBackend(own_server[1], recorder.url, show_progress=False) as backend:
        await _every_call(backend, tmp_path)
    now = json.dumps(_without_what_varies(recorder.calls), indent=1, ensure_ascii=False) + "\n"
    (tmp_path / "exchange.json").write_text(now, encoding="utf-8")
    assert now == FILE.read_text(encoding="utf-8"), f"copy {tmp_path / 'exchange.json'} to {FILE} if it is meant"


def test_every_call_of_the_wire_is_in_the_file() -> None:
    calls = json.loads(FILE.read_text(encoding="utf-8"))
    assert {(call["method"], call["path"]) for call in calls} == PUBLISHED | OWN
    assert {call["status"] for call in calls} <= {200, 204}


async def _every_call(backend: ServerlessBackend, folder: Path) -> None:
    model, other = (
        art.TrainableModel(name=name, project="exchange", base_model="tiny", base_path=str(folder))
        for name in ("agent", "forked")
    )
    await model.register(backend)
    async with model.openai_client() as client:
        answer = await client.chat.completions.create(
            messages=HELLO, model=model.get_inference_name(), max_tokens=2, temperature=0, logprobs=True
        )
    groups = [
        art.TrajectoryGroup(
            [
                art.Trajectory(messages_and_choices=[*HELLO, answer.choices[0]], reward=reward, metrics={"length": 3})
                for reward in (0.0, 1.0)
            ]
        )
    ]
    result = await backend.train(model, groups, learning_rate=1e-4, ppo=True)
    await model.log(groups, metrics=result.metrics, step=result.step, split="train")
    chats = [art.Trajectory(messages_and_choices=[*HELLO, {"role": "assistant", "content": "good day"}])] * 2
    await model.train_sft(chats, art.TrainSFTConfig(learning_rate=create_lr_schedule(1, 1e-3), batch_size=2))
    assert await backend.list_steps(model) == [0, 1, 2]
    await backend.pull_checkpoint(model, step=2)
    await other.register(backend)
    await backend.fork_checkpoint(other, "agent", not_after_step=1)
    await backend.delete_checkpoints(model, [1])
    await backend.delete_model(other)
    await backend.delete_model(model)


def _without_what_varies(calls: list[JSON]) -> list[JSON]:
    """The first call of each kind, in order, with the answers of all looks at a job's events put together."""
    found: dict[tuple[str, str], JSON] = {}
    for call in calls:
        call = _plain(call)
        call["path"] = _pattern(call["path"])
        if call["path"] == wire.BLOB:
            call["answer"] = "BYTES"
        kind = (call["method"], call["path"])
        if kind not in found:
            found[kind] = call
        elif call["path"] == wire.TRAINING_JOB_EVENTS and not _ended(found[kind]):
            found[kind]["query"] |= call["query"]
            found[kind]["answer"]["data"] += call["answer"]["data"]
            found[kind]["answer"]["has_more"] = call["answer"]["has_more"]
    return list(found.values())


def _ended(call: JSON) -> bool:
    return bool(call["answer"]["data"]) and call["answer"]["data"][-1]["type"] == "training_ended"


def _pattern(path: str) -> str:
    for pattern in sorted({path for _, path in PUBLISHED | OWN}, key=lambda pattern: pattern.count("{")):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path):
            return pattern
    return path


def _plain(value: Any, name: str = "") -> Any:
    if name in WORDS and value is not None:
        return WORDS[name]
    if isinstance(value, dict):
        if value.get("role") == "assistant":
            value = {**value, "content": "TEXT"}
        return {key: _plain(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, name) for item in value]
    # Metrics are the names with a stroke in them.
    return 0.0 if "/" in name and isinstance(value, float) else value
