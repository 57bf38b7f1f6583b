"""A disk that is full, a database that is locked or gone, under a running server: said in words, nothing is lost."""

from __future__ import annotations

import errno
import json
import resource
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from art_backend_local.wire.errors import error_from_json, error_to_json
from art_core.errors import BaseModelNotFound, ProcessFailed
from art_gateway.errors import ApiError
from art_serve.wire_models import raise_as_answer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@contextmanager
def full_disk(server: Any) -> Iterator[None]:
    """No file of the server's process may grow."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def locked(server: Any) -> Iterator[None]:
    """Somebody else holds the database's write lock."""
    connection = sqlite3.connect(server.data / "state.sqlite", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_a_full_disk_refuses_a_job_in_words_and_takes_it_when_there_is_room(server: Any, client: Any) -> None:
    model = client.model()
    before = list((server.data / "jobs").iterdir())
    body = {"model_id": model, "trajectory_groups": []}
    with full_disk(server):
        refused = client.ask("POST", "/preview/training-jobs", json=body, headers={"Idempotency-Key": "k"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "disk_full")
        assert int(refused.headers["Retry-After"]) > 0
        assert client.json("GET", f"/preview/models/{model}/checkpoints")["data"]
    assert list((server.data / "jobs").iterdir()) == before
    assert client.ended(client.submit(model, key="k"))["type"] == "training_ended"
    assert client.steps(model) == [0, 1]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory"), 503, "machine_failed"),
        (PermissionError(errno.EACCES, "Permission denied"), 503, "machine_failed"),
        (ProcessFailed("the host cannot be started"), 503, "backend_unavailable"),
        (BaseModelNotFound("there is no such base model"), 422, "refused_by_backend"),
        (ValueError("r must be at least 1"), 422, "refused_by_backend"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_fails_on_the_server_s_machine_is_not_told_as_the_client_s_mistake(
    error: Exception, status: int, code: str
) -> None:
    with pytest.raises(ApiError) as told:
        raise_as_answer(error)
    assert (told.value.status, told.value.code) == (status, code)
    assert str(error) in str(told.value)
    assert (b"retry-after" in dict(told.value.headers)) == (status == 503)


def test_a_full_disk_that_the_backend_met_is_the_server_s_full_disk() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    over_the_wire = error_from_json(json.loads(json.dumps(error_to_json(full))))
    with pytest.raises(OSError, match="No space left") as told:
        raise_as_answer(over_the_wire)
    assert told.value.errno == errno.ENOSPC


def test_a_step_that_ends_while_the_disk_is_full_is_kept_once_there_is_room(server: Any, client: Any) -> None:
    model = client.model(name := "m-full-disk")
    server.order(hold_train=True)
    job = client.submit(model, learning_rate=0.5)
    client.until(lambda: server.trained(name))
    with full_disk(server):
        server.order()
        client.until(lambda: _served(server, name) == 1)
    assert client.ended(job)["data"]["step"] == 1
    assert server.trained(name) == [1]
    assert client.steps(model) == [0, 1]


def test_a_database_that_is_locked_for_a_while_loses_nothing(server: Any, client: Any) -> None:
    model = client.model(name := "m-locked")
    server.order(hold_train=True)
    running = client.submit(model)
    client.until(lambda: server.trained(name))
    with ThreadPoolExecutor(1) as pool:
        with locked(server):
            waiting = pool.submit(client.submit, model, key="k")
            server.order()
            client.until(lambda: _served(server, name) == 1)
            assert client.json("GET", f"/preview/training-jobs/{running}")["state"] == "running", "who reads isn't held"
            assert not waiting.done()
        jobs = [running, waiting.result()]
    assert [client.ended(job)["data"]["step"] for job in jobs] == [1, 2]
    assert server.trained(name) == [1, 2]


@pytest.mark.parametrize("away_s", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_a_database_that_is_gone_for_a_while_loses_nothing(
    serving: Any, own_postgresql: Any, own_tiny_model: Any, tmp_path: Path, away_s: float
) -> None:
    with serving(tmp_path / "own", own_tiny_model, database=own_postgresql.new_database()) as server:
        client, not_yet_seen = server.client(server.key("acme")), server.client(server.key("acme"))
        model = client.model()
        server.order(hold_train=True)
        running = client.submit(model)
        client.until(lambda: server.trained("m"))
        own_postgresql.stop()
        new_model = {"project": "p", "name": "n", "base_model": "tiny"}
        _is_told_that_the_database_is_gone(client, "POST", "/preview/models", new_model)
        _is_told_that_the_database_is_gone(not_yet_seen, "GET", f"/preview/models/{model}")
        _is_told_that_the_database_is_gone(not_yet_seen, "POST", "/chat/completions", {"messages": []})
        server.order()
        client.until(lambda: _served(server, "m") == 1)
        time.sleep(away_s)
        own_postgresql.start()
        jobs = [running, client.until(lambda: _submitted(client, model))]
        assert [client.ended(job)["data"]["step"] for job in jobs] == [1, 2]
        assert server.trained("m") == [1, 2]
        assert client.steps(model) == [0, 1, 2]


def _is_told_that_the_database_is_gone(client: Any, method: str, path: str, body: object = None) -> None:
    refused = client.ask(method, path, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
    assert int(refused.headers["Retry-After"]) > 0


def _submitted(client: Any, model: str) -> str | None:
    answer = client.ask("POST", "/preview/training-jobs", json={"model_id": model, "trajectory_groups": []})
    assert answer.status_code in (200, 503), answer.text
    return answer.json()["id"] if answer.is_success else None


def _served(server: Any, name: str) -> int:
    """The step that the backend has, whatever the database says: its checkpoint is on disk and marked as published."""
    folders = list((server.data / "backend").glob(f"*/models/{name}/checkpoints/*.published"))
    return max((int(mark.name.partition(".")[0]) for mark in folders), default=0)
