"""A server as a real process on the fake engines: models, jobs, events, checkpoints, and names that mean something."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_job_tells_all_that_happens_to_it_and_makes_one_step(client: Any) -> None:
    model = client.model()
    job = client.submit(model, learning_rate=0.5)
    events = list(client.events(job))
    assert [event["type"] for event in events] == [
        "queued",
        "training_started",
        "phase",
        "phase",
        "phase",
        "gradient_step",
        "training_ended",
    ]
    assert events[0]["data"] == {"place": 1}
    assert events[1]["data"] == {"num_sequences": 2}
    assert [event["data"]["phase"] for event in events[2:5]] == ["training", "saving", "publishing"]
    assert events[5]["data"]["loss/train"] == 0.5
    numbers = [int(event["id"]) for event in events]
    assert numbers == sorted(set(numbers))
    status = client.json("GET", f"/preview/training-jobs/{job}")
    assert (status["state"], status["step"], status["error_message"]) == ("succeeded", 1, None)
    page = client.json("GET", f"/preview/models/{model}/checkpoints", params={"order": "desc"})
    assert [kept["step"] for kept in page["data"]] == [1, 0]
    assert page["data"][0]["metrics"]["loss/train"] == 0.5


def test_jobs_that_wait_are_told_each_place_that_they_come_to(server: Any, client: Any) -> None:
    server.order(hold_train=True)
    first = client.submit(client.model("first"))
    client.until(lambda: client.json("GET", f"/preview/training-jobs/{first}")["phase"] == "training")
    others = [client.submit(client.model(name)) for name in ("second", "third", "fourth")]
    server.order()
    for job, places in zip(others, ([1], [2, 1], [3, 2, 1]), strict=True):
        assert [event["data"]["place"] for event in client.events(job) if event["type"] == "queued"] == places


def test_the_same_request_under_the_same_key_makes_one_job(client: Any) -> None:
    model = client.model()
    first = client.submit(model, key="k", learning_rate=0.5)
    client.ended(first)
    assert client.submit(model, key="k", learning_rate=0.5) == first
    other = {"model_id": model, "trajectory_groups": [{"trajectories": [{"reward": 1.0}]}]}
    refused = client.ask("POST", "/preview/training-jobs", json=other, headers={"Idempotency-Key": "k"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert client.steps(model) == [0, 1]


def test_a_model_is_found_again_by_its_name_and_a_deleted_one_is_not(client: Any) -> None:
    model = client.model()
    assert client.model() == model
    taken = client.ask("POST", "/preview/models", json={"project": "p", "name": "m", "base_model": "tiny"})
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    client.ended(client.submit(model))
    assert client.ask("DELETE", f"/preview/models/{model}").status_code == 204
    assert client.ask("DELETE", f"/preview/models/{model}").status_code == 404
    again = client.model()
    assert again != model
    assert client.steps(again) == [0], "nothing of a deleted model comes back"


def test_a_job_that_fails_says_why_and_the_next_one_works(server: Any, client: Any) -> None:
    model = client.model()
    server.order(fail="the disk of the worker is full")
    try:
        ended = client.ended(client.submit(model))
    finally:
        server.order()
    assert ended["type"] == "training_failed"
    assert "the disk of the worker is full" in ended["data"]["error_message"]
    assert client.ended(client.submit(model))["type"] == "training_ended"
    assert client.steps(model) == [0, 1]


def test_what_cannot_be_trained_on_is_refused_before_it_is_queued(client: Any) -> None:
    model = client.model()

    def refused(**fields: Any) -> tuple[int, str | None]:
        body = {"model_id": model, "trajectory_groups": [{"trajectories": [{"reward": 1.0}]}], **fields}
        answer = client.ask("POST", "/preview/training-jobs", json=body)
        return answer.status_code, answer.json()["error"]["param"]

    assert refused(trajectory_groups=7) == (422, "trajectory_groups")
    assert refused(trajectory_groups=[{"trajectories": [{"reward": "much"}]}]) == (
        422,
        "trajectory_groups.0.trajectories.0.reward",
    )
    assert refused(experimental_config={"learning_rat": 1.0}) == (422, "experimental_config.learning_rat")
    assert refused(trajectory_group=[]) == (422, "trajectory_group")
    assert refused(model_id="0" * 32) == (404, "model_id")


def test_pages_lead_from_the_first_event_to_the_last(client: Any) -> None:
    job = client.submit(client.model())
    whole = list(client.events(job))
    read, after = [], {}
    while True:
        page = client.json("GET", f"/preview/training-jobs/{job}/events", params={"limit": 2, **after})
        read += page["data"]
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["id"]}
    assert read == whole
    assert client.ask("GET", f"/preview/training-jobs/{job}/events", params={"after": "x"}).status_code == 422


def test_steps_are_deleted_but_not_the_one_that_is_served(client: Any) -> None:
    model = client.model()
    for _ in range(2):
        client.ended(client.submit(model))
    path = f"/preview/models/{model}/checkpoints"
    assert client.ask("DELETE", path, json={"steps": [0, 2]}).status_code == 409
    assert client.steps(model) == [0, 1, 2]
    assert client.json("DELETE", path, json={"steps": [0, 7]}) == {"deleted_count": 1, "not_found_steps": [7]}
    assert client.steps(model) == [1, 2]


def test_a_model_starts_from_the_checkpoint_of_another(client: Any) -> None:
    first, second = client.model("first"), client.model("second", project="q")
    client.ended(client.submit(first, learning_rate=0.5))
    asked = {"from_model": "first", "from_project": "p"}
    assert client.json("POST", f"/preview/models/{second}/fork", json=asked) == {"step": 1}
    assert client.steps(second) == [0, 1]
    nobody = client.ask("POST", f"/preview/models/{second}/fork", json={"from_model": "nobody"})
    assert (nobody.status_code, nobody.json()["error"]["param"]) == (422, "from_model")
    client.json("DELETE", f"/preview/models/{first}/checkpoints", json={"steps": [0]})
    nothing = client.ask("POST", f"/preview/models/{second}/fork", json={**asked, "not_after_step": 0})
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (422, "checkpoint_not_found")


def test_a_base_model_that_is_not_served_is_refused_and_no_model_is_left(client: Any) -> None:
    body = {"project": "p", "name": "m", "base_model": "/etc"}
    refused = client.ask("POST", "/preview/models", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "base_model")
    assert client.json("GET", "/models")["data"] == []


def test_a_checkpoint_is_fetched_by_hash_whole_and_in_parts(client: Any) -> None:
    model = client.model()
    client.ended(client.submit(model, learning_rate=0.5))
    listed = client.json("GET", f"/preview/models/{model}/checkpoints/1/files")
    assert {file["path"] for file in listed["files"]} == {"adapter_config.json", "adapter_model.safetensors"}
    for file in listed["files"]:
        address = f"/preview/models/{model}/blobs/{file['sha256']}"
        whole = client.ask("GET", address)
        assert hashlib.sha256(whole.content).hexdigest() == file["sha256"]
        assert len(whole.content) == file["size"]
        half = file["size"] // 2
        parts = [client.ask("GET", address, headers={"Range": f"bytes={at}"}) for at in (f"0-{half - 1}", f"{half}-")]
        assert [part.status_code for part in parts] == [206, 206]
        assert b"".join(part.content for part in parts) == whole.content
    assert client.ask("GET", f"/preview/models/{model}/checkpoints/7/files").status_code == 404
    assert client.ask("GET", f"/preview/models/{model}/blobs/{'0' * 64}").status_code == 404


def test_every_answer_has_the_id_under_which_the_log_knows_it(server: Any, client: Any) -> None:
    given = client.ask("GET", "/capabilities", headers={"X-Request-Id": "mine-1"})
    made = client.ask("GET", "/nowhere", headers={"X-Request-Id": "not allowed"})
    assert given.headers["X-Request-Id"] == "mine-1"
    assert len(made.headers["X-Request-Id"]) == 32

    def noted(request_id: str) -> Any:
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        own = (line["status"] for line in lines if line.get("request_id") == request_id and "status" in line)
        return next(own, None)

    # An answer is noted once it has gone out.
    assert client.until(lambda: noted("mine-1")) == 200
    assert client.until(lambda: noted(made.headers["X-Request-Id"])) == 404
    assert client.key not in server.log.read_text()


def test_health_and_figures_are_there_for_who_watches(server: Any, client: Any) -> None:
    client.model()
    root = server.url.removesuffix("/v1")
    assert [httpx.get(root + path).status_code for path in ("/health", "/ready", "/openapi.json", "/docs")] == [200] * 4
    assert httpx.get(root + "/metrics").status_code == 401

    def figures() -> str:
        return httpx.get(root + "/metrics", headers={"Authorization": f"Bearer {client.key}"}).text

    assert 'art_serve_jobs{state="queued"} 0.0' in figures()
    client.until(lambda: 'address="/preview/models"' in figures())


def test_many_clients_poll_and_sample_while_a_job_trains_and_none_is_refused(
    server: Any, client: Any, entity: str
) -> None:
    model = client.model()
    server.order(hold_train=True)
    job = client.submit(model)
    asked = {"model": f"wandb-artifact:///{entity}/p/m", "messages": [{"role": "user", "content": "hi"}]}

    def use(_: int) -> list[str]:
        sampled = [client.json("POST", "/chat/completions", json=asked)["model"] for _ in range(3)]
        return [*sampled, *(event["type"] for event in client.events(job))]

    with ThreadPoolExecutor(40) as pool:
        using = [pool.submit(use, number) for number in range(40)]
        client.until(lambda: client.json("GET", f"/preview/training-jobs/{job}")["phase"] == "training")
        server.order()
        seen = [each.result() for each in using]
    assert len({tuple(types[3:]) for types in seen}) == 1, "everybody is told the same"
    assert all(types[-1] == "training_ended" for types in seen)
    assert {name for types in seen for name in types[:3]} <= {f"{asked['model']}:step{step}" for step in (0, 1)}
