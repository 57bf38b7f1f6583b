"""A stand-in for W&B's training cloud, which can't be here: a real HTTP server on loopback that speaks only what is
published of the cloud's wire, keeps what it was sent, and fails in the ways that it is told to.

It trains nothing. What trains is tested against a real `art serve`, which is started here too.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import h11
import pytest

import art
from art_backend_serverless import Patience, ServerlessBackend

KEY = "wandb-key-0123456789"
QUICK = Patience(request_s=5.0, first_s=1.0, pause_s=0.01, longest_pause_s=0.05, poll_s=0.05, job_silence_s=30.0)
JSON = dict[str, Any]
ART = [sys.executable, "-m", "art_core"]


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    # More than the body has: the rest never comes.
    announced: int | None = None


def answer(value: Any, status: int = 200, **headers: str) -> Answer:
    named = tuple((name.replace("_", "-"), text) for name, text in headers.items())
    return Answer(status, b"" if value is None else json.dumps(value).encode(), named)


class Cut(Exception):
    """The connection ends without an answer."""


@dataclass
class Fault:
    """What happens to the next `times` requests of this kind. `instead` answers for the cloud, `after` changes its
    answer, `cut_at` ends the connection when so many bytes of the body have come, `drops` keeps none of them.
    """

    method: str
    path: str
    times: int = 1
    instead: Callable[[Asked], Awaitable[Answer]] | None = None
    after: Callable[[Answer], Answer] | None = None
    cut_at: int | None = None
    drops: bool = False

    def is_for(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.fullmatch(self.path, path) is not None


@dataclass
class FakeCloud:
    """Its models, jobs and checkpoints, and every request that it took in whole."""

    answer: ClassVar[Callable[..., Answer]] = staticmethod(answer)

    port: int = 0
    key: str = KEY
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    models: dict[str, JSON] = field(default_factory=dict)
    checkpoints: dict[str, list[JSON]] = field(default_factory=dict)
    jobs: dict[str, list[JSON]] = field(default_factory=dict)
    logged: list[JSON] = field(default_factory=list)
    # The events of the next jobs, a list for each; without one, a job that goes well.
    scripts: list[list[tuple[str, JSON]]] = field(default_factory=list)
    page: int = 1000
    says_has_more: bool = False
    received: int = 0
    server: Any = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def calls(self, method: str, path: str) -> list[Asked]:
        return [each for each in self.asked if each.method == method and re.fullmatch(path, each.path)]

    def fails(self, method: str, path: str, **how: Any) -> Fault:
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def handle(self, asked: Asked) -> Answer:
        if asked.headers.get("authorization") != f"Bearer {self.key}":
            return answer({"detail": "invalid key"}, 401)
        parts = asked.path.removeprefix("/v1/preview/").split("/")
        match (asked.method, *parts):
            case ("POST", "models"):
                return self._create(asked.json)
            case ("DELETE", "models", model_id):
                return answer(None, 204 if self.models.pop(model_id, None) else 404)
            case ("POST", "models", _, "log"):
                self.logged.append(asked.json)
                return answer(None, 204)
            case ("GET", "models", model_id, "checkpoints"):
                return self._page(self.checkpoints[model_id], asked.query)
            case ("DELETE", "models", model_id, "checkpoints"):
                return self._delete(model_id, asked.json["steps"])
            case ("POST", "training-jobs" | "sft-training-jobs"):
                return self.submit(asked.json)
            case ("GET", "training-jobs", job_id, "events"):
                return self._page(self.jobs[job_id], asked.query)
        return answer({"detail": "Not Found"}, 404)

    def _create(self, body: JSON) -> Answer:
        entity = body.get("entity") or "key-owner"
        known = [
            m
            for m in self.models.values()
            if (m["entity"], m["project"], m["name"]) == (entity, body["project"], body["name"])
        ]
        if known and not body["return_existing"]:
            return answer({"detail": "exists"}, 409)
        if known:
            return answer(known[0])
        model = {"id": f"model-{len(self.models)}", "entity": entity, "project": body["project"], "name": body["name"]}
        model |= {"base_model": body["base_model"], "run_id": "run-1"}
        self.models[model["id"]], self.checkpoints[model["id"]] = model, []
        return answer(model)

    def add_checkpoint(self, model_id: str, step: int) -> None:
        self.checkpoints[model_id].append({"id": f"ck-{model_id}-{step}", "step": step, "metrics": {"reward": None}})

    def submit(self, body: JSON) -> Answer:
        job_id = f"job-{len(self.jobs)}"
        groups = body.get("trajectory_groups", [])
        script = (
            self.scripts.pop(0)
            if self.scripts
            else [
                ("training_started", {"num_sequences": sum(len(group["trajectories"]) for group in groups)}),
                ("gradient_step", {"metrics": {"loss/train": 0.5, "loss/grad_norm": None}}),
                ("gradient_step", {"metrics": {"loss/train": 0.25, "loss/grad_norm": 2.0}}),
                ("training_ended", {}),
            ]
        )
        self.jobs[job_id] = [
            {"id": f"{job_id}-{n}", "type": kind, "data": data} for n, (kind, data) in enumerate(script)
        ]
        if script and script[-1][0] == "training_ended":
            steps = [each["step"] for each in self.checkpoints[body["model_id"]]]
            self.add_checkpoint(body["model_id"], max(steps, default=0) + 1)
        return answer({"id": job_id})

    def _page(self, items: list[JSON], query: dict[str, str]) -> Answer:
        order = -1 if query.get("order") == "desc" else 1
        items = items[::order]
        if "after" in query:
            places = [n for n, item in enumerate(items) if item["id"] == query["after"]]
            items = items[places[0] + 1 :]
        found = items[: min(self.page, int(query.get("limit", "100")))]
        more = {"has_more": len(found) < len(items)} if self.says_has_more else {}
        return answer({"data": found, **more})

    def _delete(self, model_id: str, steps: list[int]) -> Answer:
        there = {each["step"] for each in self.checkpoints[model_id]}
        self.checkpoints[model_id] = [each for each in self.checkpoints[model_id] if each["step"] not in steps]
        return answer(
            {"deleted_count": len(there & set(steps)), "not_found_steps": [step for step in steps if step not in there]}
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request after request, until an end that was asked for or made."""
        connection = h11.Connection(h11.SERVER)
        self.writers.add(writer)
        try:
            while True:
                await self._one(connection, reader, writer)
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return
                connection.start_next_cycle()
        except (Cut, h11.RemoteProtocolError, ConnectionError):
            writer.transport.abort()
        finally:
            self.writers.discard(writer)
            writer.close()

    def drop(self) -> None:
        """End every connection, as a machine does that goes down."""
        for writer in self.writers:
            writer.transport.abort()

    async def _one(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request, fault, body = None, None, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.ConnectionClosed):
                raise Cut
            elif isinstance(event, h11.Request):
                request = event
                path = urlsplit(event.target.decode()).path
                fault = next((f for f in self.faults if f.is_for(event.method.decode(), path)), None)
                if fault is not None:
                    fault.times -= 1
            elif isinstance(event, h11.Data):
                self.received += len(event.data)
                if fault is None or not fault.drops:
                    body += event.data
                if fault is not None and fault.cut_at is not None and len(body) >= fault.cut_at:
                    raise Cut
            elif isinstance(event, h11.EndOfMessage):
                break
        assert request is not None
        target = urlsplit(request.target.decode())
        asked = Asked(
            request.method.decode(),
            target.path,
            {name: values[0] for name, values in parse_qs(target.query).items()},
            {name.decode().lower(): value.decode() for name, value in request.headers},
            bytes(body),
        )
        self.asked.append(asked)
        if fault is not None and fault.instead is not None:
            given = await fault.instead(asked)
        else:
            given = self.handle(asked)
            if fault is not None and fault.after is not None:
                given = fault.after(given)
        head = [
            ("Content-Length", str(len(given.body) if given.announced is None else given.announced)),
            *given.headers,
        ]
        if given.status == 204:
            head = head[1:]
        writer.write(connection.send(h11.Response(status_code=given.status, headers=head)) or b"")
        if given.body:
            writer.write(connection.send(h11.Data(data=given.body)) or b"")
        if given.announced is not None:
            await writer.drain()
            writer.close()
            raise Cut
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()


