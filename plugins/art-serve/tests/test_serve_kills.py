"""A server killed with SIGKILL while a job is sent, waits, trains or is published: nothing is lost, nothing trained
twice. On the fake engines, whose answers tell how often a step was trained.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

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
