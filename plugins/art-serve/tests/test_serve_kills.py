"""A server or a client killed with SIGKILL while a job is sent, waits, trains or is published: nothing is lost, nothing
trained twice. On the fake engines, whose answers tell how often a step was trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROUNDS = [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(1, 10))]


def logprob(client: Any, name: str) -> float:
    """What tells the weights that answer: -1, less all learning rates so far, each times the number of its step."""
    entity = client.json("GET", "/capabilities")["entity"]
    asked = {"model": f"wandb-artifact:///{entity}/p/{name}", "messages": [{"role": "user", "content": "hi"}]}
    answer = client.json("POST", "/chat/completions", json=asked)
    return round(float(answer["choices"][0]["logprobs"]["content"][0]["logprob"]), 6)


@pytest.fixture
def name(entity: str) -> str:
    """A model's name that no other test has, so that its jobs can be told from others in the worker's log."""
    return f"m-{entity}"


@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize(
    ("stage", "hold", "begun"),
    # A worker that outlives the server for a moment may save the step after all; then it isn't begun again.
    [("training", "hold_train", [[1], [1, 1]]), ("publishing", "hold_load", [[1]])],
)
def test_a_job_cut_off_by_a_kill_is_made_once(
    server: Any, client: Any, name: str, stage: str, hold: str, begun: list[list[int]], round_: int
) -> None:
    model = client.model(name)
    server.order(**{hold: True})
    job = client.submit(model, key="k", learning_rate=0.5)
    waiting = client.submit(model, key="after", learning_rate=0.25)
    client.until(lambda: client.json("GET", f"/preview/training-jobs/{job}")["phase"] == stage)
    client.until(lambda: server.trained(name))
    server.kill()
    server.order()
    server.start()
    assert client.submit(model, key="k", learning_rate=0.5) == job, "sent again, it is the same job"
    events = list(client.events(job))
    assert [event["type"] for event in events].count("training_started") == 1
    assert events[-1]["type"] == "training_ended"
    assert events[-1]["data"]["step"] == 1
    assert events[-2]["data"].get("loss/train", 0.5) == 0.5
    assert client.ended(waiting)["type"] == "training_ended"
    assert server.trained(name) in [[*steps, 2] for steps in begun]
    assert client.steps(model) == [0, 1, 2]
    assert [logprob(client, f"{name}:step{step}") for step in (1, 2)] == [-1.5, -2.0]


@pytest.mark.parametrize("round_", ROUNDS)
def test_jobs_that_wait_outlive_a_kill_in_their_order(server: Any, client: Any, name: str, round_: int) -> None:
    model = client.model(name)
    server.order(hold_train=True)
    jobs = [client.submit(model, key=f"k{n}") for n in range(4)]
    client.until(lambda: server.trained(name))
    assert [client.json("GET", f"/preview/training-jobs/{job}")["place"] for job in jobs[1:]] == [1, 2, 3]
    server.kill()
    server.order()
    server.start()
    assert [client.ended(job)["data"]["step"] for job in jobs] == [1, 2, 3, 4]
    assert client.steps(model) == [0, 1, 2, 3, 4]
    assert server.trained(name) in ([1, 1, 2, 3, 4], [1, 2, 3, 4])


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_job_whose_body_was_cut_off_by_a_kill_is_sent_again(server: Any, client: Any, name: str, round_: int) -> None:
    model = client.model(name)
    body = json.dumps({"model_id": model, "trajectory_groups": [{"trajectories": [{"reward": 1.0}]}]}).encode()

    def killed_on_the_way() -> Iterator[bytes]:
        yield body[:-9]
        server.kill()
        yield body[-9:]

    headers = {"Idempotency-Key": "k", "Content-Length": str(len(body))}
    with contextlib.suppress(httpx.TransportError):
        client.ask("POST", "/preview/training-jobs", content=killed_on_the_way(), headers=headers)
    server.start()
    assert list((server.data / "jobs").iterdir()) == []
    sent = client.ask("POST", "/preview/training-jobs", content=body, headers=headers)
    assert client.ended(sent.json()["id"])["type"] == "training_ended"
    assert client.steps(model) == [0, 1]
    assert list((server.data / "jobs").iterdir()) == []


#: Trains one step as the documents' code does, of as many trajectories as it is told, and says which it was.
CLIENT = """
import asyncio, os, sys
import art
from art.serverless.backend import ServerlessBackend