@asynccontextmanager
async def _cloud() -> AsyncIterator[FakeCloud]:
    made = FakeCloud()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port, made.server = server.sockets[0].getsockname()[1], server
    async with server:
        yield made
        made.drop()


@pytest.fixture
async def cloud() -> AsyncIterator[FakeCloud]:
    """A cloud of this test's own."""
    async with _cloud() as made:
        yield made


@pytest.fixture(scope="session")
def new_cloud() -> Callable[[], AbstractAsyncContextManager[FakeCloud]]:
    """Makes a cloud, for a test that needs many: `async with new_cloud() as cloud`."""
    return _cloud


@pytest.fixture
def serverless(cloud: FakeCloud) -> ServerlessBackend:
    """A backend at the cloud of this test, which shows nothing."""
    return ServerlessBackend(KEY, cloud.base_url, patience=QUICK, show_progress=False)


@pytest.fixture(scope="session")
def patience() -> Patience:
    """That of a client in a hurry."""
    return QUICK


@pytest.fixture
async def model(serverless: ServerlessBackend, tmp_path: Path) -> art.TrainableModel:
    """A model that is registered there."""
    made = art.TrainableModel(
        name="agent-001", project="my-project", base_model="Qwen/Qwen2.5-0.5B-Instruct", base_path=str(tmp_path)
    )
    await made.register(serverless)
    return made


