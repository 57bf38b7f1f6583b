"""A backend in memory and an OpenAI-compatible endpoint, for tests of the client."""

import asyncio
import json
import resource
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from art_core import (
    BackendCapability,
    LocalTrainResult,
    PluginRegistry,
    Registration,
    check_groups,
    hookimpl,
    inference_name,
)
from art_core.errors import CheckpointInUse


class MemoryBackend:
    """A backend whose steps are numbers; it keeps every call."""

    name = "memory"
    capabilities = frozenset({BackendCapability.DELETE_CHECKPOINTS, BackendCapability.LEASES})

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.calls: list[tuple] = []
        self.steps = [0]
        self.leased: set[int] = set()

    async def register(self, model):
        self.calls.append(("register", model.name))
        return Registration(
            inference_base_url=f"{self.url}/{model.project}/v1", inference_api_key="sk-memory", base_path=self.path
        )

    async def train(self, model, trajectory_groups, **options):
        check_groups(trajectory_groups)
        self.calls.append(("train", model.name, len(trajectory_groups), options))
        self.steps.append(self.steps[-1] + 1)
        return LocalTrainResult(
            step=self.steps[-1], metrics={"loss/train": 0.5}, checkpoint_path=str(self.path / str(self.steps[-1]))
        )

    async def get_step(self, model):
        return self.steps[-1]

    async def list_steps(self, model):
        return list(self.steps)

    def inference_name(self, model, step=None):
        return inference_name(model.name, self.steps[-1] if step is None else step)

    @asynccontextmanager
    async def lease(self, model, step=None):
        yield self.inference_name(model, step)

    async def delete_checkpoints(self, model, steps):
        if self.leased & set(steps):
            raise CheckpointInUse("leased")
        self.steps = [step for step in self.steps if step not in steps]
        return list(steps)

    async def fork_checkpoint(self, model, from_model, *, from_project=None, not_after_step=None):
        raise AssertionError("not declared")

    async def pull_checkpoint(self, model, *, step=None, local_path=None):
        raise AssertionError("not declared")

    async def close(self):
        self.calls.append(("close",))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.close()


class Endpoint:
    """An OpenAI-compatible endpoint; `answer` makes the response, and every request is kept."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.connections: set = set()
        self.answer = self.complete

    async def handle(self, request):
        self.connections.add(request.transport)
        self.headers.append(dict(request.headers))
        body = await request.json()
        self.requests.append(body)
        return await self.answer(request, body)

    async def complete(self, request, body):
        return web.json_response(completion(body), headers={"x-request-id": "req-1"})


def completion(body, *, text="Hello.", version=3, **choice):
    token_ids = [5, 6]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{body['model']}@{version}",
        "choices": [
            {
                "index": index,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
                "logprobs": {
                    "content": [{"token": "t", "bytes": [116], "logprob": -0.5, "top_logprobs": []} for _ in token_ids],
                    "refusal": None,
                },
                "token_ids": token_ids,
                "prompt_token_ids": [1, 2, 3],
                "policy_version": version,
                **choice,
            }
            for index in range(body.get("n") or 1)
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


@pytest.fixture
async def endpoint():
    served = Endpoint()
    app = web.Application()
    app.router.add_post("/{project}/v1/chat/completions", served.handle)
    app.router.add_post("/v1/chat/completions", served.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield served
    await runner.cleanup()


@pytest.fixture
def many_files():
    """This process may open as many files as it ever may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def backend(endpoint, tmp_path):
    return MemoryBackend(endpoint.url, tmp_path / "backend")


@pytest.fixture
async def model(backend):
    import art

    model = art.TrainableModel(name="agent-001", project="task", base_model="some-base")
    await model.register(backend)
    return model


@pytest.fixture
def logged(monkeypatch):
    """The metrics that were logged, one dictionary for each call."""
    told = []

    class Tracker:
        art_api = 1

        @hookimpl
        def art_log_metrics(self, model, metrics, step, split):
            told.append(metrics)

    registry = PluginRegistry()
    registry.register(Tracker(), "tracker")
    monkeypatch.setattr("art.model.installed_plugins", lambda: registry)
    return told


async def stream(request, chunks):
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await asyncio.sleep(0)
    await response.write(b"data: [DONE]\n\n")
    return response