async def main(url, name, folder, trajectories):
    backend = await ServerlessBackend(base_url=url)
    model = art.TrainableModel(name=name, project="p", base_model="tiny", base_path=folder)
    await model.register(backend)

    def trajectory(reward):
        # Of what can't be compressed.
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": os.urandom(5000).hex()}]
        return art.Trajectory(messages_and_choices=said, reward=reward)

    group = art.TrajectoryGroup(trajectory(float(number % 2)) for number in range(int(trajectories)))
    result = await backend.train(model, [group], learning_rate=0.5, allow_training_without_logprobs=True)
    print("trained step", result.step, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def training_client(server: Any, client: Any, name: str, tmp_path: Path) -> Iterator[Any]:
    """Starts a client as a process of its own; it is killed at the end if it still runs."""
    with contextlib.ExitStack() as stack:

        def start(url: str | None = None, trajectories: int = 2) -> subprocess.Popen[str]:
            folder = str(tmp_path / "client")
            command = [sys.executable, "-c", CLIENT, url or server.url, name, folder, str(trajectories)]
            environment = {**os.environ, "WANDB_API_KEY": client.key}
            process = subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


@contextlib.contextmanager
def losing_way(url: str, *, most: int) -> Iterator[tuple[str, threading.Event]]:
    """A way to a server on which what is sent by one connection is lost after so many bytes; and when that begins."""
    lost, target = threading.Event(), urlsplit(url)

    def pass_on(source: socket.socket, sink: socket.socket, left: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                left -= len(data)
                if left >= 0:
                    sink.sendall(data)
                else:
                    lost.set()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    class Way(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((target.hostname, target.port)) as upstream:
                back = threading.Thread(target=pass_on, args=(upstream, self.request, float("inf")))
                back.start()
                pass_on(self.request, upstream, most)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Way) as ways:
        threading.Thread(target=ways.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{ways.server_address[1]}/v1", lost
        finally:
            ways.shutdown()


def kill_when_it_says(process: subprocess.Popen[str], words: str) -> None:
    """SIGKILL, as soon as the client's progress has these words."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            process.kill()
            process.wait()
            return
    raise AssertionError("".join(said)[-3000:])


@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize(
    ("words", "hold"),
    [("queued, place", "hold_train"), (": training", "hold_train"), (": publishing", "hold_load")],
    ids=["queued", "training", "publishing"],
)
def test_a_job_outlives_its_client_and_another_one_goes_on_from_it(
    server: Any, client: Any, name: str, training_client: Any, words: str, hold: str, round_: int
) -> None:
    model = client.model(name)
    server.order(**{hold: True})
    if "queued" in words:
        client.submit(client.model(f"first-{name}"))
    kill_when_it_says(training_client(), words)
    server.order()
    client.until(lambda: client.steps(model) == [0, 1])
    said, errors = training_client().communicate(timeout=120)
    assert said == "trained step 2\n", errors
    assert server.trained(name) == [1, 2]
    assert logprob(client, name) == -2.5


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_client_that_is_killed_while_it_sends_leaves_nothing_half_done(
    server: Any, client: Any, name: str, training_client: Any, round_: int
) -> None:
    model, arriving = client.model(name), server.data / "jobs"
    with losing_way(server.url, most=200_000) as (url, lost):
        process = training_client(url, trajectories=100)
        assert lost.wait(60), "it never sent so much"
        client.until(lambda: any(arriving.iterdir()))
        process.kill()
        process.wait()
    client.until(lambda: not any(arriving.iterdir()))
    assert client.steps(model) == [0]
    said, errors = training_client().communicate(timeout=120)
    assert said == "trained step 1\n", errors
    assert server.trained(name) == [1]
    assert not any(arriving.iterdir())


def test_a_server_that_is_told_to_end_goes_on_with_its_job_when_it_is_back(server: Any, client: Any, name: str) -> None:
    model = client.model(name)
    server.order(hold_train=True)
    job = client.submit(model, learning_rate=0.5)
    client.until(lambda: server.trained(name))
    assert server.stop() == 0
    server.order()
    server.start()
    assert client.ended(job)["data"]["step"] == 1
    assert client.steps(model) == [0, 1]
    assert logprob(client, name) == -1.5


def test_a_server_on_postgresql_goes_on_after_a_kill_too(
    serving: Any, postgresql_url: str, tmp_path: Any, own_tiny_model: Any
) -> None:
    with serving(tmp_path / "own", own_tiny_model, database=postgresql_url) as server:
        client = server.client(server.key("acme"))
        model = client.model()
        server.order(hold_train=True)
        jobs = [client.submit(model, key=f"k{n}", learning_rate=0.5) for n in range(2)]
        client.until(lambda: server.trained("m"))
        server.kill()
        server.order()
        server.start()
        assert [client.ended(job)["data"]["step"] for job in jobs] == [1, 2]
        assert client.submit(model, key="k0", learning_rate=0.5) == jobs[0]
        assert server.trained("m") in ([1, 1, 2], [1, 2])
        assert [logprob(client, f"m:step{step}") for step in (1, 2)] == [-1.5, -2.5]
        assert not (server.data / "state.sqlite").exists()
        assert "postgresql" not in server.log.read_text()