@pytest.fixture
def groups() -> list[art.TrajectoryGroup]:
    """Two groups of two, with what a step needs of them and what must not be lost on the way."""
    return [
        art.TrajectoryGroup(
            [
                art.Trajectory(
                    messages_and_choices=[
                        {"role": "user", "content": f"question {number}"},
                        choice(f"answer {reward}"),
                    ],
                    reward=reward,
                    metrics={"length": 3},
                    metadata={"number": number},
                    additional_histories=[art.History(messages_and_choices=[{"role": "user", "content": "beside"}])],
                )
                for reward in (0.0, 1.0)
            ],
            exceptions=[ValueError("a rollout that raised")],
        )
        for number in range(2)
    ]


def choice(text: str) -> Any:
    from openai.types.chat.chat_completion import Choice

    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": [{"token": text, "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
            "token_ids": [1, 2, 3],
            "policy_version": 0,
        }
    )


@contextmanager
def _art_serve(data: Path, *base_models: str) -> Iterator[tuple[str, str]]:
    """A server as a process of its own, with base models NAME=FOLDER, on engine torch; its address and a key."""
    command = [*ART, "serve", "--data", str(data), "--port", "0"]
    command += [word for base_model in base_models for word in ("--base-model", base_model)]
    command += ["--inference-engine", "torch", "--training-engine", "torch", "--backend-option", "max_adapters=20"]
    create = [*ART, "serve", "keys", "create", "acme", "--data", str(data)]
    key = subprocess.run(create, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    log = data / "server.log"
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, log.read_text(encoding="utf-8")[-3000:]
        yield said.split()[-1], key
    finally:
        process.terminate()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
        down = [*ART, "down", "--path", str(data / "backend")]
        subprocess.run(down, check=False, capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def own_server(
    tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path, conformance_model: Path
) -> Iterator[tuple[str, str]]:
    """The address and a key of one `art serve` for all tests that need one; each has models of its own. Base models are
    `tiny`, and the conformance suite's by its folder.
    """
    names = (f"tiny={own_tiny_model}", f"{conformance_model}={conformance_model}")
    with _art_serve(tmp_path_factory.mktemp("serve"), *names) as address_and_key:
        yield address_and_key
