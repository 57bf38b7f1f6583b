"""What a server refuses because it is too much, who may reach it, and what it does when a client goes away."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_serve.request_rate import RequestRate


def test_a_rate_lets_a_burst_pass_and_then_so_many_a_second() -> None:
    now = 0.0
    rate = RequestRate(per_s=2, burst=3, clock=lambda: now)
    assert [rate.take("one") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rate.take("two") == 0, "one entity's requests aren't another's"
    now = 0.5
    assert [rate.take("one"), rate.take("one")] == [0, 0.5]
    now = 1000.0
    assert [rate.take("one") for _ in range(4)] == [0, 0, 0, 0.5]


@pytest.fixture(scope="module")
def limited(serving: Any, tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("limited")
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem")),
            *("-out", str(folder / "certificate.pem")),
        ],
        capture_output=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    options = ["--waiting-jobs", "2", "--requests-per-s", "50"]
    tls = ["--certificate", str(folder / "certificate.pem"), "--key", str(folder / "key.pem")]
    with serving(folder, own_tiny_model, *options, *tls) as server:
        server.verify = ssl.create_default_context(cafile=folder / "certificate.pem")
        yield server


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_more_jobs_than_may_wait_are_refused_for_a_while(limited: Any) -> None:
    assert limited.url.startswith("https://")
    client = limited.client(limited.key("many-jobs"))
    model = client.model()
    limited.order(hold_train=True)
    try:
        running = client.submit(model)
        client.until(lambda: client.json("GET", f"/preview/training-jobs/{running}")["state"] == "running")
        waiting = [client.submit(model, key=f"k{n}") for n in range(2)]
        body = {"model_id": model, "trajectory_groups": []}
        full = client.ask("POST", "/preview/training-jobs", json=body)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["Retry-After"]) > 0
        assert client.submit(model, key="k1") == waiting[1], "one that waits already isn't refused"
    finally:
        limited.order()
    assert [client.ended(job)["type"] for job in (running, *waiting)] == ["training_ended"] * 3
    client.until(lambda: list((limited.data / "jobs").iterdir()) == [])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_who_asks_too_often_is_told_when_to_come_back_and_others_are_answered(limited: Any) -> None:
    often, seldom = limited.client(limited.key("often")), limited.client(limited.key("seldom"))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: often.ask("GET", "/capabilities"), range(640)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert seldom.ask("GET", "/capabilities").status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_client_that_goes_away_is_noted_and_its_request_ends(server: Any, client: Any, entity: str) -> None:
    client.model()
    asked = {"model": f"wandb-artifact:///{entity}/p/m", "messages": [{"role": "user", "content": "hold"}]}
    server.order(hold_answer=True)
    try:
        with pytest.raises(httpx.ReadTimeout):
            client.ask("POST", "/chat/completions", json=asked, timeout=1.0, headers={"X-Request-Id": "gone-1"})
        client.until(lambda: _noted(server, "gone-1") == 499)
    finally:
        server.order()
    # Only the one that asks for it.
    client.until(lambda: "art_serve_requests_under_way 1.0" in client.ask("GET", "/../metrics").text)


def _noted(server: Any, request_id: str) -> int | None:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return next((line["status"] for line in lines if line.get("request_id") == request_id and "status" in line), None)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_keys_are_listed_without_what_opens_anything_and_revoked(own_server: Callable[..., Any]) -> None:
    server = own_server(start=False)
    made = server.keys("create", "acme")
    assert made.exit_code == 0, made.output
    prefix, key_id, secret = made.stdout.strip().split("-")
    assert (prefix, len(secret)) == ("art", 64)
    listed = server.keys("list")
    assert key_id in listed.stdout
    assert "open" in listed.stdout
    assert secret not in listed.stdout + listed.stderr
    assert server.keys("revoke", key_id).exit_code == 0
    assert json.loads(server.keys("list", "--json").stdout)[0]["revoked_at"] is not None
    again = server.keys("revoke", key_id)
    assert (again.exit_code, "no open key" in again.stderr) == (1, True)
    assert "is not a name of an entity" in server.keys("create", "../acme").stderr
    refused = server.run("--host", "0.0.0.0")
    assert (refused.returncode, "no key was made" in refused.stderr) == (1, True), "a revoked key is none"
    assert "give --certificate and --key together" in server.run("--key", "x").stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_servers_do_not_share_a_folder(server: Any) -> None:
    second = server.run()
    assert (second.returncode, "another art serve uses" in second.stderr) == (1, True), second.stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_address_without_the_base_is_told_where_the_base_is(server: Any, client: Any) -> None:
    there = client.ask("GET", "/preview/nothing").json()["error"]["message"]
    assert there == "There is nothing at '/v1/preview/nothing'."
    words = client.ask("POST", "/../preview/models", json={}).json()["error"]["message"]
    assert words == f"There is nothing at '/preview/models'. A client's base_url ends in /v1: {server.url}"
