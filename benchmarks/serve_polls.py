"""What `art serve` takes to answer a poll: on an empty database, on a full one, and while many clients ask and train.

    python benchmarks/serve_polls.py
    python benchmarks/serve_polls.py --clients 200 --models 1000 --events 100000

A real server with engine torch and a tiny random model. "empty" and "full" are polls of an ended job's events from its
first on, so that each reads the table, by 8 clients at once: before and after the database is given `--models` models
and `--events` events of others. "busy" is `--clients` clients that by turns poll a job and ask the model for a few
tokens, with a second in between, while jobs train one after the other. Prints the machine and the versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import aiohttp
from measuring.machine import machine, versions
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

from art_conformance.tiny_model import write_base_model
from art_serve.database import CHECKPOINTS, EVENTS, JOBS, MODELS, open_database
from art_serve.job_queue import JobState

LIBRARIES = ("art-serve", "art-gateway", "fastapi", "starlette", "uvicorn", "sqlalchemy")
ART = [sys.executable, "-m", "art_core"]
ENTITY = "bench"
NAME = f"wandb-artifact:///{ENTITY}/p/m"
_EVENTS_OF_A_JOB = 100
_TOGETHER = 8
_LIMIT_S = 180.0
# A client polls about once a second.
_PAUSE_S = 1.0


@contextmanager
def running(data: Path, base: Path) -> Iterator[str]:
    """A server; gives its base URL."""
    options = ["--port", "0", "--data", str(data), "--inference-engine", "torch", "--training-engine", "torch"]
    rates = ["--requests-per-s", "1000000", "--waiting-jobs", "1000"]
    log = data.with_suffix(".log")
    with log.open("a") as out:
        command = [*ART, "serve", *options, *rates, "--base-model", f"tiny={base}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
        yield said.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


async def ask(http: aiohttp.ClientSession, method: str, path: str, body: Any = None) -> Any:
    """The answer to a request that works."""
    async with http.request(method, path, json=body, raise_for_status=True) as answer:
        return await answer.json()


async def train(http: aiohttp.ClientSession, model: str) -> str:
    """Submit a job that trains on answers of the model; gives its id."""
    messages = [{"role": "user", "content": "What is it?"}]

    async def attempt(seed: int) -> dict[str, Any]:
        asked = {"model": NAME, "messages": messages, "max_tokens": 16, "seed": seed}
        choice = (await ask(http, "POST", "chat/completions", asked))["choices"][0]
        return {"messages_and_choices": [*messages, choice], "reward": float(seed % 2)}

    trajectories = await asyncio.gather(*(attempt(seed) for seed in range(8)))
    body = {"model_id": model, "trajectory_groups": [{"trajectories": trajectories}]}
    return str((await ask(http, "POST", "preview/training-jobs", body))["id"])


async def until_ended(http: aiohttp.ClientSession, job: str) -> None:
    """Wait for a job."""
    async with asyncio.timeout(_LIMIT_S):
        while True:
            state = (await ask(http, "GET", f"preview/training-jobs/{job}"))["state"]
            if state in ("succeeded", "failed"):
                assert state == "succeeded"
                return
            await asyncio.sleep(0.1)


async def polls(http: aiohttp.ClientSession, job: str, count: int) -> list[float]:
    """What `count` polls took, in seconds."""
    took: list[float] = []

    async def some(number: int) -> None:
        for _ in range(number):
            start = time.perf_counter()
            page = await ask(http, "GET", f"preview/training-jobs/{job}/events")
            took.append(time.perf_counter() - start)
            assert page["data"]

    await asyncio.gather(*(some(count // _TOGETHER) for _ in range(_TOGETHER)))
    return took


async def busy(http: aiohttp.ClientSession, model: str, clients: int, jobs: int) -> dict[str, Any]:
    """Poll and sample while jobs train."""
    polled: list[float] = []
    sampled: list[float] = []
    errors: list[str] = []
    job = await train(http, model)
    over = asyncio.Event()

    async def client(number: int) -> None:
        while not over.is_set():
            for took, request in (
                (polled, ("GET", f"preview/training-jobs/{job}/events", None)),
                (sampled, ("POST", "chat/completions", {"model": NAME, "messages": [_HI], "max_tokens": 4})),
            ):
                start = time.perf_counter()
                try:
                    await ask(http, *request)
                except (aiohttp.ClientError, TimeoutError) as error:
                    errors.append(f"{number}: {type(error).__name__}: {error}")
                took.append(time.perf_counter() - start)
            await asyncio.sleep(_PAUSE_S)

    asking = [asyncio.create_task(client(number)) for number in range(clients)]
    try:
        for _ in range(jobs):
            await until_ended(http, job)
            job = await train(http, model)
        await until_ended(http, job)
    finally:
        over.set()
        await asyncio.gather(*asking)
    return {"polls": figures(polled), "samples": figures(sampled), "errors": len(errors), "first_errors": errors[:5]}


_HI = {"role": "user", "content": "hi"}


def fill(data: Path, models: int, events: int) -> None:
    """Models and ended jobs of somebody else, with their events."""
    engine = open_database(data / "state.sqlite")
    now = time.time()
    ids = [uuid4().hex for _ in range(models)]
    jobs = [uuid4().hex for _ in range(events // _EVENTS_OF_A_JOB)]
    with engine.begin() as connection:
        common = {"entity": "others", "project": "p", "base_model": "tiny", "created_at": now}
        connection.execute(insert(MODELS), [{"id": id_, "name": f"m{n}", **common} for n, id_ in enumerate(ids)])
        steps = [{"model_id": id_, "step": 0, "metrics": "{}", "created_at": now} for id_ in ids]
        connection.execute(insert(CHECKPOINTS), steps)
        rows = [
            {
                "id": id_,
                "entity": "others",
                "model_id": ids[n % models],
                "idempotency_key": id_,
                "payload": "{}",
                "state": JobState.SUCCEEDED,
                "started_at": now,
            }
            for n, id_ in enumerate(jobs)
        ]
        connection.execute(insert(JOBS), rows)
        metrics = json.dumps({"metrics": {f"loss/metric_{n}": n / 7 for n in range(16)}})
        connection.execute(
            insert(EVENTS),
            [
                {"job_id": job, "type": "gradient_step", "data": metrics, "created_at": now}
                for job in jobs
                for _ in range(_EVENTS_OF_A_JOB)
            ],
        )
    engine.dispose()


def make_key(data: Path) -> str:
    """A key of the entity that is measured."""
    command = [*ART, "serve", "keys", "create", ENTITY, "--data", str(data)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def figures(took: list[float]) -> dict[str, float]:
    """How many, and p50 and p99 in milliseconds."""
    ordered = sorted(took)
    if not ordered:
        return {"count": 0, "p50_ms": 0.0, "p99_ms": 0.0}
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 for share in (0.5, 0.99))
    return {"count": len(ordered), "p50_ms": round(p50, 2), "p99_ms": round(p99, 2)}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All three."""
    result: dict[str, Any] = {"machine": machine(), "versions": versions(["torch"], LIBRARIES)}
    with TemporaryDirectory(prefix="art-serve-polls-") as folder:
        data, base = Path(folder) / "data", write_base_model(Path(folder) / "base")
        headers = {"Authorization": f"Bearer {await asyncio.to_thread(make_key, data)}"}

        def client(url: str) -> aiohttp.ClientSession:
            limit = aiohttp.ClientTimeout(total=_LIMIT_S)
            connections = aiohttp.TCPConnector(limit=0)
            return aiohttp.ClientSession(f"{url}/", headers=headers, timeout=limit, connector=connections)

        body = {"project": "p", "name": "m", "base_model": "tiny", "return_existing": True}
        with running(data, base) as url:
            async with client(url) as http:
                model = (await ask(http, "POST", "preview/models", body))["id"]
                job = await train(http, model)
                await until_ended(http, job)
                await polls(http, job, arguments.polls // 10)
                result["empty"] = figures(await polls(http, job, arguments.polls))
        await asyncio.to_thread(fill, data, arguments.models, arguments.events)
        with running(data, base) as url:
            async with client(url) as http:
                await ask(http, "POST", "preview/models", body)
                await polls(http, job, arguments.polls // 10)
                result["full"] = figures(await polls(http, job, arguments.polls))
                result["busy"] = await busy(http, model, arguments.clients, arguments.jobs)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polls", type=int, default=2000)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print an object in place of a table")
    arguments = parser.parse_args()
    os.environ |= {"ART_TRACKIO_MODE": "disabled", "ART_MLFLOW_MODE": "disabled"}
    result = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    table = Table("polls", "count", "p50 ms", "p99 ms")
    rows = {
        "empty": result["empty"],
        f"{arguments.models} models, {arguments.events} events": result["full"],
        f"{arguments.clients} clients, a job trains": result["busy"]["polls"],
        "and what these clients sampled": result["busy"]["samples"],
    }
    for name, row in rows.items():
        table.add_row(name, *(str(row[column]) for column in ("count", "p50_ms", "p99_ms")))
    console = Console()
    console.print(table)
    console.print(f"errors: {result['busy']['errors']} {result['busy']['first_errors']}", markup=False)
    console.print(f"{result['machine']}\n{result['versions']}", markup=False)


if __name__ == "__main__":
    main()
