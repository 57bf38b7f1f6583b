"""Keys and jobs of a training server, through their public names, over a real SQLite file and a real PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine

from art_serve import database, job_queue, keys
from art_serve.job_queue import JobState, LeaseLost


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = database.open_database(database_url)
    yield engine
    engine.dispose()


def _submit(engine: Engine, key: str, *, entity: str = "one", payload: str = "{}") -> job_queue.Job:
    return job_queue.submit(engine, entity=entity, model_id=f"m-{entity}", idempotency_key=key, payload=payload)


def test_a_key_opens_its_entity_until_it_is_revoked(engine: Engine) -> None:
    mine, other = keys.create_key(engine, "one"), keys.create_key(engine, "two")
    assert [keys.entity_of(engine, key) for key in (mine, other)] == ["one", "two"]
    key_id = mine.split("-")[1]
    assert keys.revoke_key(engine, key_id)
    assert not keys.revoke_key(engine, key_id)
    assert keys.entity_of(engine, mine) is None
    assert keys.entity_of(engine, other) == "two"


def test_wrong_keys_open_nothing(engine: Engine) -> None:
    mine, other = keys.create_key(engine, "one"), keys.create_key(engine, "two")
    swapped = "-".join([*mine.split("-")[:2], other.split("-")[2]])
    for text in ("", "-", "art", mine[:-1], mine + "0", mine.upper(), "x" + mine, swapped, "art-\0-\0", "\ud800"):
        assert keys.entity_of(engine, text) is None, text


def test_no_secret_is_in_the_database(tmp_path: Path) -> None:
    engine = database.open_database(tmp_path / "state.sqlite")
    secret = keys.create_key(engine, "one").split("-")[2].encode()
    engine.dispose()
    assert all(secret not in file.read_bytes() for file in tmp_path.iterdir())


def test_an_entity_that_is_no_name_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="is not a name of an entity"):
        keys.create_key(engine, "../two")
    assert keys.list_keys(engine) == []


def test_a_repeated_submission_gives_the_same_job(engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: _submit(engine, "a"), range(16)))
    assert len({job.id for job in jobs}) == 1
    with pytest.raises(ValueError, match="was used for another job"):
        _submit(engine, "a", payload="other")


def test_another_entity_finds_no_job(engine: Engine) -> None:
    job = _submit(engine, "a")
    assert job_queue.find_job(engine, job.id, entity="one") == job
    assert job_queue.find_job(engine, job.id, entity="two") is None


def test_one_job_runs_at_a_time_and_entities_take_turns(engine: Engine) -> None:
    for key in ("a", "b", "c"):
        _submit(engine, key, payload=f"one {key}")
    _submit(engine, "a", entity="two", payload="two a")
    order = []
    for now in range(4):
        with ThreadPoolExecutor(4) as pool:
            claims = list(pool.map(lambda n, at=now: job_queue.claim(engine, f"w{n}", lease_s=9, now=at), range(4)))
        ((worker, job),) = [(n, job) for n, job in enumerate(claims) if job is not None]
        order.append(job.payload)
        job_queue.finish(engine, job.id, f"w{worker}")
    assert order == ["one a", "two a", "one b", "one c"]
    assert job_queue.claim(engine, "w", lease_s=9) is None


def test_a_heartbeat_keeps_the_job(engine: Engine) -> None:
    job = _submit(engine, "a")
    job_queue.claim(engine, "w1", lease_s=10, now=0)
    job_queue.heartbeat(engine, job.id, "w1", lease_s=10, now=9)
    assert job_queue.claim(engine, "w2", lease_s=10, now=15) is None


def test_a_failed_job_keeps_its_reason_and_isn_t_run_again(engine: Engine) -> None:
    job = _submit(engine, "a")
    job_queue.claim(engine, "w1", lease_s=10)
    job_queue.finish(engine, job.id, "w1", error="out of memory")
    ended = _submit(engine, "a")
    assert (ended.state, ended.error) == (JobState.FAILED, "out of memory")
    assert job_queue.claim(engine, "w1", lease_s=10) is None


_WORKER = """
import sys, time
from pathlib import Path
from art_serve import database, job_queue
engine = database.open_database(sys.argv[1])
job = job_queue.claim(engine, "killed", lease_s=10, now=0)
job_queue.fix_step(engine, job.id, "killed", 7)
print(job.id, flush=True)
time.sleep(60)
"""


def test_a_job_outlives_kill_9_of_its_worker_under_the_same_step(engine: Engine, database_url: str) -> None:
    first, second = _submit(engine, "a"), _submit(engine, "b")
    command = [sys.executable, "-c", _WORKER, database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        try:
            assert worker.stdout.readline().strip() == first.id
        finally:
            os.kill(worker.pid, signal.SIGKILL)
    assert job_queue.claim(engine, "next", lease_s=10, now=9) is None
    resumed = job_queue.claim(engine, "next", lease_s=10, now=11)
    assert resumed is not None
    assert (resumed.id, resumed.step) == (first.id, 7)
    assert job_queue.fix_step(engine, first.id, "next", 8) == 7
    for late in (
        lambda: job_queue.finish(engine, first.id, "killed"),
        lambda: job_queue.heartbeat(engine, first.id, "killed", lease_s=10),
        lambda: job_queue.fix_step(engine, first.id, "killed", 9),
    ):
        with pytest.raises(LeaseLost, match="let go of it"):
            late()
    job_queue.finish(engine, first.id, "next")
    following = job_queue.claim(engine, "next", lease_s=10, now=12)
    assert following is not None
    assert following.id == second.id
